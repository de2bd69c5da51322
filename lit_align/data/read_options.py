"""How shards are read, and what happens to broken samples."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lit_align.common.choices import OnError
from lit_align.data.shards.layout import SampleError
from lit_align.user_errors import UserValueError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading shards.

    Args:
        on_error: `raise` on the first broken sample or shard, or `skip` it and name it in the log.
        skip_limit: number of broken samples after which `skip` raises nevertheless.
        timeout: seconds after which a read counts as broken; None waits forever.
        allow_pipe: whether `pipe:` addresses may run their shell commands.
    """

    on_error: OnError = "raise"
    skip_limit: int = 100
    timeout: float | None = None
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise UserValueError(f"data.read_timeout is {self.timeout}; it must be greater than 0, or null.")

    def skip_or_raise(self, error: SampleError) -> None:
        """Log a broken sample as skipped, or raise its error, as `on_error` says."""
        if self.on_error == "raise":
            raise error
        log.warning("Skipped: %s", error)

    def check_limit(self, where: str, faults: Sequence[str]) -> None:
        """Refuse more broken samples than `skip_limit`.

        Raises:
            SampleError: naming `where` and the last fault.
        """
        if len(faults) > self.skip_limit:
            raise SampleError(
                f"{where}: {len(faults)} broken samples, more than data.skip_limit {self.skip_limit} allows; "
                f"the last: {faults[-1]}"
            )


def check_least(**options: tuple[int, int]) -> None:
    """Refuse options below their minimum; each argument is a value and its minimum.

    Raises:
        UserValueError: naming the option.
    """
    for name, (value, least) in options.items():
        if value < least:
            raise UserValueError(f"data.{name} is {value}; it must be at least {least}.")
