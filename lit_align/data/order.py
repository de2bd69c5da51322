"""Order of the pairs: a function of (seed, epoch, world size, rank, n) and the list of shards.

1. Each epoch permutes the shards; their concatenation is one sequence of pairs, equal on all ranks.
2. Windows of the sequence are shuffled separately, so that a run reads from few shards at a time.
3. The sequence is cut into batches. With buckets, a batch has one shape: pairs wait until their bucket is full.
4. Each rank takes a contiguous slice of the batches; all slices have one length.

Leftover pairs are dropped for this epoch: without buckets fewer than world size x batch size pairs at the end of the
sequence; with buckets at most batch size - 1 pairs of each bucket, and fewer batches than ranks. Validation drops
nothing and shuffles nothing; its last batches may be smaller, and the slices of ranks may differ by one batch.

The number of workers does not change the order: they take the batches in turn.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_align.data.buckets import Shape, assign_buckets
from lit_align.data.epoch import Epoch
from lit_align.data.shards.scan import Shard

RULE = 2  # to be raised with every change of the order


class Batch(NamedTuple):
    """Pairs of a batch."""

    epoch: int
    numbers: list[int]  # positions of the pairs in the dataset
    shape: Shape  # pixels


@dataclass(frozen=True)
class Order:
    """Order of a rank's pairs in every epoch.

    It is what a batch sampler yields: `epoch(n)` lists the rank slice of epoch n, and `rest` begins within it.
    """

    shards: tuple[Shard, ...]
    batch_size: int  # pairs
    shapes: tuple[Shape, ...]  # of the buckets; a single one without buckets
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle_window: int = 0  # pairs; 0 keeps the files' order and all pairs, for validation
    labels: str = "the human label"  # the rule that chooses an image

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """(shards + 1,) position of each shard's first pair in the dataset, and last the number of pairs."""
        return np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])]).astype(np.int64)

    @property
    def pairs(self) -> int:
        """Number of pairs in the dataset."""
        return int(self.firsts[-1])

    @cached_property
    def buckets(self) -> NDArray[np.uint8]:
        """(pairs,) bucket of each pair; without buckets all are one number in memory."""
        if len(self.shapes) == 1:
            return np.broadcast_to(np.uint8(0), (self.pairs,))
        assigned = [assign_buckets(shard.pairs.sizes, list(self.shapes)) for shard in self.shards]
        return np.concatenate(assigned, dtype=np.uint8, casting="unsafe")  # there are 40 at most

    @cached_property
    def whole_batches(self) -> int:
        """Number of batches of an epoch, over all ranks."""
        by_bucket = np.array([np.count_nonzero(self.buckets == number) for number in range(len(self.shapes))])
        return int((by_bucket // self.batch_size if self.shuffle_window else -(-by_bucket // self.batch_size)).sum())

    @cached_property
    def batches(self) -> int:
        """Number of batches of an epoch on this rank."""
        if self.shuffle_window:
            return self.whole_batches // self.world_size
        return len(range(self.whole_batches)[self._uneven_slice(self.whole_batches)])

    def epoch(self, epoch: int) -> list[Batch]:
        """The rank slice of an epoch's batches."""
        return list(self.rest(epoch, 0))

    def rest(self, epoch: int, consumed: int) -> Iterator[Batch]:
        """The rank slice of an epoch's batches without its first `consumed`; each is made when it is asked for."""
        equal = slice(self.rank * self.batches, (self.rank + 1) * self.batches)
        rank_slice = equal if self.shuffle_window else self._uneven_slice(self.whole_batches)
        begin = rank_slice.start + consumed
        whole = Epoch(
            self.firsts, self.buckets, len(self.shapes), self.batch_size, self.shuffle_window, self.seed, epoch
        )
        for numbers, bucket in islice(whole.batches(begin), max(rank_slice.stop - begin, 0)):
            yield Batch(epoch, numbers, self.shapes[bucket])

    def _uneven_slice(self, batches: int) -> slice:
        """The rank slice that drops no batch."""
        return slice(batches * self.rank // self.world_size, batches * (self.rank + 1) // self.world_size)

    def where(self, number: int) -> tuple[Shard, int]:
        """The shard that holds a pair, and the pair's position in it."""
        shard = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.shards[shard], number - int(self.firsts[shard])

    @cached_property
    def _shards_digest(self) -> str:
        """Digest of shard names, keys and labels; the shards' folder is not part of it."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{Path(shard.path).name} {len(shard)} ".encode())
            for column in (shard.pairs.key, shard.pairs.human, shard.pairs.sign):
                digest.update(column.tobytes())
        return f"{len(self.shards)} with {self.pairs} pairs, digest {digest.hexdigest()[:12]}"

    def fingerprint(self) -> dict[str, object]:
        """All that decides the order; a resumed run with an equal fingerprint sees the pairs of an unbroken run."""
        return {
            "rule of the order": RULE,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "shuffle_window": self.shuffle_window,
            "shapes": [list(shape) for shape in self.shapes],
            "labels": self.labels,
            "shards": self._shards_digest,
        }
