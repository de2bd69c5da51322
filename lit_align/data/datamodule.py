"""The LightningDataModule that streams preference pairs."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_align.data.images import Crop, PairTransform
from lit_align.data.labels import HumanLabels, Labels, VotedLabels
from lit_align.data.live_vote import LiveVote
from lit_align.data.samples import read_samples
from lit_align.data.scores import survey
from lit_align.data.shards import OnError, Shard, expand, scan
from lit_align.data.stream import Order, PairStream
from lit_align.scoring.base import Scorer
from lit_align.scoring.vote import Vote
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
        vote: order pairs by the vote of scorers, on the scores that `lit-align score` has stored.
        train_scores: folder of the training shards' side files; none: beside the shards.
        val_scores: the same of the held-out shards.
        scorers: score while training, by these scorers, in place of stored scores; names are those of the voters.
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
        vote: Vote | None = None,
        train_scores: str | None = None,
        val_scores: str | None = None,
        scorers: dict[str, Scorer] | None = None,
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
        self.vote, self.train_scores, self.val_scores = vote, train_scores, val_scores
        self.live_vote = None if scorers is None else LiveVote(vote, scorers)
        self.batch_size, self.num_workers, self.shuffle_window = batch_size, num_workers, shuffle_window
        self.on_error, self.seed = on_error, seed
        self.train_transform = PairTransform(resolution, crop, flip_probability)
        self.val_transform = PairTransform(resolution, "center", 0.0)
        self.train: tuple[Shard, ...] = ()
        self.val: tuple[Shard, ...] = ()
        self.train_labels: Labels = HumanLabels()
        self.val_labels: Labels = HumanLabels()
        self.unreadable = 0  # training pairs of this rank that could not be decoded
        self._resumed_order: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.train:
            self.train, self.train_labels = self._scan("train_shards", self.train_shards, self.train_scores)
        if self.val_shards is not None and not self.val:
            self.val, self.val_labels = self._scan("val_shards", self.val_shards, self.val_scores)

    def _scan(self, name: str, patterns: str | Sequence[str], scores: str | None) -> tuple[tuple[Shard, ...], Labels]:
        paths = expand(patterns)
        labels = self._labels(name, paths, scores)
        shards = tuple(scan(paths, labels, self.on_error))
        pairs, ties = sum(shard.pairs for shard in shards), sum(shard.ties for shard in shards)
        broken = sum(shard.broken for shard in shards)
        rank_zero_info(
            f"{name}: {pairs:,} pairs in {len(shards)} shards; left out: {ties:,} ties, {broken:,} broken samples"
        )
        order = labels if self.live_vote is None else self.live_vote
        rank_zero_info(f"  ordered by {order.describe()}")
        if labels.voted:
            contested, disputed = sum(s.contested for s in shards), sum(s.disputed for s in shards)
            rank_zero_info(
                f"  the tie rule decided {contested:,} pairs; the order is against the human label on {disputed:,}"
            )
        if pairs == 0:
            raise ValueError(f"data.{name}: no pair with a preference in {len(shards)} shards ({ties} ties).")
        return shards, labels

    def _labels(self, name: str, paths: Sequence[str], scores: str | None) -> Labels:
        if self.live_vote is not None:
            return HumanLabels(keep_undecided=True)
        if self.vote is None:
            return HumanLabels()
        surveys = survey(paths, scores, self.vote.scorers)
        for scorer, found in surveys.items():
            missing = [shard for shard in paths if shard in found.missing and any(read_samples(shard, False))]
            if missing and self.on_error == "raise":
                raise ValueError(
                    f"data.{name}: {len(missing)} of {len(paths)} shards have no scores by {scorer!r}, first "
                    f"{missing[0]}. Run lit-align score again with the same options: it goes on where it stopped."
                )
        return VotedLabels(self.vote, scores, surveys)

    def train_dataloader(self) -> "PairLoader":
        order = self._order(self.train, self.shuffle_window, self.train_labels)
        if order.batches == 0:
            total = sum(shard.pairs for shard in self.train)
            raise ValueError(
                f"data.train_shards hold {total} pairs, fewer than one batch of data.batch_size {self.batch_size} "
                f"on each of {order.world_size} devices. Lower data.batch_size or use fewer devices."
            )
        self._check_resumed()
        return PairLoader(order, self.train_transform, self.on_error, self._position)

    def val_dataloader(self) -> "PairLoader | list[PairLoader]":
        if not self.val:
            return []
        order = self._order(self.val, 0, self.val_labels)
        return PairLoader(order, self.val_transform, self.on_error, lambda: (0, 0))

    def _order(self, shards: tuple[Shard, ...], shuffle_window: int, labels: Labels) -> Order:
        # Rank and world size come from the Trainer: a spawned worker finds no process group.
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Order(shards, self.batch_size, rank, world_size, self.seed, shuffle_window, self.num_workers, labels)

    def _position(self) -> tuple[int, int]:
        """Epoch and batches trained in it, from the Trainer's own counters, which checkpoints restore."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def on_before_batch_transfer(self, batch: PreferenceBatch, dataloader_idx: int) -> PreferenceBatch:
        if self.on_error == "skip" and self.trainer is not None and self.trainer.training:
            self.unreadable += int((batch.weight == 0).sum())
        return batch

    def on_after_batch_transfer(self, batch: PreferenceBatch, dataloader_idx: int) -> PreferenceBatch:
        return batch if self.live_vote is None else self.live_vote.order(batch)

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.on_error == "skip":
            broken = sum(shard.broken for shard in self.train)
            log.warning(
                "Skipped in training: %d broken samples per epoch, %d reads of unreadable images or stale scores here.",
                broken,
                self.unreadable,
            )

    def state_dict(self) -> dict[str, Any]:
        if not self.train:
            return {}
        live = {} if self.live_vote is None else {"vote": self.live_vote.describe()}
        return self._order(self.train, self.shuffle_window, self.train_labels).fingerprint() | live

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_order = state_dict

    def _check_resumed(self) -> None:
        """Refuse to continue a run in another order than it began in."""
        if not self._resumed_order:
            return
        now = self.state_dict()
        then = {"labels": "the human label"} | self._resumed_order  # older checkpoints knew no other
        changed = [f"{k} was {then.get(k)}, is {now.get(k)}" for k in then | now if then.get(k) != now.get(k)]
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
