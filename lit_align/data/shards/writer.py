"""Write shards, atomically and with reproducible bytes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import TarWriter

from lit_align.common.files import atomic_path


class NewPair(NamedTuple):
    """A pair to write."""

    key: str  # unique in the shard, without dots and slashes
    image_0: bytes  # encoded
    image_1: bytes
    label_0: float  # 1 where image 0 is preferred, 0 where image 1 is, 0.5 for a tie
    prompt: str
    more: dict[str, Any] | None = None  # further facts about the pair, stored as JSON


def image_suffix(data: bytes) -> str:
    """Detect the format of an encoded image: `jpg`, `png`, `webp`, `gif`, `avif`, or `bin` if unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    starts = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif"}
    return next((suffix for start, suffix in starts.items() if data.startswith(start)), "bin")


def write_shard(path: Path, pairs: Iterable[NewPair]) -> int:
    """Write a shard, see `layout`, and return its number of pairs; if `pairs` raises, no shard is written."""
    count = 0
    with (
        atomic_path(path) as part,
        part.open("wb") as file,
        TarWriter(file, encoder=False, compress=False, mtime=0) as shard,
    ):
        for pair in pairs:
            shard.write(_fields(pair))
            count += 1
    return count


def _fields(pair: NewPair) -> dict[str, Any]:
    assert not set("./") & set(pair.key), pair.key
    fields = {
        "__key__": pair.key,
        f"jpg_0.{image_suffix(pair.image_0)}": pair.image_0,
        f"jpg_1.{image_suffix(pair.image_1)}": pair.image_1,
        "label_0.txt": f"{pair.label_0:g}".encode(),
        "label_1.txt": f"{1 - pair.label_0:g}".encode(),
        "caption.txt": pair.prompt.encode(),
    }
    if pair.more is not None:
        fields["json"] = json.dumps(pair.more, ensure_ascii=False, default=str).encode()
    return fields
