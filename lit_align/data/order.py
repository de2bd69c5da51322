"""The order of the pairs: a function of (seed, epoch, world size, rank, n) and the list of shards.

1. An epoch permutes the shards; laid end to end they are one sequence of pairs, the same on all ranks.
2. The sequence is shuffled in windows, each on its own, so that a run reads in few places at a time.
3. It is cut into batches. With buckets, a batch is of one shape: pairs wait until their bucket has a whole batch.
4. Each rank takes one contiguous slice of the batches, all ranks equally many.

What is left over sits this epoch out: without buckets fewer pairs than world size x batch size at the end of the
sequence; with buckets up to a batch less one pair of each bucket, and fewer batches than ranks. Validation leaves out
nothing and shuffles nothing; its last batches may be smaller, and ranks may differ by a batch.

The number of workers is not part of it: they take the batches in turns.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_align.data.buckets import Shape, assign_buckets
from lit_align.data.shards.scan import Shard

RULE = 2  # changes when the order does


class Batch(NamedTuple):
    """Which pairs make a batch."""

    epoch: int
    numbers: list[int]  # of the pairs in the data set
    shape: Shape  # pixels


@dataclass(frozen=True)
class Order:
    """Everything but the epoch that decides which pair comes when."""

    shards: tuple[Shard, ...]
    batch_size: int  # pairs
    shapes: tuple[Shape, ...]  # of the buckets; one where there are none
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle_window: int = 0  # pairs; 0 keeps the order of the files, and every pair
    labels: str = "the human label"  # what decides which image is chosen

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """(shards + 1,) the number of each shard's first pair in the data set, and of all pairs."""
        return np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])]).astype(np.int64)

    @property
    def pairs(self) -> int:
        """Pairs of the data set."""
        return int(self.firsts[-1])

    @cached_property
    def buckets(self) -> NDArray[np.int64]:
        """(pairs,) the bucket of each pair."""
        if len(self.shapes) == 1:
            return np.zeros(self.pairs, np.int64)
        return assign_buckets(np.concatenate([shard.pairs.sizes for shard in self.shards]), list(self.shapes))

    @cached_property
    def whole_batches(self) -> int:
        """Batches of an epoch on all ranks."""
        by_bucket = np.bincount(self.buckets, minlength=len(self.shapes))
        return int((by_bucket // self.batch_size if self.shuffle_window else -(-by_bucket // self.batch_size)).sum())

    @cached_property
    def batches(self) -> int:
        """Batches of an epoch on this rank."""
        if self.shuffle_window:
            return self.whole_batches // self.world_size
        return len(self._share(list(range(self.whole_batches))))

    def epoch(self, epoch: int) -> list[Batch]:
        """The rank's batches of an epoch."""
        rows = list(self._cut(self._sequence(epoch)))
        if self.shuffle_window:
            return [Batch(epoch, *row) for row in rows[self.rank * self.batches : (self.rank + 1) * self.batches]]
        return [Batch(epoch, *row) for row in self._share(rows)]

    def _share(self, rows: list) -> list:
        """A rank's part where nothing may be left out."""
        return rows[len(rows) * self.rank // self.world_size : len(rows) * (self.rank + 1) // self.world_size]

    def _sequence(self, epoch: int) -> list[int]:
        """Numbers of all pairs, as the epoch has them."""
        shards = list(range(len(self.shards)))
        if not self.shuffle_window:
            return list(range(self.pairs))
        random.Random(f"{self.seed}/{epoch}").shuffle(shards)
        numbers = [n for shard in shards for n in range(self.firsts[shard], self.firsts[shard + 1])]
        shuffled: list[int] = []
        for start in range(0, len(numbers), self.shuffle_window):
            window = numbers[start : start + self.shuffle_window]
            random.Random(f"{self.seed}/{epoch}/{start}").shuffle(window)
            shuffled += window
        return shuffled

    def _cut(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], Shape]]:
        """Batches in the order in which they get full; what is left over only where nothing may be left out."""
        waiting: list[list[int]] = [[] for _ in self.shapes]
        for number, bucket in zip(numbers, self.buckets[numbers].tolist(), strict=True):
            waiting[bucket].append(number)
            if len(waiting[bucket]) == self.batch_size:
                yield waiting[bucket], self.shapes[bucket]
                waiting[bucket] = []
        if not self.shuffle_window:
            yield from ((rest, shape) for rest, shape in zip(waiting, self.shapes, strict=True) if rest)

    def where(self, number: int) -> tuple[Shard, int]:
        """The shard that holds a pair, and the pair's number in it."""
        shard = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.shards[shard], number - int(self.firsts[shard])

    def _shards_digest(self) -> str:
        """Names, keys and labels in short; shards may move to another folder."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{Path(shard.path).name} {len(shard)} ".encode())
            for column in (shard.pairs.key, shard.pairs.human, shard.pairs.sign):
                digest.update(column.tobytes())
        return f"{len(self.shards)} with {self.pairs} pairs, digest {digest.hexdigest()[:12]}"

    def fingerprint(self) -> dict[str, object]:
        """What must be the same for a resumed run to see the pairs that the unbroken run would have seen."""
        return {
            "rule of the order": RULE,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "shuffle_window": self.shuffle_window,
            "shapes": [list(shape) for shape in self.shapes],
            "labels": self.labels,
            "shards": self._shards_digest(),
        }
