"""Decide which pairs of each shard train."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lit_align.common.progress import BRIEF, track
from lit_align.data.labels.stored import Decisions, HumanLabels, Labels, stale
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.index import ROWS, SIZES, key_digests, read_rows
from lit_align.data.shards.kept_scans import labels_of
from lit_align.data.shards.layout import SampleError
from lit_align.data.shards.listing import ShardFile
from lit_align.data.shards.storage import size

COLUMNS = ["key", "offset", "size", "label_0", "content", "fault"]


class Pairs(NamedTuple):
    """The pairs of a shard that train, in the tar file's order."""

    row: NDArray[np.int32]  # (pairs,) the sample's position among all samples of the shard
    offset: NDArray[np.int64]  # (pairs,) bytes
    size: NDArray[np.int64]  # (pairs,) bytes
    sign: NDArray[np.int8]  # (pairs,) +1: image 0 is chosen, -1: image 1 is, 0: a live vote decides
    human: NDArray[np.int8]  # (pairs,) the human label: +1: image 0 is preferred, -1: image 1 is, 0: a tie
    vote_share: NDArray[np.float32]  # (pairs,) of the vote
    balance: NDArray[np.float32]  # (pairs,) of the vote
    content: NDArray[np.uint64]  # (pairs,) `content_digest` of images and prompt; 0 where unknown
    key: NDArray[np.uint64]  # (pairs,) `key_digest` of the key
    sizes: NDArray[np.int32]  # (pairs, 4) height and width of image 0 and of image 1, pixels; 0 if not requested


@dataclass(frozen=True, eq=False)
class Shard:
    """A tar file, its pairs and what was left out."""

    path: str
    pairs: Pairs
    ties: int = 0  # left out because they are undecided
    broken: tuple[str, ...] = ()  # reasons why samples, or the whole shard, were left out
    contested: int = 0  # pairs that a tie rule decided
    disputed: int = 0  # pairs whose vote contradicts the human label
    content_known_from: Literal["index", "scores", ""] = ""
    prompts: str = ""  # digest of all prompts; empty where they were not read

    def __len__(self) -> int:
        return len(self.pairs.row)


def scan_shards(
    files: Iterable[ShardFile],
    labels: Labels,
    options: ReadOptions,
    sizes: bool = False,
    cached: bool = False,
    threads: int = 8,
) -> list[Shard]:
    """Read the labels of all shards, from their index or else from the shards, whose images are skipped.

    Args:
        files: from `find_shards`.
        labels: decide which image is chosen.
        options: what to do with broken samples and slow reads.
        sizes: also read the sizes of the images.
        cached: do not check that the shards exist and fit their index, for a cache replaces them.
        threads: number of shards to read at a time.

    Raises:
        SampleError: on the first broken sample, if `options.on_error` is `raise`.
    """
    files = list(files)
    scan = _Scan(labels, options, sizes, cached)
    with ThreadPoolExecutor(threads) as pool:
        return list(track(pool.map(scan, files), len(files), "reading labels", "shard", delay=BRIEF))


