"""Whether shards, scores and caches are here and agree, by the data module's own rules."""

from typing import Any

from lit_align.backbones import Backbone
from lit_align.commands.doctor.weights_check import weights_are_here
from lit_align.data import PreferenceDataModule
from lit_align.data.shards.scan import find_shards
from lit_align.data.shards.storage import is_url
from lit_align.data.split import Split


class DataCheck:
    """A look at a run's data.

    Args:
        data: not attached to a Trainer.
        devices: in all.
    """

    def __init__(self, data: PreferenceDataModule, devices: int) -> None:
        self.data, self.devices = data, devices
        self.pairs = 0  # that train
        self.batches = 0  # of an epoch and a device
        self.unindexed: list[str] = []  # training shards without an index

    def train(self) -> list[str]:
        """Of the training split: what there is and how an epoch divides.

        Raises:
            SampleError, ValueError, FileNotFoundError: where a run would.
        """
        lines = self._look(self.data.train)
        if self.data.train.shards:
            order = self.data.order(self.data.train, self.data.shuffle_window, 0, self.devices)
            self.data.check_train(order)
            self.pairs, self.batches = order.pairs, order.batches
            out = order.pairs - order.batches * order.batch_size * self.devices
            lines.append(f"an epoch: {order.batches:,} batches a device; {out:,} pairs sit it out")
        return lines

    def val(self) -> list[str]:
        """Of the held-out split."""
        if self.data.val is None:
            return ["none"]
        lines = self._look(self.data.val)
        if self.data.val.shards:
            self.data.check_val(self.data.order(self.data.val, 0, 0, self.devices))
        return lines

    def _look(self, split: Split) -> list[str]:
        files = find_shards(split.patterns, self.data.reading, must_exist=split.cache is None)
        bare = [file.path for file in files if file.rows is None]
        if split.name == "train":
            self.unindexed = bare
        if any(is_url(path) for path in bare):
            return [f"{len(files):,} shards, {len(bare):,} of them remote and without an index: not looked at"]
        split.look(self.data.vote, self.data.live_vote, self.data.aspect_buckets)
        pairs, ties, broken = (sum(map(count, split.shards)) for count in (len, _ties, _broken))
        return [
            f"{pairs:,} pairs in {len(files):,} shards, {len(files) - len(bare):,} of them with an index; left out: "
            f"{ties:,} ties, {broken:,} broken samples",
            f"ordered by {split.labels.describe()}",
        ]

    def cached(self) -> list[Split]:
        """The splits that are read from a cache."""
        return [split for split in (self.data.train, self.data.val) if split is not None and split.cache is not None]

    def expected(self, backbone: Backbone | None) -> dict[str, Any]:
        """What caches must have been made of: with the encoders, where their weights are here."""
        expected: dict[str, Any] = {"resolution": self.data.resolution, "aspect_buckets": self.data.aspect_buckets}
        if backbone is not None and weights_are_here(backbone):
            expected["encoders"] = backbone.encoders_identity()
        return expected


def cache_line(split: Split, expected: dict[str, Any]) -> str:
    """Whether a cache fits shards, resolution and encoders.

    Raises:
        ValueError, FileNotFoundError: where a run would.
    """
    split.source(expected)
    checked = "resolution, shards and encoders" if "encoders" in expected else "resolution and shards"
    return f"{split.name}: {split.cache} fits {checked}"


def _ties(shard: Any) -> int:
    return int(shard.ties)


def _broken(shard: Any) -> int:
    return len(shard.broken)
