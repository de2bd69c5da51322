"""From the numbers of a batch's pairs to the batch: read, check, decode, collate."""

import atexit
import random
import signal
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_align.data.images import ImageError, PairTransform
from lit_align.data.labels.stored import stale
from lit_align.data.order import Batch, Order
from lit_align.data.read_options import OnError
from lit_align.data.shards.index import content_digest, key_digest
from lit_align.data.shards.layout import RawPair, SampleError, parse_bytes, parse_sample
from lit_align.data.shards.scan import Shard
from lit_align.data.shards.storage import read_range, trust
from lit_align.types import PreferenceBatch


class ReadPair(NamedTuple):
    """A pair as it trains, image 0 first."""

    images: tuple[Tensor, Tensor]  # of one shape and dtype
    geometries: tuple[Tensor, Tensor]  # (6,) int64, see `PreferenceBatch`
    prompt: str
    flipped: bool = False


class PairSource(ABC):
    """Where pairs are read."""

    @abstractmethod
    def read(self, shard: Shard, number: int, draw: random.Random, shape: tuple[int, int]) -> ReadPair:
        """The pair `number` of a shard, brought to `shape`, height and width in pixels.

        Raises:
            SampleError: if it cannot be read, or is not what it was.
        """

    @abstractmethod
    def blank(self, shape: tuple[int, int]) -> ReadPair:
        """What takes the place of a pair that cannot be read, and weighs nothing."""

    def finish(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Add what belongs to a batch as a whole."""
        return batch


class EncodedImages(PairSource):
    """Pairs in tar files, read at their place and checked against what was known of them.

    Args:
        transform: from encoded images to pixels.
        timeout: seconds until a read is given up; None waits forever.
        allow_pipe: whether shards may be `pipe:` commands, in worker processes too.
    """

    def __init__(self, transform: PairTransform, timeout: float | None = None, allow_pipe: bool = False) -> None:
        self.transform, self.timeout, self.allow_pipe = transform, timeout, allow_pipe

    def read(self, shard: Shard, number: int, draw: random.Random, shape: tuple[int, int]) -> ReadPair:
        pair = self._pair(shard, int(shard.pairs.offset[number]), int(shard.pairs.size[number]))
        check(pair, shard, number)
        try:
            made = self.transform((pair.image_0, pair.image_1), draw, shape)
        except ImageError as error:
            raise SampleError(f"{pair.location}: an image cannot be decoded: {error}") from error
        return ReadPair(made.images, made.geometries, pair.prompt, made.flipped)

    def _pair(self, shard: Shard, offset: int, size: int) -> RawPair:
        if self.allow_pipe:
            trust(shard.path)
        try:
            data = read_range(shard.path, offset, size, self.timeout)
        except OSError as error:
            raise SampleError(f"shard {shard.path} cannot be read at byte {offset}: {error}") from error
        if len(data) != size:
            raise SampleError(f"shard {shard.path} has changed: it ends before byte {offset + size}.")
        return parse_sample(parse_bytes(shard.path, data))

    def blank(self, shape: tuple[int, int]) -> ReadPair:
        image, geometry = torch.zeros(3, *shape, dtype=torch.uint8), torch.tensor([*shape, 0, 0, *shape])
        return ReadPair((image, image), (geometry, geometry), "")


def check(pair: RawPair, shard: Shard, number: int) -> None:
    """Refuse another pair, or another label, than the run began with.

    Raises:
        SampleError: if shard, images or prompt have changed since they were indexed, scored or first looked at.
    """
    known = shard.pairs
    if key_digest(pair.key) != int(known.key[number]) or pair.human != int(known.human[number]):
        raise SampleError(f"{pair.location}: the shard has changed: there was another sample here, or another label.")
    if int(known.content[number]) not in (0, int(content_digest(pair), 16)):
        if shard.content_known_from == "scores":
            raise SampleError(stale(pair.location))
        raise SampleError(
            f"{pair.location}: images or prompt are not those that its index knows: the shard is damaged or has "
            "changed. Restore it, or delete the index and import the shards again."
        )


class PairReader(Dataset[PreferenceBatch]):
    """Batches by the numbers of their pairs.

    Args:
        order: knows where each pair is.
        source: reads it.
        on_error: `raise` on a pair that cannot be read, or `skip` it: it is named in the batch and weighs nothing.
        voted: whether a vote has ordered the pairs.
    """

    def __init__(self, order: Order, source: PairSource, on_error: OnError, voted: bool = False) -> None:
        self.order, self.source, self.on_error, self.voted = order, source, on_error, voted

    def __getitem__(self, batch: Batch) -> PreferenceBatch:
        places = [self.order.where(number) for number in batch.numbers]
        read, faults = list[ReadPair | None](), list[str]()
        for number, (shard, row) in zip(batch.numbers, places, strict=True):
            draw = random.Random(f"{self.order.seed}/{batch.epoch}/{number}")
            try:
                read.append(self.source.read(shard, row, draw, batch.shape))
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                faults.append(str(error))
                read.append(None)
        known = [(shard.pairs.sign[row], shard.pairs.human[row], shard.pairs.strength[row]) for shard, row in places]
        return self._collate(batch, read, known, faults)

    def _collate(
        self, batch: Batch, read: list[ReadPair | None], known: list[tuple[int, int, float]], faults: list[str]
    ) -> PreferenceBatch:
        pairs = [self.source.blank(batch.shape) if pair is None else pair for pair in read]
        first = [1 if sign < 0 else 0 for sign, _, _ in known]  # which image is the chosen one
        made = PreferenceBatch(
            chosen=torch.stack([pair.images[i] for pair, i in zip(pairs, first, strict=True)]),
            rejected=torch.stack([pair.images[1 - i] for pair, i in zip(pairs, first, strict=True)]),
            prompts=[pair.prompt for pair in pairs],
            weight=torch.tensor([float(pair is not None) for pair in read]),
            chosen_geometry=torch.stack([pair.geometries[i] for pair, i in zip(pairs, first, strict=True)]),
            rejected_geometry=torch.stack([pair.geometries[1 - i] for pair, i in zip(pairs, first, strict=True)]),
            number=torch.tensor(batch.numbers),
            flipped=torch.tensor([pair.flipped for pair in pairs]),
            human=torch.tensor([int(human) * (int(sign) or 1) for sign, human, _ in known]),
            voted=self.voted,
            strength=torch.tensor([float(strength) for _, _, strength in known]),
            faults=tuple(faults),
        )
        return self.source.finish(made)


class PairLoader:
    """A DataLoader for every epoch, which starts where the Trainer is.

    Args:
        reader: makes the batches.
        workers: processes that do; 0 makes them here.
        position: epoch and batches consumed in it, asked for when an epoch begins.
    """

    def __init__(self, reader: PairReader, workers: int, position: Callable[[], tuple[int, int]]) -> None:
        self.order, self.position = reader.order, position
        self.loader = DataLoader(
            reader,
            batch_size=None,
            sampler=_Remaining(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_signals,
        )
        if workers:
            atexit.register(_release, weakref.ref(self))

    def __len__(self) -> int:
        return self.order.batches

    def __iter__(self) -> Iterator[PreferenceBatch]:
        # The body of a generator runs at the first `next`: by then the Trainer has restored its counters.
        yield from self.loader

    def release(self) -> None:
        """End the workers now, whoever still holds their iterator (the traceback of what has ended the run does).

        At the end of a process they would be waited for: without end, as they outlive the signal that it sends them.
        """
        iterator: Any = self.loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()  # torch does so where nobody holds it any more
            self.loader._iterator = None

    def state_dict(self) -> dict[str, int]:
        """Nothing: the Trainer's counters are the state. Lightning takes the method as a sign of a resumable loader."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore, see `state_dict`."""


def _release(loader: "weakref.ref[PairLoader]") -> None:
    """At the end of a process: before multiprocessing's own end, whose one signal the workers outlive."""
    alive = loader()
    if alive is not None:
        alive.release()


class _Remaining:
    """The batches that an epoch has left."""

    def __init__(self, loader: PairLoader) -> None:
        self.order, self.position = loader.order, loader.position

    def __iter__(self) -> Iterator[Batch]:
        epoch, consumed = self.position()
        return iter(self.order.epoch(epoch)[consumed:])

    def __len__(self) -> int:
        return self.order.batches


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """SLURM sends its warnings to every process of a run, and one whose worker died of it could not end its step.

    The second SIGTERM ends a worker: PyTorch and Python send their own to one that does not end by itself.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
