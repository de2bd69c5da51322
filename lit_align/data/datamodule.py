"""The LightningDataModule that streams preference pairs."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_align.data.images import Crop, PairTransform
from lit_align.data.shards import OnError, Shard, expand, scan
from lit_align.data.stream import Order, PairStream
from lit_align.types import PreferenceBatch

log = logging.getLogger(__name__)


class PreferenceDataModule(L.LightningDataModule):
    """Streams pairs from WebDataset shards; the label decides which image is the chosen one.

    Args:
        train_shards: tar files; braces `{000..127}` and wildcards `*` are expanded.
        val_shards: held-out tar files, or none.
        resolution: side of the square that both images are resized and cropped to, pixels.
        batch_size: pairs per device and micro-batch.
        num_workers: reading and decoding processes per device; 0 reads in the training process.
        shuffle_window: pairs that a worker holds, encoded, to shuffle; shards are shuffled as well.
        crop: `center`, or `random` with one draw per pair.
        flip_probability: chance of flipping both training images of a pair horizontally.
        on_error: `raise` on a broken sample, or `skip` it: it is named in the log and counted at the end.
        seed: of order and augmentation; the command line sets it from `seed_everything`.
    """

    def __init__(
        self,
        train_shards: str | list[str],
        val_shards: str | list[str] | None = None,
        resolution: int = 1024,
        batch_size: int = 4,
        num_workers: int = 4,
        shuffle_window: int = 1000,
        crop: Crop = "center",
        flip_probability: float = 0.5,
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("resolution", resolution, 8),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("shuffle_window", shuffle_window, 1),
        ):
            if value < least:
                raise ValueError(f"data.{name} is {value}; it must be at least {least}.")
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"data.flip_probability is {flip_probability}; it must lie between 0 and 1.")
        self.train_shards, self.val_shards = train_shards, val_shards
        self.batch_size, self.num_workers, self.shuffle_window = batch_size, num_workers, shuffle_window
        self.on_error, self.seed = on_error, seed
        self.train_transform = PairTransform(resolution, crop, flip_probability)
        self.val_transform = PairTransform(resolution, "center", 0.0)
        self.train: tuple[Shard, ...] = ()
        self.val: tuple[Shard, ...] = ()
        self.unreadable = 0  # training pairs of this rank that could not be decoded
        self._resumed_order: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.train:
            self.train = self._scan("train_shards", self.train_shards)
        if self.val_shards is not None and not self.val:
            self.val = self._scan("val_shards", self.val_shards)

    def _scan(self, name: str, patterns: str | Sequence[str]) -> tuple[Shard, ...]:
        shards = tuple(scan(expand(patterns), self.on_error))
        pairs, ties = sum(shard.pairs for shard in shards), sum(shard.ties for shard in shards)
        broken = sum(shard.broken for shard in shards)
        rank_zero_info(
            f"{name}: {pairs:,} pairs in {len(shards)} shards; left out: {ties:,} ties, {broken:,} broken samples"
        )
        if pairs == 0:
            raise ValueError(f"data.{name}: no pair with a preference in {len(shards)} shards ({ties} ties).")
        return shards

    def train_dataloader(self) -> "PairLoader":
        order = self._order(self.train, self.shuffle_window)
        if order.batches == 0:
            total = sum(shard.pairs for shard in self.train)
            raise ValueError(
                f"data.train_shards hold {total} pairs, fewer than one batch of data.batch_size {self.batch_size} "
                f"on each of {order.world_size} devices. Lower data.batch_size or use fewer devices."
            )
        self._check_resumed(order)
        return PairLoader(order, self.train_transform, self.on_error, self._position)

    def val_dataloader(self) -> "PairLoader | list[PairLoader]":
        if not self.val:
            return []
        return PairLoader(self._order(self.val, shuffle_window=0), self.val_transform, self.on_error, lambda: (0, 0))

    def _order(self, shards: tuple[Shard, ...], shuffle_window: int) -> Order:
        # Rank and world size come from the Trainer: a spawned worker finds no process group.
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Order(shards, self.batch_size, rank, world_size, self.seed, shuffle_window, self.num_workers)

    def _position(self) -> tuple[int, int]:
        """Epoch and batches trained in it, from the Trainer's own counters, which checkpoints restore."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def on_before_batch_transfer(self, batch: PreferenceBatch, dataloader_idx: int) -> PreferenceBatch:
        if self.on_error == "skip" and self.trainer is not None and self.trainer.training:
            self.unreadable += int((batch.weight == 0).sum())
        return batch

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.on_error == "skip":
            broken = sum(shard.broken for shard in self.train)
            log.warning(
                "Skipped in training: %d broken samples per epoch, %d reads of unreadable images on this rank.",
                broken,
                self.unreadable,
            )

    def state_dict(self) -> dict[str, Any]:
        return self._order(self.train, self.shuffle_window).fingerprint() if self.train else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_order = state_dict

    def _check_resumed(self, order: Order) -> None:
        """Refuse to continue a run in another order than it began in."""
        if not self._resumed_order:
            return
        now = order.fingerprint()
        changed = [f"{k} was {v}, is {now.get(k)}" for k, v in self._resumed_order.items() if now.get(k) != v]
        if changed:
            raise ValueError(
                f"The checkpoint's run read its pairs in another order ({'; '.join(changed)}), so it cannot go on "
                "exactly. Resume with the old values, or export the weights and start a new run from them."
            )


class PairLoader:
    """A DataLoader for every epoch, which starts where the Trainer is."""

    def __init__(
        self, order: Order, transform: PairTransform, on_error: OnError, position: Callable[[], tuple[int, int]]
    ) -> None:
        self.order, self.transform, self.on_error, self.position = order, transform, on_error, position

    def __len__(self) -> int:
        return self.order.batches

    def __iter__(self) -> Iterator[PreferenceBatch]:
        # The body of a generator runs at the first `next`: by then the Trainer has restored its counters.
        epoch, batches = self.position()
        stream = PairStream(self.order, self.transform, self.on_error, epoch, batches)
        yield from DataLoader(
            stream, batch_size=None, num_workers=self.order.workers, pin_memory=torch.cuda.is_available()
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the Trainer's counters are the state. Lightning takes the method as a sign of a resumable loader."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""
