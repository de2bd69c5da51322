"""Index of a folder of shards: labels, offsets, sizes and digests, so that a run starts without scanning them.

`00000.tar` has `00000.index.parquet` beside it, with one row per sample; `index.json` names all shards and has the
totals. The index of shards on the web or on a read-only disk lies in another folder and has their full names.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lit_align.common.files import atomic_path, write_text
from lit_align.data.decoder import ImageError, check_header, upright_size
from lit_align.data.shards.filesystems import join, parent
from lit_align.data.shards.layout import RawPair, Sample, SampleError, parse_sample, read_samples
from lit_align.data.shards.storage import open_binary
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
        ("height_0", pa.int32()),  # pixels, upright; 0 if the header cannot be read
        ("width_0", pa.int32()),
        ("height_1", pa.int32()),
        ("width_1", pa.int32()),
        ("content", pa.string()),  # `content_digest`; empty if the images were not read
        ("fault", pa.string()),  # why the sample is not a pair; null for a pair
    ]
)
SIZES = ("height_0", "width_0", "height_1", "width_1")
HEADER_BYTES = 1 << 16  # of an image, enough to read its size


class ShardEntry(NamedTuple):
    """Entry of a shard in `index.json`."""

    name: str  # relative to the index, or the full path or URL
    bytes: int
    sha256: str
    samples: int
    pairs: int  # with a preference
    ties: int
    broken: int


def content_digest(pair: RawPair) -> str:
    """Digest of a pair's encoded images and prompt, 16 hexadecimal digits; detects stale scores and caches."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (pair.image_0, pair.image_1, pair.prompt.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def key_digest(key: str) -> int:
    """Digest of a sample's key, 64 bits."""
    return int(key_digests([key])[0])


def key_digests(keys: Sequence[str]) -> NDArray[np.uint64]:
    """Digests (keys,) of samples' keys."""
    digests = b"".join([hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def rows_path(shard: str, folder: str | None = None) -> str:
    """Path of a shard's index rows, in `folder` or beside the shard."""
    name = shard.rsplit("/", 1)[-1].removesuffix(".tar")
    return join(parent(shard) if folder is None else folder, f"{name}.index.parquet")


def scan_rows(shard: str, whole: bool, sizes: bool = False, timeout: float | None = None) -> pa.Table:
    """Read the index rows of a shard from the shard itself, one row per sample, broken ones included.

    Args:
        shard: local path or URL.
        whole: read everything, for digests; otherwise skip the images.
        sizes: read the headers of the images, for their sizes.
        timeout: seconds until a read is given up; None waits forever.

    Raises:
        SampleError: if the shard is missing, truncated or damaged.
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
    if sizes and not whole:
        row |= dict(zip(SIZES, (*upright_size(pair.image_0), *upright_size(pair.image_1)), strict=True))
    return row | _checked_sizes(pair) if whole else row


def _checked_sizes(pair: RawPair) -> dict[str, Any]:
    """Sizes of both images, or why one cannot train: the label of a broken sample counts for nothing."""
    sizes: list[int] = []
    for number, data in enumerate((pair.image_0, pair.image_1)):
        try:
            sizes += check_header(data)
        except ImageError as error:
            fault = f"{pair.location}: jpg_{number}: {error.reason}; {error.detail}"
            return {"fault": fault, "label_0": float("nan")}
    return dict(zip(SIZES, sizes, strict=True))


def parse_unique(sample: Sample, seen: bool) -> RawPair:
    """Parse a sample; raises SampleError if it is broken, or if the shard had its key before."""
    if seen:
        raise SampleError(f"{sample.location}: the shard has this key twice. Give each sample its own key.")
    return parse_sample(sample)


def index_shard(shard: str, folder: str | None = None) -> ShardEntry:
    """Read a whole shard and write its index rows, atomically.

    Raises:
        SampleError: if the shard is missing, truncated or damaged.
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
    """Read a shard's index rows from their file; the schema's metadata hold `bytes` and `sha256` of the shard.

    Raises:
        ValueError: if the file cannot be read, or is of another version.
    """
    try:
        with open_binary(path) as file:
            table = _read_columns(pq.ParquetFile(file), columns)
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


def _read_columns(file: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table:
    """Read a small file in this thread: `pq.read_table` takes twice the time."""
    wanted = list(columns or file.schema_arrow.names)
    if absent := set(wanted) - set(file.schema_arrow.names):
        raise pa.ArrowInvalid(f"it has no column {min(absent)}")
    return file.read(columns=wanted, use_threads=False)


def read_entry(shard: str, folder: str | None = None) -> ShardEntry | None:
    """Read a shard's entry from its index rows; None if they are not written yet."""
    path = rows_path(shard, folder)
    if not Path(path).is_file():
        return None
    table = read_rows(path, ["label_0"])
    about = table.schema.metadata
    labels = table["label_0"].to_numpy()
    broken, ties = int(np.isnan(labels).sum()), int((labels == 0.5).sum())
    name = shard if folder is not None else Path(shard).name
    counts = (len(labels), len(labels) - broken - ties, ties, broken)
    return ShardEntry(name, int(about[b"bytes"]), about[b"sha256"].decode(), *counts)


def write_index(folder: str, entries: Sequence[ShardEntry], origin: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `index.json` and return its content.

    Args:
        folder: of the index.
        entries: of shards whose index rows are written.
        origin: further items that record how the shards were made.
    """
    counts = ("bytes", "samples", "pairs", "ties", "broken")
    totals = {name: sum(getattr(entry, name) for entry in entries) for name in counts}
    index = {"format": FORMAT, "totals": totals, **(origin or {}), "shards": [entry._asdict() for entry in entries]}
    path, text = Path(folder) / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return index


def is_index(data: bytes) -> bool:
    """Whether the content of a JSON file is that of an `index.json`, of whatever version."""
    try:
        found = json.loads(data)
    except ValueError:
        return False
    return isinstance(found, dict) and {"format", "shards"} <= set(found)


def read_index(path: str) -> list[tuple[str, str]]:
    """Read the paths of the shards in an `index.json`, each with the path of its index rows.

    Raises:
        ValueError: if the file cannot be read, or is of another version.
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