@dataclass(frozen=True)
class _Scan:
    """Scans one shard with the arguments of `scan_shards`."""

    labels: Labels
    options: ReadOptions
    sizes: bool
    cached: bool

    def __call__(self, file: ShardFile) -> Shard:
        try:
            rows = self._rows(file)
        except SampleError as error:
            self.options.skip_or_raise(error)
            empty = self._shard(file, ROWS.empty_table(), HumanLabels())
            return replace(empty, broken=(str(error),))
        return self._shard(file, rows, self.labels)

    def _rows(self, file: ShardFile) -> pa.Table:
        if file.rows is None:
            return labels_of(file.path, self.sizes, self.options.timeout)
        rows = read_rows(file.rows, [*COLUMNS, *(SIZES if self.sizes else ())])
        if not self.cached:
            _check_bytes(file, int(rows.schema.metadata[b"bytes"]), self.options.timeout)
        return rows

    def _shard(self, file: ShardFile, rows: pa.Table, labels: Labels) -> Shard:
        keys, known = rows["key"].to_pylist(), rows["content"].to_pylist()
        human = np.nan_to_num(np.round(2 * rows["label_0"].to_numpy() - 1)).astype(np.int8)
        decided = labels.decide(file.path, keys, human)
        faults = self._faults(file, rows, keys, known, decided)
        for number in sorted(faults):
            self.options.skip_or_raise(SampleError(faults[number]))
        whole = np.ones(len(keys), dtype=bool)
        whole[list(faults)] = False
        kept = np.flatnonzero(whole & ((decided.sign != 0) | labels.keep_undecided))
        contents = known if any(known) else decided.contents
        pairs = _pairs(rows, kept, human, decided, contents, keys)
        return Shard(
            file.path,
            pairs,
            ties=int(whole.sum()) - len(kept),
            broken=tuple(faults[number] for number in sorted(faults)),
            contested=int((pairs.vote_share == 0).sum()) if labels.voted else 0,
            disputed=int((pairs.sign * pairs.human < 0).sum()),
            content_known_from="index" if any(known) else "scores" if any(contents) else "",
            prompts=_prompts_digest(rows) if "prompt" in rows.column_names else "",
        )

    def _faults(
        self, file: ShardFile, rows: pa.Table, keys: list[str], known: list[str], decided: Decisions
    ) -> dict[int, str]:
        """Why samples cannot train, by their position; a fault of the sample itself overrides the others."""
        faults = dict(decided.faults)
        if known != decided.contents:
            for number, (indexed, scored) in enumerate(zip(known, decided.contents, strict=True)):
                if indexed and scored and indexed != scored:
                    faults.setdefault(number, stale(f"shard {file.path}, key {keys[number]}"))
        if self.sizes:
            for number in np.flatnonzero((_sizes(rows) == 0).any(1)).tolist():
                faults[number] = f"shard {file.path}, key {keys[number]}: the size of an image cannot be read."
        if rows["fault"].null_count == len(rows):
            return faults
        return faults | {number: fault for number, fault in enumerate(rows["fault"].to_pylist()) if fault is not None}


def _prompts_digest(rows: pa.Table) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for prompt in rows["prompt"].to_pylist():
        digest.update(len(prompt).to_bytes(8, "big") + prompt.encode())
    return digest.hexdigest()


def _check_bytes(file: ShardFile, indexed: int, timeout: float | None) -> None:
    """Refuse a shard of another size than its index names."""
    try:
        found = size(file.path, timeout)
    except OSError as error:
        raise SampleError(f"shard {file.path} cannot be read: {error}. Restore the file or leave it out.") from error
    if found is not None and found != indexed:
        raise SampleError(
            f"shard {file.path} has {found} bytes, and its index {file.rows} knows {indexed}: it has changed. "
            "Restore it, or delete the index and import the shards again."
        )


def _pairs(
    rows: pa.Table,
    kept: NDArray[np.intp],
    human: NDArray[np.int8],
    decided: Decisions,
    contents: list[str],
    keys: list[str],
) -> Pairs:
    numbers = kept.tolist()
    return Pairs(
        row=kept.astype(np.int32),
        offset=rows["offset"].to_numpy()[kept],
        size=rows["size"].to_numpy()[kept],
        sign=decided.sign[kept],
        human=human[kept],
        vote_share=_kept(decided.vote_share, kept),
        balance=_kept(decided.balance, kept),
        content=_parsed([contents[number] for number in numbers]),
        key=key_digests([keys[number] for number in numbers]),
        sizes=_sizes(rows)[kept] if SIZES[0] in rows.column_names else np.broadcast_to(np.int32(0), (len(kept), 4)),
    )


def _kept(column: NDArray[np.float32], kept: NDArray[np.intp]) -> NDArray[np.float32]:
    """Take some rows of a column; one number for all rows, as without a vote, stays one number in memory."""
    return column[kept] if any(column.strides) else np.broadcast_to(column[:1], len(kept))


def _parsed(digests: list[str]) -> NDArray[np.uint64]:
    """Parse `content_digest`s of 16 hexadecimal digits; an empty one is 0."""
    digits = "".join(digests)
    if len(digits) == 16 * len(digests) and "" not in digests:
        return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)
    return np.array([int(digest or "0", 16) for digest in digests], dtype=np.uint64)


def _sizes(rows: pa.Table) -> NDArray[np.int32]:
    return np.stack([rows[name].to_numpy() for name in SIZES], 1)
