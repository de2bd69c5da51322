"""What an importer reads: numbered rows, each of which becomes a pair or is left out for a reason."""

import errno
import io
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from PIL import Image

from lit_align.data.shards.storage import PIPE, open_binary
from lit_align.data.shards.writer import NewPair

ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")  # in memory: another one each time
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError)  # the last: a name with a null in it


class Rejected(ValueError):
    """Why a row is no pair: a reason that others share, and what is particular to it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Reject(NamedTuple):
    """A row that was left out."""

    row: int  # in the source
    place: str  # for people: file and row in it
    key: str  # that the pair would have had
    reason: str
    detail: str


class Part(Protocol):
    """Rows that become one shard; it travels to the process that writes it."""

    @property
    def remote(self) -> bool:
        """Whether reading may fail now and work later."""

    def outcomes(self) -> Iterator[NewPair | Reject]:
        """One for each row, in order, the same every time."""


class Source(Protocol):
    """Rows 0 to `rows`."""

    @property
    def name(self) -> str:
        """That of the subcommand."""

    @property
    def rows(self) -> int: ...

    @property
    def bytes(self) -> int | None:
        """What shards of all rows would take, about; None where nobody knows."""

    def about(self) -> dict[str, Any]:
        """All that decides which pairs there are: `files`, and `options`; no folders, as data are moved."""

    def part(self, begin: int, end: int) -> Part: ...


def key_of(row: int) -> str:
    """The key of a row's pair: its place in the source, so that keys are in order and never there twice."""
    return f"{row:08d}"


def outcome(row: int, place: str, make: Callable[[str], NewPair]) -> NewPair | Reject:
    """The pair that `make` makes of the row's key, or why there is none."""
    key = key_of(row)
    try:
        return make(key)
    except Rejected as error:
        return Reject(row, clean(place), key, error.reason, clean(error.detail))


def new_pair(
    key: str, images: tuple[bytes, bytes], label_0: float, prompt: Any, more: dict[str, Any] | None
) -> NewPair:
    """A pair of images that have been looked at.

    Raises:
        Rejected: if the images are the same, or the prompt is no text; an empty one is.
    """
    if images[0] == images[1]:
        raise Rejected("both images are the same")
    return NewPair(key, *images, label_0, as_text(prompt), None if more is None else clean(more))


def as_text(prompt: Any) -> str:
    """The prompt.

    Raises:
        Rejected: if it is missing, no text, or text that UTF-8 cannot hold.
    """
    if prompt is None:
        raise Rejected("prompt missing")
    if not isinstance(prompt, str) or prompt != _encodable(prompt):
        raise Rejected("prompt is not text", ascii(prompt)[:200])
    return prompt


def clean(value: Any) -> Any:
    """The same as JSON can hold it: no NaN, no halves of surrogate pairs."""
    if isinstance(value, dict):
        return {_encodable(str(name)): clean(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [clean(one) for one in value]
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def label_of(label_0: Any, label_1: Any) -> float:
    """1 where image 0 is preferred, 0 where image 1 is, 0.5 for a tie.

    Raises:
        Rejected: if there is no label, or the two do not add up to 1.
    """
    values = [one_label(label_0), one_label(label_1)]
    if sum(values) != 1:
        raise Rejected("labels do not add up to 1", f"{values[0]:g} and {values[1]:g}")
    return values[0]


def one_label(value: Any) -> float:
    """A label, which may be written as text.

    Raises:
        Rejected: if there is none, or it is not 0, 0.5 or 1.
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


def checked_image(data: bytes | None) -> bytes:
    """An encoded image that can be decoded to its end.

    A header says nothing about a download that was cut off, and a run would find that out days later. So all of it is
    decoded, a JPEG at an eighth of its size, which reads all of its bytes and computes little.

    Raises:
        Rejected: if there is none, or it cannot be decoded.
    """
    if not data:
        raise Rejected("image missing")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
    except Exception as error:  # Pillow's plugins raise errors of any kind on damaged data
        words = ADDRESS.sub("it", f"{type(error).__name__}: {error}")
        raise Rejected("image cannot be decoded", words[:200]) from error
    return data


@lru_cache(maxsize=16)  # neighbouring pairs share images
def load_image(path: str) -> bytes:
    """An encoded image from its file or URL, read and looked at.

    Raises:
        Rejected: if there is no such file, or it cannot be decoded.
        OSError: if it is there and cannot be read now, which is no property of the pair.
    """
    if path.startswith(PIPE):
        raise Rejected("image is a command", path)
    if "\0" in path:
        raise Rejected("image missing", "a name with a null in it")
    try:
        with open_binary(path) as file:
            data = file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, NO_FILE) or getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise Rejected("image missing", path) from error
        raise
    try:
        return checked_image(data)
    except Rejected as error:
        raise Rejected(error.reason, f"{path}: {error.detail}" if error.detail else f"{path} is empty") from error
