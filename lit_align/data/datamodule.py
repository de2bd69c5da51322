"""The LightningDataModule that streams preference pairs."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lit_align.common.choices import OnError
from lit_align.data.buckets import bucket_shapes
from lit_align.data.contents import check_resumed, contents
from lit_align.data.dataset import PairDataset, PairReader
from lit_align.data.images import Crop, PairTransform
from lit_align.data.labels.live_vote import LiveVote
from lit_align.data.loader import PairLoader
from lit_align.data.order import Order
from lit_align.data.read_options import ReadOptions, check_least
from lit_align.data.shards.layout import SampleError
from lit_align.data.split import Split
from lit_align.scoring.base import Scorer
from lit_align.scoring.vote import Vote
from lit_align.types import EncodedBatch, PreferenceBatch
from lit_align.user_errors import UserValueError

AnyBatch = PreferenceBatch | EncodedBatch
log = logging.getLogger(__name__)


class PreferenceDataModule(L.LightningDataModule):
    """Stream pairs from WebDataset shards; the human label, or a vote, decides which image is chosen.

    Args:
        train_shards: tar files, local or `http(s):`, `s3:`, `gs:`, `hf:`; braces `{000..127}` and wildcards `*` are
            expanded. Or folders of tar files, or the `index.json` of an import.
        val_shards: held-out shards; null trains without validation.
        resolution: side of the square that both images are resized and cropped to, pixels.
        aspect_buckets: train in SDXL's shapes of about as many pixels instead of squares, each pair in the nearest.
        batch_size: pairs per device and micro-batch.
        num_workers: reading processes per device, and as many for held-out pairs; 0 reads in the training process.
        shuffle_window: number of consecutive pairs that are shuffled among themselves, after the shards have been
            shuffled; larger windows shuffle better and read from more shards at a time.
        crop: `center`, or `random` with one draw per pair.
        flip_probability: chance of flipping both training images of a pair horizontally.
        on_error: `raise` on a broken sample, or `skip` it: then it is named in the log and counted at the end.
        skip_limit: number of broken samples in a split, or read by a device, above which `skip` raises nevertheless.
        read_timeout: seconds until a read counts as broken; null waits forever.
        allow_pipe: whether `pipe:` addresses may run their shell commands.
        vote: choose images by a vote of scorers instead of the human label, on stored scores (`lit-align score`).
        train_scores: folder of the training shards' scores; null: beside the shards.
        val_scores: folder of the held-out shards' scores; null: beside the shards.
        train_cache: folder of the training shards' latents and conditioning, from `lit-align encode`.
        val_cache: folder of the held-out shards'; if all pairs are cached, neither VAE nor text encoders are loaded.
        scorers: scorers by the names that `vote` uses, which score while training instead of stored scores.
        seed: of order and augmentation; the command line sets it to `seed_everything`.
    """

    def __init__(
        self,
        train_shards: str | list[str],
        val_shards: str | list[str] | None = None,
        resolution: int = 1024,
        aspect_buckets: bool = False,
        batch_size: int = 4,
        num_workers: int = 4,
        shuffle_window: int = 1000,
        crop: Crop = "center",
        flip_probability: float = 0.5,
        on_error: OnError = "raise",
        skip_limit: int = 100,
        read_timeout: float | None = 120.0,
        allow_pipe: bool = False,
        vote: Vote | None = None,
        train_scores: str | None = None,
        val_scores: str | None = None,
        train_cache: str | None = None,
        val_cache: str | None = None,
        scorers: dict[str, Scorer] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_least(resolution=(resolution, 8), batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        check_least(shuffle_window=(shuffle_window, 1), skip_limit=(skip_limit, 0))
        if scorers is not None and not (train_cache is None and val_cache is None):
            raise UserValueError(
                "data.scorers look at pixels, which a cache does not hold. Run lit-align score instead."
            )
        self.vote, self.live_vote = vote, None if scorers is None else LiveVote(vote, scorers)
        self.batch_size, self.num_workers, self.shuffle_window = batch_size, num_workers, shuffle_window
        self.resolution, self.aspect_buckets, self.seed = resolution, aspect_buckets, seed
        self.shapes = tuple(bucket_shapes(resolution) if aspect_buckets else [(resolution, resolution)])
        self.reading = ReadOptions(on_error, skip_limit, read_timeout, allow_pipe)
        transform, still = PairTransform(crop, flip_probability), PairTransform("center", 0.0)
        self.train = Split("train", train_shards, train_scores, train_cache, transform, self.reading)
        self.val = None
        if val_shards is not None:
            self.val = Split("val", val_shards, val_scores, val_cache, still, self.reading)
        self.unreadable: dict[str, None] = {}  # distinct reasons why pairs of this rank could not be read
        self._resumed_order: dict[str, Any] | None = None
        self._contents: dict[str, Any] = {}  # of the shards
        self._readers: dict[str, PairReader] = {}
        self._orders: dict[str, Order] = {}  # the last of each split
        # Weak, as the workers of a loader in a cycle would not hear its end.
        self._loaders = weakref.WeakValueDictionary[str, PairLoader]()  # by split

    @property
    def encoded(self) -> bool:
        """Whether all pairs are cached, so that neither VAE nor text encoders are needed."""
        return all(split.cache is not None for split in (self.train, self.val) if split is not None)

    def setup(self, stage: str) -> None:
        # The backbone checks the encoders of a cache, see `Encoders.check_origin`.
        expected = {"resolution": self.resolution, "aspect_buckets": self.aspect_buckets}
        wanted = [self.train, self.val] if stage == "fit" else [self.val]
        for split in wanted:
            if split is not None and not split.shards:
                split.scan(self.vote, self.live_vote, self.aspect_buckets)
                self._readers[split.name] = split.reader(expected)  # refuses a cache that does not fit

    def train_dataloader(self) -> PairLoader:
        order = self._order(self.train, self.shuffle_window)
        self.check_train(order)
        self._contents = {"contents": contents(self.train.shards, self.reading.timeout)}
        if self.val is not None:
            shards = self._order(self.val, 0).fingerprint()["shards"]
            self._contents["held_out"] = {"shards": shards, **contents(self.val.shards, self.reading.timeout)}
        if self._resumed_order:
            check_resumed(self._resumed_order, self.state_dict(), self.train.shards)
        out = order.pairs - order.batches * order.batch_size * order.world_size
        devices = f" on each of {order.world_size} devices" if order.world_size > 1 else ""
        rank_zero_info(f"an epoch: {order.batches:,} batches{devices}; {out:,} leftover pairs are dropped")
        return self._loader(self.train, order, self._position)

    def val_dataloader(self) -> "PairLoader | list[PairLoader]":
        if self.val is None:
            return []
        order = self._order(self.val, 0)
        self.check_val(order)
        return self._loader(self.val, order, lambda: (0, 0))

    def check_train(self, order: Order) -> None:
        """Refuse fewer training pairs than one batch on every device."""
        if order.batches == 0:
            buckets = f" in {len(self.shapes)} buckets" if self.aspect_buckets else ""
            raise UserValueError(
                f"data.train_shards hold {order.pairs} pairs{buckets}, fewer than one batch of data.batch_size "
                f"{self.batch_size} on each of {order.world_size} devices. Lower data.batch_size or use fewer devices."
            )

    def check_val(self, order: Order) -> None:
        """Refuse held-out pairs that leave a device without a batch."""
        if order.whole_batches < order.world_size:
            raise UserValueError(
                f"data.val_shards hold {order.pairs} pairs, {order.whole_batches} batches of data.batch_size "
                f"{self.batch_size}, fewer than the {order.world_size} devices. Lower data.batch_size or add shards."
            )

    def _loader(self, split: Split, order: Order, position: Callable[[], tuple[int, int]]) -> PairLoader:
        if split.name in self._loaders:  # trainer.reload_dataloaders_every_n_epochs
            self._loaders[split.name].release()
        loader = self._loaders[split.name] = PairLoader(self.dataset(split, order), self.num_workers, position)
        return loader

    def dataset(self, split: Split, order: Order) -> PairDataset:
        """Make the dataset of a scanned split in an order."""
        self._agree(split, order)
        pending = self.live_vote is not None
        return PairDataset(order, self._readers[split.name], self.reading, split.labels.voted, pending)

    def _agree(self, split: Split, order: Order) -> None:
        """Refuse to begin if the devices found different pairs or checkpoints: they would hang."""
        if self.trainer is None or self.trainer.world_size == 1:
            return
        strategy, (epoch, batch) = self.trainer.strategy, self._position()
        mine = f"{order.fingerprint()} {self._contents} {epoch} {batch}"
        same = strategy.broadcast(mine) == mine
        if not strategy.reduce_boolean_decision(same, all=True):
            left_out = [fault for shard in split.shards for fault in shard.broken]
            raise SampleError(
                f"data.{split.name}_shards: the devices found different pairs or checkpoints. Device {order.rank} "
                f"begins at epoch {epoch}, batch {batch}, has {order.pairs} pairs, left out {len(left_out)} samples, "
                f"first: {left_out[0] if left_out else 'none'}. Put data and runs on disks that all nodes share."
            )

    def _order(self, split: Split, shuffle_window: int) -> Order:
        # Rank and world size come from the Trainer: a spawned worker finds no process group.
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self.order(split, shuffle_window, rank, world_size)

    def order(self, split: Split, shuffle_window: int, rank: int, world_size: int) -> Order:
        """Make the order of a rank in a scanned split; a shuffle window of 0 gives the order of validation."""
        decides = split.labels.describe()
        made = Order(split.shards, self.batch_size, self.shapes, rank, world_size, self.seed, shuffle_window, decides)
        kept = self._orders.get(split.name)
        if kept is None or kept != made:  # the one that is kept knows its digest and its buckets
            kept = self._orders[split.name] = made
        return kept

    def _position(self) -> tuple[int, int]:
        """Epoch and number of batches trained in it, by the Trainer's counters, which checkpoints restore."""
        if self.trainer is None:
            return 0, 0
        loop, same = self.trainer.fit_loop, self.trainer.overfit_batches  # type: ignore[attr-defined]
        return 0 if same else loop.epoch_progress.current.completed, loop.epoch_loop.batch_progress.current.ready

    def on_before_batch_transfer(self, batch: AnyBatch, dataloader_idx: int) -> AnyBatch:
        for fault in batch.pairs.faults:
            if fault not in self.unreadable:
                log.warning("Skipped: %s", fault)
            self.unreadable[fault] = None
        self.reading.check_limit("while reading", list(self.unreadable))
        return batch

    def on_after_batch_transfer(self, batch: AnyBatch, dataloader_idx: int) -> AnyBatch:
        if self.live_vote is None:
            return batch
        assert isinstance(batch, PreferenceBatch), "a live vote and a cache exclude each other"
        return self.live_vote.order(batch)

    def _release(self) -> None:
        for loader in list(self._loaders.values()):
            loader.release()

    def on_exception(self, exception: BaseException) -> None:
        self._release()  # Lightning does not call `teardown` after an exception

    def teardown(self, stage: str) -> None:
        self._release()
        if stage == "fit" and self.reading.on_error == "skip":
            broken = sum(len(shard.broken) for shard in self.train.shards)
            log.warning(
                "Skipped: %d broken training samples, and %d pairs that could not be read here.",
                broken,
                len(self.unreadable),
            )

    def state_dict(self) -> dict[str, Any]:
        if not self.train.shards:
            return {}
        live = {"augmentation": str(self.train.transform)}
        live |= {} if self.live_vote is None else {"vote": self.live_vote.describe()}
        return self._order(self.train, self.shuffle_window).fingerprint() | live | self._contents

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_order = state_dict
