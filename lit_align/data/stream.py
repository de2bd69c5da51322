"""The order of the pairs, and the stream that follows it.

Which pair is n-th on a rank is a function of (seed, epoch, world size, rank, workers, n) and the list of shards:

1. An epoch permutes the shards; laid end to end they are one sequence of pairs, the same on all ranks.
2. Each rank takes one contiguous slice of whole batches, all ranks equally many; what is left over at the end of
   the sequence (fewer than world size x batch size pairs) sits this epoch out. Validation leaves out nothing.
3. Each worker takes a contiguous share of the rank's batches and shuffles it in windows.
4. The rank's n-th batch is the next one of worker n mod workers.

So a stream can start at any batch: whole windows and whole shards before it are not read.
"""

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lit_align.data.images import PairImages, PairTransform
from lit_align.data.labels import Decision, HumanLabels, Labels, check_content, human_sign
from lit_align.data.samples import RawPair, SampleError, parse_sample, read_samples
from lit_align.data.shards import OnError, Shard
from lit_align.types import PreferenceBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """Everything but the epoch that decides which pair comes when."""

    shards: tuple[Shard, ...]
    batch_size: int  # pairs
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle_window: int = 0  # pairs; 0 keeps the order of the files, and every pair
    workers: int = 0
    labels: Labels = field(default_factory=HumanLabels)

    @property
    def shuffled(self) -> bool:
        return self.shuffle_window > 0

    @property
    def pairs(self) -> range:
        """The rank's slice of the epoch's sequence."""
        total = sum(shard.pairs for shard in self.shards)
        if not self.shuffled:
            return range(total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size)
        share = total // (self.world_size * self.batch_size) * self.batch_size
        return range(share * self.rank, share * (self.rank + 1))

    @property
    def batches(self) -> int:
        """Batches of an epoch on this rank."""
        return -(-len(self.pairs) // self.batch_size)

    def numbered_shards(self, epoch: int) -> list[tuple[int, Shard]]:
        """The epoch's permutation: each shard with the number of its first pair in the list of shards."""
        firsts, first = [], 0
        for shard in self.shards:
            firsts.append((first, shard))
            first += shard.pairs
        if self.shuffled:
            random.Random(f"{self.seed}/{epoch}").shuffle(firsts)
        return firsts

    def worker_pairs(self, worker: int, skip_batches: int) -> tuple[range, int]:
        """A worker's pairs as positions in the epoch's sequence, and how many of them were consumed before.

        `skip_batches` is the number of batches that the rank has consumed. A loader asks its worker 0 first,
        so worker 0 plays the part whose turn it is.
        """
        workers = max(1, self.workers)
        part = (worker + skip_batches) % workers
        whole, extra = divmod(self.batches, workers)
        first = part * whole + min(part, extra)
        last = first + whole + (part < extra)
        consumed = max(0, -(-(skip_batches - part) // workers))
        start = self.pairs.start
        positions = range(
            min(start + first * self.batch_size, self.pairs.stop), min(start + last * self.batch_size, self.pairs.stop)
        )
        return positions, min(consumed * self.batch_size, len(positions))

    def _shards_digest(self) -> str:
        """Names and sizes in short; shards may move to another folder."""
        listed = repr([(Path(shard.path).name, shard.pairs) for shard in self.shards])
        pairs = sum(shard.pairs for shard in self.shards)
        return f"{len(self.shards)} with {pairs} pairs, digest {hashlib.sha256(listed.encode()).hexdigest()[:12]}"

    def fingerprint(self) -> dict[str, object]:
        """What must be the same for a resumed run to see the pairs that the unbroken run would have seen."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "num_workers": self.workers,
            "shuffle_window": self.shuffle_window,
            "shards": self._shards_digest(),
            "labels": self.labels.describe(),
        }


class NumberedPair(NamedTuple):
    """A pair with its number in the data set and its label."""

    number: int
    pair: RawPair
    decision: Decision


class PairStream(IterableDataset[PreferenceBatch]):
    """Batches of one epoch, from `skip_batches` on; each worker decodes and collates its own."""

    def __init__(
        self, order: Order, transform: PairTransform, on_error: OnError, epoch: int = 0, skip_batches: int = 0
    ) -> None:
        self.order, self.transform, self.on_error = order, transform, on_error
        self.epoch, self.skip_batches = epoch, skip_batches

    def __iter__(self) -> Iterator[PreferenceBatch]:
        info = get_worker_info()
        positions, consumed = self.order.worker_pairs(0 if info is None else info.id, self.skip_batches)
        pairs = self._shuffled(positions, consumed)
        while batch := list(islice(pairs, self.order.batch_size)):
            yield self._collate(batch)

    def _shuffled(self, positions: range, consumed: int) -> Iterator[NumberedPair]:
        """Numbered pairs at `positions` in windows, each shuffled on its own, without the first `consumed`."""
        if not self.order.shuffled:
            yield from self._read(positions[consumed:])
            return
        window = self.order.shuffle_window
        skip = consumed % window
        unread = positions[consumed - skip :]  # whole windows before it are not read
        stream = self._read(unread)
        for start in unread[::window]:
            held = list(islice(stream, window))
            random.Random(f"{self.order.seed}/{self.epoch}/{start}").shuffle(held)
            yield from held[skip:]
            skip = 0

    def _read(self, positions: range) -> Iterator[NumberedPair]:
        """Numbered pairs at `positions` of the epoch's sequence; only shards that hold some are opened."""
        begin = 0
        for first, shard in self.order.numbered_shards(self.epoch):
            low, high = max(positions.start - begin, 0), min(positions.stop - begin, shard.pairs)
            begin += shard.pairs
            if low >= high:
                continue
            read = 0
            pairs = decided_pairs(shard.path, self.order.labels, self.on_error)
            for number, (pair, decision) in enumerate(islice(pairs, high)):
                read = number + 1
                if number >= low:
                    yield NumberedPair(first + number, pair, decision)
            if read < high:
                raise SampleError(
                    f"shard {shard.path} has {read} pairs left of {shard.pairs}: it changed during the run."
                )

    def _collate(self, pairs: Sequence[NumberedPair]) -> PreferenceBatch:
        size = self.transform.resolution
        count = len(pairs)
        images = torch.zeros(2, count, 3, size, size, dtype=torch.uint8)
        geometries = torch.tensor([size, size, 0, 0, size, size]).repeat(2, count, 1)
        weight, flipped = torch.ones(count), torch.zeros(count, dtype=torch.bool)
        for row, (number, pair, decision) in enumerate(pairs):
            draw = random.Random(f"{self.order.seed}/{self.epoch}/{number}")
            encoded = (pair.image_1, pair.image_0) if decision.sign < 0 else (pair.image_0, pair.image_1)
            try:
                check_content(pair, decision)
                transformed = self._transform(pair, encoded, draw)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                log.warning("Skipped: %s", error)
                weight[row] = 0
                continue
            flipped[row] = transformed.flipped
            for side in (0, 1):
                images[side, row], geometries[side, row] = transformed.images[side], transformed.geometries[side]
        return PreferenceBatch(
            chosen=images[0],
            rejected=images[1],
            prompts=[pair.prompt for _, pair, _ in pairs],
            weight=weight,
            chosen_geometry=geometries[0],
            rejected_geometry=geometries[1],
            number=torch.tensor([number for number, _, _ in pairs]),
            flipped=flipped,
            human=torch.tensor([human_sign(pair) * (decision.sign or 1) for _, pair, decision in pairs]),
            voted=self.order.labels.voted,
            strength=torch.tensor([decision.strength for _, _, decision in pairs]),
        )

    def _transform(self, pair: RawPair, encoded: tuple[bytes, bytes], draw: random.Random) -> PairImages:
        try:
            return self.transform(encoded, draw)
        except (OSError, ValueError, SyntaxError) as error:
            raise SampleError(f"{pair.place}: an image cannot be decoded: {error}") from error


def decided_pairs(shard: str, labels: Labels, on_error: OnError) -> Iterator[tuple[RawPair, Decision]]:
    """The pairs of a shard that train: neither undecided nor, where they are to be skipped, broken ones."""
    decide = labels.of_shard(shard)
    for sample in read_samples(shard):
        try:
            pair = parse_sample(sample)
            decision = decide(pair)
        except SampleError:
            if on_error == "raise":
                raise
            continue  # named in the log when the shards were scanned
        if decision.sign != 0 or labels.keep_undecided:
            yield pair, decision
