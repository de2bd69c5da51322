"""Sources of an import: numbered rows, each of which becomes a pair or is rejected for a reason."""

import hashlib
from collections.abc import Callable, Iterator
from errno import ENAMETOOLONG
from functools import lru_cache, partial
from typing import Any, Protocol

from lit_align.common.captions import clean_caption
from lit_align.common.passing_faults import OWN, StillFailingError, call_patiently, describe, status_of
from lit_align.data.decoder import ImageError, decode
from lit_align.data.importers.rejects import Reject, Rejected, clean, encodable
from lit_align.data.shards.filesystems import PIPE, filesystem_of, is_url
from lit_align.data.shards.storage import open_binary
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import MissingPackageError

GONE = (404, 410)  # HTTP statuses of a file that is not there
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError)


class Part(Protocol):
    """Rows of a source that become one shard; it is pickled for the process that writes the shard."""

    @property
    def remote(self) -> bool:
        """Whether rows come from the network, where a failed read may succeed later."""

    def pairs_and_rejects(self) -> Iterator[NewPair | Reject]:
        """Convert each row, in order; every call yields equal results."""


class Source(Protocol):
    """Preference data of one kind, with rows 0 to `rows` - 1."""

    @property
    def name(self) -> str:
        """Name of the subcommand."""

    @property
    def rows(self) -> int: ...

    @property
    def bytes(self) -> int | None:
        """Approximate size of all shards, bytes; None if unknown."""

    def describe(self) -> dict[str, Any]:
        """All that decides which pairs there are, as `files` and `options`; without folders, for data are moved."""

    def part(self, begin: int, end: int) -> Part: ...


def key_of(row: int) -> str:
    """Key of a row's pair: its position in the source, so that keys are sorted and unique."""
    return f"{row:08d}"


def convert_row(row: int, location: str, make_pair: Callable[[str], NewPair]) -> NewPair | Reject:
    """Call `make_pair` with the row's key, and return its pair, or the reject if it raises `Rejected`."""
    key = key_of(row)
    try:
        return make_pair(key)
    except Rejected as error:
        return Reject(row, clean(location), key, error.reason, clean(error.detail))


def new_pair(
    key: str, images: tuple[bytes, bytes], label_0: float, prompt: Any, more: dict[str, Any] | None
) -> NewPair:
    """Make a pair of images that can be decoded.

    Raises:
        Rejected: if both images are equal, or the prompt is missing or not text; an empty prompt is allowed.
    """
    if images[0] == images[1]:
        raise Rejected("both images are the same")
    return NewPair(key, *images, label_0, _as_text(prompt), None if more is None else clean(more))


def _as_text(prompt: Any) -> str:
    if prompt is None:
        raise Rejected("prompt missing")
    if not isinstance(prompt, str) or prompt != encodable(prompt):
        raise Rejected("prompt is not text", ascii(prompt)[:200])
    return clean_caption(prompt)


def shuffle_images(key: str, chosen_rejected: list[Any]) -> tuple[float, list[Any]]:
    """Order a chosen and a rejected image by a hash of the key, so that the order reveals nothing.

    Returns:
        The label of image 0, and both images in their new order.
    """
    keep = hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 2 == 0
    return (1.0, chosen_rejected) if keep else (0.0, chosen_rejected[::-1])


def parse_labels(label_0: Any, label_1: Any) -> float:
    """Parse two labels and return the first: 1 if image 0 is preferred, 0 if image 1 is, 0.5 for a tie.

    Raises:
        Rejected: if a label is missing, or the two do not add up to 1.
    """
    values = [parse_label(label_0), parse_label(label_1)]
    if sum(values) != 1:
        raise Rejected("labels do not add up to 1", f"{values[0]:g} and {values[1]:g}")
    return values[0]


def parse_label(value: Any) -> float:
    """Parse a label, a number or text.

    Raises:
        Rejected: if it is missing, or not 0, 0.5 or 1.
    """
    if value is None or value == "" or value != value:  # NaN
        raise Rejected("no label")
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = float("nan")
    if number not in (0.0, 0.5, 1.0):
        raise Rejected("label is not 0, 0.5 or 1", ascii(value)[:60])
    return number


def check_image(data: bytes | None) -> bytes:
    """Return an encoded image that can be decoded to its end.

    A header does not reveal a truncated download, which a run would find only days later. A JPEG is decoded at an
    eighth of its size: that reads all bytes and computes little.

    Raises:
        Rejected: if the image is missing, or cannot be decoded.
    """
    if not data:
        raise Rejected("image missing")
    try:
        decode(data, draft=True)
    except ImageError as error:
        raise Rejected(error.reason, error.detail[:200]) from error
    return data


@lru_cache(maxsize=16)  # neighbouring pairs share images
def load_image(path: str) -> bytes:
    """Read an encoded image from a file or URL, and check that it can be decoded.

    Raises:
        Rejected: if there is no such file, its server refuses it, or the image cannot be decoded.
        OSError: if the file exists and cannot be read now, for which the pair is not to blame.
        StillFailingError: if the network failed at every attempt.
    """
    if path.startswith(PIPE):
        raise Rejected("image is a command", path)
    if "\0" in path:
        raise Rejected("image missing", "a name with a null in it")
    data = _read_url(path) if is_url(path) else _read_file(path)
    try:
        return check_image(data)
    except Rejected as error:
        raise Rejected(error.reason, f"{path}: {error.detail}" if error.detail else f"{path} is empty") from error


def _read_file(path: str) -> bytes:
    try:
        with open_binary(path) as file:
            return file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, NO_FILE) or getattr(error, "errno", None) == ENAMETOOLONG:
            raise Rejected("image missing", path) from error
        if isinstance(error, PermissionError):
            raise Rejected("image cannot be read", f"{path}: {error.strerror}") from error
        raise


def _read_url(url: str) -> bytes:
    """Read a file on the network with one request, again while a fault may pass."""
    try:
        return call_patiently(partial(_request, url), url)
    except (StillFailingError, MissingPackageError):
        raise
    except Exception as error:
        if isinstance(error, OWN):
            raise
        status = status_of(error)
        if status is not None and status not in GONE:
            raise Rejected(f"image refused, HTTP status {status}", f"{url}: {describe(error)}") from error
        local = url.startswith(("file:", "local:"))
        absent = status is not None or isinstance(error, FileNotFoundError)
        raise Rejected("image gone" if absent and not local else "image missing", url) from error


def _request(url: str) -> bytes:
    filesystem, name = filesystem_of(url)
    data: bytes = filesystem.cat_file(name)
    return data
