"""The batches of one epoch over all ranks, from any of them on, made as they are asked for.

Blocks of some whole shuffle windows are shuffled and cut one after the other. Where an iteration begins at a later
batch, counting the buckets of the pairs before it tells the block in which it is filled; of the blocks before that one
only those are shuffled whose pairs still wait for a full batch.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096  # pairs of a block, or a few more: a multiple of the window
Cut = tuple[list[int], int]  # positions of a batch's pairs in the dataset, and their bucket


@dataclass(frozen=True, eq=False)
class Epoch:
    """One epoch's sequence of pairs, cut into batches.

    Args:
        firsts: (shards + 1,) position of each shard's first pair in the dataset, and last the number of pairs.
        buckets: (pairs,) bucket of each pair.
        bucket_count: number of buckets.
        batch_size: pairs.
        shuffle_window: pairs; 0 keeps the files' order and all pairs, for validation.
        seed: of the order.
        number: of the epoch, from 0.
    """

    firsts: NDArray[np.int64]
    buckets: NDArray[np.uint8]
    bucket_count: int
    batch_size: int
    shuffle_window: int
    seed: int
    number: int

    @cached_property
    def _shards(self) -> NDArray[np.int64]:
        """(shards,) numbers of the shards in the order of the epoch."""
        shards = list(range(len(self.firsts) - 1))
        if self.shuffle_window:
            random.Random(f"{self.seed}/{self.number}").shuffle(shards)
        return np.array(shards, np.int64)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """(shards,) position in the sequence behind each shard's last pair."""
        return np.cumsum(np.diff(self.firsts)[self._shards])

    @property
    def _block(self) -> int:
        """Pairs of a block."""
        window = self.shuffle_window or 1
        return window * -(-BLOCK // window)

    @cached_property
    def _starts(self) -> range:
        """Position in the sequence of each block's first pair."""
        return range(0, int(self.firsts[-1]), self._block)

    def _unshuffled(self, start: int, end: int) -> NDArray[np.int64]:
        """Positions in the dataset (pairs,) of the sequence from `start` to `end`, before windows are shuffled."""
        end = min(end, int(self.firsts[-1]))
        first, last = np.searchsorted(self._ends, [start, end - 1], side="right")
        found = [np.arange(*self.firsts[shard : shard + 2]) for shard in self._shards[first : last + 1]]
        skipped = start - int(self._ends[first - 1] if first else 0)
        return np.concatenate(found)[skipped : skipped + end - start]

    def _numbers(self, start: int) -> list[int]:
        """Positions in the dataset of a block's pairs, in the order of the epoch."""
        numbers: list[int] = self._unshuffled(start, start + self._block).tolist()
        if not self.shuffle_window:
            return numbers
        shuffled: list[int] = []
        for begin in range(0, len(numbers), self.shuffle_window):
            window = numbers[begin : begin + self.shuffle_window]
            random.Random(f"{self.seed}/{self.number}/{start + begin}").shuffle(window)
            shuffled += window
        return shuffled

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        """(blocks, buckets) number of pairs."""
        if self.bucket_count == 1:
            return np.diff([*self._starts, int(self.firsts[-1])])[:, None]
        blocks = (self.buckets[self._unshuffled(start, start + self._block)] for start in self._starts)
        return np.array([np.bincount(block, minlength=self.bucket_count) for block in blocks])

    def batches(self, begin: int) -> Iterator[Cut]:
        """Yield all batches from number `begin` on, full ones in the order in which they fill up.

        In validation, partial ones follow; otherwise pairs that are left over are dropped.
        """
        block, filled, waiting = self._before(begin) if begin else (0, 0, [[] for _ in range(self.bucket_count)])
        yield from islice(self._cut(self._starts[block:], waiting), begin - filled, None)

    def _before(self, begin: int) -> tuple[int, int, list[list[int]]]:
        """The block that fills batch `begin`, the batches that are full before it, and the pairs that wait there."""
        pairs = np.cumsum(self._counts, 0)
        filled = (pairs // self.batch_size).sum(1)
        block = int(np.searchsorted(filled, begin, side="right"))
        if block == 0:
            return 0, 0, [[] for _ in range(self.bucket_count)]
        left = pairs[block - 1] % self.batch_size
        return block, int(filled[block - 1]), self._waiting(block, left.tolist())

    def _waiting(self, block: int, left: Sequence[int]) -> list[list[int]]:
        """The last `left` pairs of each bucket in front of a block."""
        waiting: list[list[int]] = [[] for _ in left]
        while any(len(pairs) < count for pairs, count in zip(waiting, left, strict=True)):
            block -= 1
            wanted = {n for n, count in enumerate(left) if len(waiting[n]) < count and self._counts[block, n]}
            if not wanted:
                continue
            numbers = self._numbers(self._starts[block])
            buckets = self.buckets[numbers].tolist()
            for bucket in wanted:
                found = [number for number, other in zip(numbers, buckets, strict=True) if other == bucket]
                waiting[bucket] = (found + waiting[bucket])[-left[bucket] :]
        return waiting

    def _cut(self, starts: Sequence[int], waiting: list[list[int]]) -> Iterator[Cut]:
        """Yield the batches of blocks; `waiting` holds the pairs of each bucket that are left of those before."""
        for start in starts:
            numbers = self._numbers(start)
            for number, bucket in zip(numbers, self.buckets[numbers].tolist(), strict=True):
                waiting[bucket].append(number)
                if len(waiting[bucket]) == self.batch_size:
                    yield waiting[bucket], bucket
                    waiting[bucket] = []
        if not self.shuffle_window:
            yield from ((rest, bucket) for bucket, rest in enumerate(waiting) if rest)
