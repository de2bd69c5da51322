"""Which shards there are, and which pairs of each one train."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from lit_align.data.labels.stored import HumanLabels, Labels, stale
from lit_align.data.shards.index import ROWS, SIZES, key_digest, look_through, read_index, read_rows, rows_file
from lit_align.data.shards.layout import SampleError
from lit_align.data.shards.storage import exists, expand, size
from lit_align.user_errors import UserValueError

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
COLUMNS = ["key", "offset", "size", "label_0", "content", "fault"]


class ShardFile(NamedTuple):
    """A tar file and its rows in an index, where there is one."""

    path: str  # or URL
    rows: str | None


class Pairs(NamedTuple):
    """The pairs of a shard that train, in the tar's order."""

    row: NDArray[np.int32]  # (pairs,) the sample's number among all samples of the shard
    offset: NDArray[np.int64]  # (pairs,) bytes
    size: NDArray[np.int64]  # (pairs,) bytes
    sign: NDArray[np.int8]  # (pairs,) +1: image 0 is chosen, -1: image 1 is, 0: somebody further on decides
    human: NDArray[np.int8]  # (pairs,) the human label in the same way; 0 is a tie
    strength: NDArray[np.float32]  # (pairs,) of the vote
    content: NDArray[np.uint64]  # (pairs,) digest of images and prompt, see `content_digest`; 0 where unknown
    key: NDArray[np.uint64]  # (pairs,) digest of the key
    sizes: NDArray[np.int32]  # (pairs, 4) height and width of image 0 and of image 1, pixels; 0 where not asked for


@dataclass(frozen=True, eq=False)
class Shard:
    """A tar file and what a look at its labels found."""

    path: str
    pairs: Pairs
    ties: int = 0  # left out because nobody decided them
    broken: tuple[str, ...] = ()  # why samples, or all of the shard, were left out
    contested: int = 0  # of the pairs, those that a tie rule decided
    disputed: int = 0  # of the pairs, those whose vote contradicts the human label
    content_known_from: Literal["index", "scores", ""] = ""

    def __len__(self) -> int:
        return len(self.pairs.row)


def find(patterns: str | Sequence[str], allow_pipe: bool = False, must_exist: bool = True) -> list[ShardFile]:
    """Shards from paths and URLs, with braces and wildcards, and from the `index.json` of an import.

    Raises:
        FileNotFoundError: if a pattern matches nothing.
        ValueError: if an index is not one of ours, or a shard is named twice.
    """
    with ThreadPoolExecutor(16) as pool:
        paths = expand(patterns, allow_pipe, must_exist)
        found = [file for files in pool.map(partial(_find, allow_pipe), paths) for file in files]
    paths = [file.path for file in found]
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise UserValueError(f"{twice} is named twice; its pairs would train twice as often. Name each shard once.")
    return found


def _find(allow_pipe: bool, path: str) -> list[ShardFile]:
    if path.endswith(".json"):
        listed = read_index(path)
        expand([shard for shard, _ in listed if shard.startswith("pipe:")], allow_pipe)
        return [ShardFile(shard, rows) for shard, rows in listed]
    rows = None if path.startswith("pipe:") else rows_file(path)
    return [ShardFile(path, rows if rows is not None and exists(rows) else None)]


def scan(
    files: Iterable[ShardFile],
    labels: Labels,
    on_error: OnError = "raise",
    sizes: bool = False,
    timeout: float | None = None,
    threads: int = 8,
    cached: bool = False,
) -> list[Shard]:
    """Look at the labels of all shards: in their index, or in the shards themselves, whose images are skipped.

    Args:
        files: from `find`.
        labels: decide which image is chosen.
        on_error: `raise` on the first broken sample or shard, or `skip` and count them.
        sizes: whether the images' sizes are wanted.
        timeout: seconds until a shard that does not answer is given up.
        threads: shards that are looked at, at a time.
        cached: the shards themselves will not be read, and need not be there.

    Raises:
        SampleError: on the first broken sample, if `on_error` is `raise`.
    """
    files = list(files)
    with ThreadPoolExecutor(threads) as pool:
        scanned = pool.map(lambda file: _scan(file, labels, on_error, sizes, timeout, cached), files)
        few = len(files) < 20
        return list(tqdm(scanned, total=len(files), desc="reading labels", unit="shard", disable=few or None))


