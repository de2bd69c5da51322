"""Progress of long work: a bar on a terminal, a plain line every 30 seconds in a log file."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Protocol, Self, TypeVar

from tqdm import tqdm

INTERVAL = 30.0  # seconds between the lines of a log file
BRIEF = 2.0  # seconds that work must last to be shown, where it usually ends at once
T = TypeVar("T")


class Progress(Protocol):
    """Interface of progress bars and of progress lines in a log file."""

    n: int | float

    def update(self, n: int = 1) -> object:
        """Count further items."""

    def set_postfix(self, values: Mapping[str, str]) -> None:
        """Set the values that stand behind the count."""

    def close(self) -> None:
        """Show the final count."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class ProgressBar(tqdm):
    """A bar on a terminal."""

    def set_postfix(self, values: Mapping[str, str]) -> None:
        """Set the values that stand behind the count; the next update shows them."""
        super().set_postfix(values, refresh=False)


class ProgressLines:
    """Prints a line every 30 seconds, and one at the end.

    Args:
        total: items of the whole work; None if unknown.
        name: of the work.
        unit: what is counted, in the singular; `B` for bytes.
        done: items that were done before.
        delay: seconds that work must last to be shown.
        hidden: print nothing.
        clock: returns seconds.
    """

    def __init__(
        self,
        total: int | None,
        name: str,
        unit: str,
        done: int = 0,
        delay: float = 0.0,
        hidden: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.name, self.unit, self.delay, self.hidden, self.clock = total, name, unit, delay, hidden, clock
        self.n: int | float = done
        self.done, self.start = done, clock()
        self.due = self.start + INTERVAL
        self.values = ""
        self.open = True

    def update(self, n: int = 1) -> None:
        self.n += n
        now = self.clock()
        if now >= self.due:
            self.due = now + INTERVAL
            self._print(now, "left")

    def set_postfix(self, values: Mapping[str, str]) -> None:
        self.values = "".join(f", {name}={value}" for name, value in values.items())

    def close(self) -> None:
        now = self.clock()
        if self.open and self.n > self.done and now >= self.start + self.delay:
            self._print(now, "taken")
        self.open = False

    def _print(self, now: float, ending: str) -> None:
        if self.hidden:
            return
        rate = (self.n - self.done) / max(now - self.start, 1e-9)
        parts = [f"{self.name}: {self._amount(self.n)}"]
        if self.total is not None:
            parts[0] += f"/{self._amount(self.total)} ({self.n / max(self.total, 1):.0%})"
        parts.append(f"{self._amount(rate)} {self.unit}/s")
        if ending == "taken":
            parts.append(f"{_clock_time(now - self.start)} taken")
        elif self.total is not None and rate > 0:
            parts.append(f"{_clock_time((self.total - self.n) / rate)} left")
        print(", ".join(parts) + self.values, file=sys.stderr, flush=True)

    def _amount(self, number: float) -> str:
        if self.unit == "B":
            return tqdm.format_sizeof(number)
        return f"{number:,}" if isinstance(number, int) else f"{number:.3g}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def show_progress(
    total: int | None, name: str, unit: str, done: int = 0, delay: float = 0.0, hidden: bool = False
) -> Progress:
    """A bar if stderr is a terminal, else lines; arguments as for `ProgressLines`."""
    if hidden or total == 0 or not sys.stderr.isatty():
        return ProgressLines(total, name, unit, done, delay, hidden)
    return ProgressBar(
        total=total,
        desc=name,
        unit=unit,
        unit_scale=unit == "B",
        initial=done,
        delay=delay,
        mininterval=0.5,
        leave=None,
    )


def track(
    items: Iterable[T], total: int, name: str, unit: str, delay: float = 0.0, hidden: bool = False
) -> Iterator[T]:
    """The items, counted as they are taken; arguments as for `ProgressLines`."""
    with show_progress(total, name, unit, delay=delay, hidden=hidden) as bar:
        for item in items:
            yield item
            bar.update()


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
