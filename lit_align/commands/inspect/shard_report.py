"""What one shard holds, every image decoded: a row of numbers per sample, which is all that is kept of it."""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import pyarrow as pa

from lit_align.commands.inspect.index_check import IndexCheck
from lit_align.data.images import decode
from lit_align.data.shards.index import ShardEntry
from lit_align.data.shards.layout import RawPair, Sample, SampleError, parse_bytes, parse_sample, read_samples
from lit_align.data.shards.storage import read_range, size

# About 110 bytes a sample: 1,000,000 pairs, which are some 300 GB of images, need 110 MB.
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
        ("image_bytes", pa.int64()),  # of both, encoded
        ("draw", pa.uint64()),  # the pairs with the smallest ones are on the contact sheet
        ("fault", pa.string()),  # why the sample is no pair; null where it is one
    ]
)


class Task(NamedTuple):
    """A shard to look at."""

    number: int  # of the shard among all
    shard: str
    rows: str  # file of its index
    entry: ShardEntry | None  # what `index.json` says of it; None where it was not named by one


class Look(NamedTuple):
    """What was found in a shard."""

    shard: str
    bytes: int  # 0 where it is not known
    rows: pa.Table
    fault: str | None  # why it could not be read to its end
    indexed: bool
    differences: list[str]  # between the shard and its index


def look_at(task: Task, seed: int, advance: Callable[[int], None]) -> Look:
    """Read a shard to its end, and compare it with its index if there is one.

    Args:
        task: the shard.
        seed: of the draw for the contact sheet.
        advance: is told bytes as they are done.
    """
    rows: dict[str, list[Any]] = {name: [] for name in ROWS.names}
    check = IndexCheck.open(task.shard, task.rows, task.entry)
    fault = None
    seen: set[str] = set()
    try:
        for sample in read_samples(task.shard):
            pair, reason = _parse(sample, sample.key in seen)
            seen.add(sample.key)
            if check is not None:
                check.see(sample, pair)
            row = _row(sample, pair, reason)
            row["draw"] = digest(f"{seed} {task.number} {sample.key}".encode())
            for name, value in row.items():
                rows[name].append(value)
            advance(sample.size)
    except SampleError as error:
        fault = str(error)
    differences = [] if check is None else check.finish(fault is None)
    count = _size(task.shard)
    advance(max(0, count - sum(rows["size"])))  # the end of a tar file, or what could not be read
    return Look(task.shard, count, pa.table(rows, ROWS), fault, check is not None, differences)


def _parse(sample: Sample, seen: bool) -> tuple[RawPair | None, str]:
    try:
        if seen:
            raise SampleError(f"{sample.location}: the shard has this key twice. Give its samples keys of their own.")
        return parse_sample(sample), ""
    except SampleError as error:
        return None, str(error)


def _row(sample: Sample, pair: RawPair | None, reason: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(ROWS.names, 0)
    row |= {"key": sample.key, "offset": sample.offset, "size": sample.size, "fault": reason}
    if pair is None:
        return row
    for number, data in enumerate((pair.image_0, pair.image_1)):
        try:
            width, height = decode(data).size
        except Exception as error:  # PIL raises errors of many kinds where a file is damaged
            return row | {"fault": f"{pair.location}: jpg_{number} cannot be decoded: {error}"}
        row |= {f"height_{number}": height, f"width_{number}": width, f"image_{number}": digest(data)}
    row |= {"label_0": pair.label_0, "prompt": digest(pair.prompt.encode()), "fault": None}
    return row | {"image_bytes": len(pair.image_0) + len(pair.image_1)}


def digest(data: bytes) -> int:
    """64 bits: among 2,000,000 images two different ones coincide with a chance of 1e-7."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _size(shard: str) -> int:
    try:
        return size(shard) or 0
    except OSError:
        return 0


def read_pairs(looks: list[Look], places: list[tuple[int, int]]) -> Iterator[RawPair]:
    """Pairs that have been looked at, read again from their shards.

    Args:
        looks: of all shards.
        places: number of the shard, and number of the row in it.

    Raises:
        SampleError: if a shard has changed in the meantime.
    """
    for number, row in places:
        look = looks[number]
        offset, count = (look.rows[name][row].as_py() for name in ("offset", "size"))
        yield parse_sample(parse_bytes(look.shard, read_range(look.shard, offset, count)))
