"""The dataset: reads, checks, decodes and collates the pairs of a batch."""

import random
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_align.data.images import PairTransform
from lit_align.data.labels.ordering import Decisions, OrderedPairs, order_pairs
from lit_align.data.labels.stored import stale
from lit_align.data.order import Batch, Order
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.index import content_digest, key_digest
from lit_align.data.shards.layout import RawPair, SampleError, parse_bytes, parse_sample
from lit_align.data.shards.scan import Shard
from lit_align.data.shards.spooled import trust
from lit_align.data.shards.storage import read_range
from lit_align.types import EncodedBatch, PairInfo, PreferenceBatch


class ReadPair(NamedTuple):
    """A pair in the order of the shard."""

    images: Tensor  # (2, ...) image 0 and image 1: pixels, or moments of latents
    time_ids: Tensor  # (2, 6) int64, see `PreferenceBatch`
    prompt: str
    flipped: bool = False


class PairReader(ABC):
    """Reads single pairs, and makes batches of them."""

    @abstractmethod
    def read(self, shard: Shard, row: int, rng: random.Random, shape: tuple[int, int]) -> ReadPair:
        """Read pair `row` of a shard, and bring it to `shape`, height and width in pixels.

        Raises:
            SampleError: if it cannot be read, or has changed since the shard was scanned.
        """

    @abstractmethod
    def blank(self, shape: tuple[int, int]) -> ReadPair:
        """Make a placeholder for an unreadable pair, with weight 0."""

    @abstractmethod
    def batch(self, ordered: OrderedPairs, prompts: list[str]) -> PreferenceBatch | EncodedBatch:
        """Make a batch of ordered pairs."""


class ShardPairReader(PairReader):
    """Reads pairs of encoded images from tar files, and checks them against the scan of the shard.

    Args:
        transform: decodes and crops both images.
        options: timeout of a read, and whether `pipe:` commands may run, in worker processes too.
    """

    def __init__(self, transform: PairTransform, options: ReadOptions | None = None) -> None:
        self.transform, self.options = transform, options or ReadOptions()

    def read(self, shard: Shard, row: int, rng: random.Random, shape: tuple[int, int]) -> ReadPair:
        pair = self._pair(shard, int(shard.pairs.offset[row]), int(shard.pairs.size[row]))
        check(pair, shard, row)
        made = self.transform.read(pair, rng, shape)
        return ReadPair(torch.stack(made.images), torch.stack(made.time_ids), pair.prompt, made.flipped)

    def _pair(self, shard: Shard, offset: int, size: int) -> RawPair:
        if self.options.allow_pipe:
            trust(shard.path)
        try:
            data = read_range(shard.path, offset, size, self.options.timeout)
        except OSError as error:
            raise SampleError(f"shard {shard.path} cannot be read at byte {offset}: {error}") from error
        if len(data) != size:
            raise SampleError(f"shard {shard.path} has changed: it ends before byte {offset + size}.")
        return parse_sample(parse_bytes(shard.path, data))

    def blank(self, shape: tuple[int, int]) -> ReadPair:
        return ReadPair(torch.zeros(2, 3, *shape, dtype=torch.uint8), blank_time_ids(shape), "")

    def batch(self, ordered: OrderedPairs, prompts: list[str]) -> PreferenceBatch:
        return PreferenceBatch(ordered.images, ordered.time_ids, prompts, ordered.pairs)


def blank_time_ids(shape: tuple[int, int]) -> Tensor:
    """Sizes (2, 6) of two images that have `shape`, height and width in pixels, and no crop."""
    return torch.tensor([[*shape, 0, 0, *shape]] * 2)


def check(pair: RawPair, shard: Shard, row: int) -> None:
    """Refuse a pair or a label that differs from the scan of the shard.

    Raises:
        SampleError: if shard, images or prompt have changed since they were indexed, scored or scanned.
    """
    known = shard.pairs
    if key_digest(pair.key) != int(known.key[row]) or pair.human != int(known.human[row]):
        raise SampleError(f"{pair.location}: the shard has changed: there was another sample here, or another label.")
    if int(known.content[row]) not in (0, int(content_digest(pair), 16)):
        if shard.content_known_from == "scores":
            raise SampleError(stale(pair.location))
        raise SampleError(
            f"{pair.location}: images or prompt are not those that its index knows: the shard is damaged or has "
            "changed. Restore it, or delete the index and import the shards again."
        )


class PairDataset(Dataset[PreferenceBatch | EncodedBatch]):
    """Maps the numbers of the pairs of a batch to the batch.

    Args:
        order: knows the shard and row of each pair.
        reader: reads a pair.
        options: whether an unreadable pair raises, or is named in the batch with weight 0.
        voted: whether a vote decided which images are chosen.
        pending: whether a live vote will decide; images then keep the order of the shard.
    """

    def __init__(
        self, order: Order, reader: PairReader, options: ReadOptions, voted: bool = False, pending: bool = False
    ) -> None:
        self.order, self.reader, self.options, self.voted, self.pending = order, reader, options, voted, pending

    def __getitem__(self, batch: Batch) -> PreferenceBatch | EncodedBatch:
        locations = [self.order.where(number) for number in batch.numbers]
        read, faults = list[ReadPair | None](), list[str]()
        for number, (shard, row) in zip(batch.numbers, locations, strict=True):
            rng = random.Random(f"{self.order.seed}/{batch.epoch}/{number}")
            try:
                read.append(self.reader.read(shard, row, rng, batch.shape))
            except SampleError as error:
                if self.options.on_error == "raise":
                    raise
                faults.append(str(error))
                read.append(None)
        pairs = [self.reader.blank(batch.shape) if pair is None else pair for pair in read]
        columns = ("human", "sign", "vote_share", "balance")
        human, sign, vote_share, balance = (_column(locations, name) for name in columns)
        info = PairInfo(
            numbers=batch.numbers,
            weight=torch.tensor([float(pair is not None) for pair in read]),
            flipped=torch.tensor([pair.flipped for pair in pairs]),
            human=human,
            vote_share=torch.zeros(len(pairs)),
            balance=torch.zeros(len(pairs)),
            voted=False,
            faults=tuple(faults),
        )
        images, time_ids = (torch.stack([getattr(pair, name) for pair in pairs]) for name in ("images", "time_ids"))
        ordered = OrderedPairs(images, time_ids, info)
        if not self.pending:
            ordered = order_pairs(*ordered, Decisions(sign, vote_share, balance, self.voted))
        return self.reader.batch(ordered, [pair.prompt for pair in pairs])


def _column(locations: list[tuple[Shard, int]], name: str) -> Tensor:
    """Collect a column of the scan for pairs at (shard, row): (batch,) int64, or float32 for shares."""
    return torch.tensor([getattr(shard.pairs, name)[row].item() for shard, row in locations])