def _scan(
    file: ShardFile, labels: Labels, on_error: OnError, sizes: bool, timeout: float | None, cached: bool
) -> Shard:
    try:
        if file.rows is None:
            rows = look_through(file.path, whole=False, sizes=sizes, timeout=timeout)
        else:
            rows = _indexed(file, sizes, timeout, cached)
    except SampleError as error:
        if on_error == "raise":
            raise
        log.warning("Skipped a whole shard: %s", error)
        return replace(_decide(file, ROWS.empty_table(), HumanLabels(), on_error), broken=(str(error),))
    return _decide(file, rows, labels, on_error, sizes)


def _indexed(file: ShardFile, sizes: bool, timeout: float | None, cached: bool) -> pa.Table:
    """A shard's rows from its index.

    Raises:
        SampleError: if the shard is not what the index knows.
    """
    assert file.rows is not None
    rows = read_rows(file.rows, [*COLUMNS, *(SIZES if sizes else ())])
    if cached:
        return rows
    known = int(rows.schema.metadata[b"bytes"])
    try:
        found = size(file.path, timeout)
    except OSError as error:
        raise SampleError(f"shard {file.path} cannot be read: {error}. Restore the file or leave it out.") from error
    if found is not None and found != known:
        raise SampleError(
            f"shard {file.path} has {found} bytes, and its index {file.rows} knows {known}: it has changed. "
            "Restore it, or delete the index and import the shards again."
        )
    return rows


def _decide(file: ShardFile, rows: pa.Table, labels: Labels, on_error: OnError, sizes: bool = False) -> Shard:
    keys: list[str] = rows["key"].to_pylist()
    known: list[str] = rows["content"].to_pylist()
    label_0 = rows["label_0"].to_numpy()
    human = np.nan_to_num(np.round(2 * label_0 - 1)).astype(np.int8)
    decided = labels.decide(file.path, keys, human)
    faults = dict(decided.faults)
    for number, (here, there) in enumerate(zip(known, decided.contents, strict=True)):
        if here and there and here != there:
            faults.setdefault(number, stale(f"shard {file.path}, key {keys[number]}"))
    if sizes:
        for number in np.flatnonzero((_sizes(rows) == 0).any(1)).tolist():
            faults[number] = f"shard {file.path}, key {keys[number]}: the size of an image cannot be read."
    faults |= {number: fault for number, fault in enumerate(rows["fault"].to_pylist()) if fault is not None}
    if faults and on_error == "raise":
        raise SampleError(faults[min(faults)])
    for number in sorted(faults):
        log.warning("Skipped: %s", faults[number])
    whole = np.array([number not in faults for number in range(len(keys))], dtype=bool)
    kept = np.flatnonzero(whole & ((decided.sign != 0) | labels.keep_undecided))
    contents = known if any(known) else decided.contents
    pairs = Pairs(
        row=kept.astype(np.int32),
        offset=rows["offset"].to_numpy()[kept],
        size=rows["size"].to_numpy()[kept],
        sign=decided.sign[kept],
        human=human[kept],
        strength=decided.strength[kept],
        content=np.array([int(contents[number] or "0", 16) for number in kept], dtype=np.uint64),
        key=np.array([key_digest(keys[number]) for number in kept], dtype=np.uint64),
        sizes=_sizes(rows)[kept],
    )
    return Shard(
        file.path,
        pairs,
        ties=int(whole.sum()) - len(kept),
        broken=tuple(faults[number] for number in sorted(faults)),
        contested=int((pairs.strength == 0).sum()) if labels.voted else 0,
        disputed=int((pairs.sign * pairs.human < 0).sum()),
        content_known_from="index" if any(known) else "scores" if any(contents) else "",
    )


def _sizes(rows: pa.Table) -> NDArray[np.int32]:
    if SIZES[0] not in rows.column_names:
        return np.zeros((len(rows), 4), np.int32)
    return np.stack([rows[name].to_numpy() for name in SIZES], 1)
