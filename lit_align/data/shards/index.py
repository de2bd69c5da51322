"""The index of a folder of shards: what a run would else have to read at its start, and what a shard must still be.

`00000.tar` has `00000.index.parquet` beside it, one row per sample; `index.json` has the totals and names all shards.
Where the shards lie elsewhere, on the web or a read-only disk, the index has a folder of its own and their full names.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lit_align.common.files import atomic_path, write_text
from lit_align.data.shards.layout import RawPair, Sample, SampleError, parse_sample, read_samples
from lit_align.data.shards.storage import join, open_binary, parent
from lit_align.user_errors import UserValueError

INDEX = "index.json"
FORMAT = 1
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # bytes
        ("size", pa.int64()),  # bytes, with headers
        ("label_0", pa.float32()),  # NaN where the sample is broken
        ("prompt", pa.string()),
        ("height_0", pa.int32()),  # pixels, upright; 0 where the header cannot be read
        ("width_0", pa.int32()),
        ("height_1", pa.int32()),
        ("width_1", pa.int32()),
        ("content", pa.string()),  # digest of both images and the prompt; empty where they were not read
        ("fault", pa.string()),  # why the sample is no pair; null where it is one
    ]
)
HEADER_BYTES = 1 << 16  # in which an image says its size


class ShardEntry(NamedTuple):
    """A shard in `index.json`."""

    name: str  # relative to the index, or in full
    bytes: int
    sha256: str
    samples: int
    pairs: int  # with a preference
    ties: int
    broken: int


def content_digest(pair: RawPair) -> str:
    """16 hexadecimal digits of a pair's encoded images and prompt: scores and caches belong to these and no other."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (pair.image_0, pair.image_1, pair.prompt.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def key_digest(key: str) -> int:
    """64 bits of a key: which sample was where."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def rows_path(shard: str, folder: str | None = None) -> str:
    """Where the rows of a shard are: in `folder`, or beside it."""
    name = shard.rsplit("/", 1)[-1].removesuffix(".tar")
    return join(parent(shard) if folder is None else folder, f"{name}.index.parquet")


def scan_rows(shard: str, whole: bool, sizes: bool = False, timeout: float | None = None) -> pa.Table:
    """The rows of a shard, one per sample, broken ones with the reason.

    Args:
        shard: local path or URL.
        whole: read all of it, for digests; else only what is not an image.
        sizes: read so much of the images that their sizes are known.
        timeout: seconds until a read is given up.

    Raises:
        SampleError: if the shard itself is missing, cut off or damaged.
    """
    rows: dict[str, list[Any]] = {name: [] for name in ROWS.names}
    seen: set[str] = set()
    for sample in read_samples(shard, None if whole else HEADER_BYTES if sizes else 0, timeout):
        for name, value in sample_row(sample, whole, whole or sizes, sample.key in seen).items():
            rows[name].append(value)
        seen.add(sample.key)
    return pa.table(rows, ROWS)


def sample_row(sample: Sample, whole: bool, sizes: bool, seen: bool) -> dict[str, Any]:
    """Make the index row of a sample; arguments as for `scan_rows`, `seen` for a key that the shard had before."""
    row: dict[str, Any] = {"key": sample.key, "offset": sample.offset, "size": sample.size, "label_0": float("nan")}
    row |= {"prompt": "", "content": "", "fault": None, **dict.fromkeys(SIZES, 0)}
    try:
        pair = parse_unique(sample, seen)
    except SampleError as error:
        return row | {"fault": str(error)}
    row |= {"label_0": pair.label_0, "prompt": pair.prompt, "content": content_digest(pair) if whole else ""}
    if sizes:
        row |= dict(zip(SIZES, (*upright_size(pair.image_0), *upright_size(pair.image_1)), strict=True))
    return row


def parse_unique(sample: Sample, seen: bool) -> RawPair:
    """Parse a sample; raises SampleError if it is broken, or if the shard had its key before."""
    if seen:
        raise SampleError(f"{sample.location}: the shard has this key twice. Give its samples keys of their own.")
    return parse_sample(sample)


SIZES = ("height_0", "width_0", "height_1", "width_1")


def upright_size(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded image as it is looked at, from its header; (0, 0) where there is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
    except Exception:  # on damaged files PIL raises errors of almost any kind
        return 0, 0
    return (width, height) if turned else (height, width)


def index_shard(shard: str, folder: str | None = None) -> ShardEntry:
    """Read a shard to its end and write its rows, atomically.

    Raises:
        SampleError: if the shard is missing, cut off or damaged.
    """
    table = scan_rows(shard, whole=True)
    about = {"format": str(FORMAT), **{name: str(value) for name, value in digest_shard(shard).items()}}
    path = Path(rows_path(shard, folder))
    with atomic_path(path) as part:
        pq.write_table(table.replace_schema_metadata(about), part, compression="zstd")
    entry = read_entry(shard, folder)
    assert entry is not None
    return entry


def digest_shard(shard: str) -> dict[str, int | str]:
    """Read a shard's size (`bytes`) and digest (`sha256`)."""
    digest, count = hashlib.sha256(), 0
    with open_binary(shard) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            count += len(block)
    return {"bytes": count, "sha256": digest.hexdigest()}


def read_rows(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a shard from its file, `bytes` and `sha256` of the shard in the schema's metadata.

    Raises:
        ValueError: if the file is not one of ours.
    """
    try:
        with open_binary(path) as file:
            table = pq.read_table(file, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserValueError(
            f"{path} cannot be read as an index: {error}. Delete it, and import the shards again."
        ) from error
    about = table.schema.metadata or {}
    if about.get(b"format") != str(FORMAT).encode():
        raise UserValueError(
            f"{path} is no index of this version of lit-align. Delete it, and import the shards again."
        )
    return table


def read_entry(shard: str, folder: str | None = None) -> ShardEntry | None:
    """The entry of a shard whose rows have been written; None where they have not."""
    path = rows_path(shard, folder)
    if not Path(path).is_file():
        return None
    table = read_rows(path, ["label_0"])
    about = table.schema.metadata
    labels = table["label_0"].to_numpy()
    broken, ties = int(np.isnan(labels).sum()), int((labels == 0.5).sum())
    name = shard if folder is not None else Path(shard).name
    return ShardEntry(
        name,
        int(about[b"bytes"]),
        about[b"sha256"].decode(),
        len(labels),
        len(labels) - broken - ties,
        ties,
        broken,
    )


def write_index(folder: str, entries: Sequence[ShardEntry], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `index.json` of shards whose rows are written, and return what it says; `more` says how it was made."""
    counts = ("bytes", "samples", "pairs", "ties", "broken")
    totals = {name: sum(getattr(entry, name) for entry in entries) for name in counts}
    index = {"format": FORMAT, "totals": totals, **(more or {}), "shards": [entry._asdict() for entry in entries]}
    path, text = Path(folder) / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return index


def read_index(path: str) -> list[tuple[str, str]]:
    """The shards that an `index.json` names, each with the file of its rows.

    Raises:
        ValueError: if it is not one of ours.
    """
    folder = parent(path)
    try:
        with open_binary(path) as file:
            index = json.loads(file.read())
        if index["format"] != FORMAT:
            raise KeyError(f"format {index['format']}")
        shards = [join(folder, entry["name"]) for entry in index["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserValueError(
            f"{path} is no index of this version of lit-align: {error!r}. Import the shards again."
        ) from error
    return [(shard, rows_path(shard, folder)) for shard in shards]
