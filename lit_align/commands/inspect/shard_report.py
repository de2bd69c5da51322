"""Inspect one shard: decode every image and keep one row of numbers per sample."""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import pyarrow as pa

from lit_align.commands.inspect.index_check import IndexCheck
from lit_align.common.captions import is_surely_cut
from lit_align.data.decoder import decode
from lit_align.data.shards.index import ShardEntry, parse_unique
from lit_align.data.shards.layout import RawPair, Sample, SampleError, parse_bytes, parse_sample, read_samples
from lit_align.data.shards.storage import read_range, size

# About 110 bytes per sample: 1,000,000 pairs (about 300 GB of images) take 110 MB.
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # bytes
        ("size", pa.int64()),  # bytes
        ("label_0", pa.float32()),  # 0 where the sample is broken
        ("height_0", pa.int32()),  # pixels, upright
        ("width_0", pa.int32()),
        ("height_1", pa.int32()),
        ("width_1", pa.int32()),
        ("image_0", pa.uint64()),  # digests
        ("image_1", pa.uint64()),
        ("prompt", pa.uint64()),
        ("cut", pa.uint8()),  # 1 where the prompt is surely longer than CLIP reads
        ("image_bytes", pa.int64()),  # of both, encoded
        ("draw", pa.uint64()),  # random number: the contact sheet shows the pairs with the smallest ones
        ("fault", pa.string()),  # why the sample is not a valid pair; null if it is
    ]
)


class ShardToInspect(NamedTuple):
    """A shard to inspect, with its index if there is one."""

    number: int  # position among all shards
    shard: str  # path or URL
    rows: str  # path or URL of its parquet index
    entry: ShardEntry | None  # its entry in `index.json`; None for a shard named directly


class ShardReport(NamedTuple):
    """Result of inspecting a shard."""

    shard: str
    bytes: int  # 0 where unknown
    rows: pa.Table
    fault: str | None  # why it could not be read to its end; None if it was
    indexed: bool
    differences: list[str]  # between the shard and its index


def inspect_shard(job: ShardToInspect, seed: int, advance: Callable[[int], None]) -> ShardReport:
    """Read a shard to its end, and compare it with its index if there is one.

    Args:
        job: shard to inspect.
        seed: seed for the choice of pairs on the contact sheet.
        advance: called with the number of bytes just read.
    """
    rows: dict[str, list[Any]] = {name: [] for name in ROWS.names}
    check = IndexCheck.open(job.shard, job.rows, job.entry)
    fault = None
    seen: set[str] = set()
    try:
        for sample in read_samples(job.shard):
            if check is not None:
                check.add(sample, sample.key in seen)
            row = _row(sample, sample.key in seen)
            row["draw"] = digest(f"{seed} {job.number} {sample.key}".encode())
            for name, value in row.items():
                rows[name].append(value)
            seen.add(sample.key)
            advance(sample.size)
    except SampleError as error:
        fault = str(error)
    differences = [] if check is None else check.finish(fault is None)
    count = _size(job.shard)
    advance(max(0, count - sum(rows["size"])))  # the tar file's end, and what could not be read
    return ShardReport(job.shard, count, pa.table(rows, ROWS), fault, check is not None, differences)


def _row(sample: Sample, seen: bool) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(ROWS.names, 0)
    row |= {"key": sample.key, "offset": sample.offset, "size": sample.size}
    try:
        pair = parse_unique(sample, seen)
    except SampleError as error:
        return row | {"fault": str(error)}
    for number, data in enumerate((pair.image_0, pair.image_1)):
        try:
            width, height = decode(data).size
        except Exception as error:  # PIL raises many kinds of errors for damaged files
            return row | {"fault": f"{pair.location}: jpg_{number} cannot be decoded: {error}"}
        row |= {f"height_{number}": height, f"width_{number}": width, f"image_{number}": digest(data)}
    row |= {
        "label_0": pair.label_0,
        "prompt": digest(pair.prompt.encode()),
        "fault": None,
        "cut": int(is_surely_cut(pair.prompt)),
    }
    return row | {"image_bytes": len(pair.image_0) + len(pair.image_1)}


def digest(data: bytes) -> int:
    """Digest `data` to 64 bits: among 2,000,000 different images a collision has a probability of 1e-7."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _size(shard: str) -> int:
    try:
        return size(shard) or 0
    except OSError:
        return 0


def read_pairs(reports: list[ShardReport], locations: list[tuple[int, int]]) -> Iterator[RawPair]:
    """Read inspected pairs again from their shards.

    Args:
        reports: reports of all shards.
        locations: shard number and row number of each pair.

    Raises:
        SampleError: if a shard has changed since it was inspected.
    """
    for number, row in locations:
        shard, rows = reports[number].shard, reports[number].rows
        offset, count = rows["offset"][row].as_py(), rows["size"][row].as_py()
        yield parse_sample(parse_bytes(shard, read_range(shard, offset, count)))
