"""Check that shards, scores and caches are present and agree, by the data module's own rules."""

from typing import Any

from lit_align.backbones import Backbone
from lit_align.commands.doctor.weights_check import weights_are_here
from lit_align.data import PreferenceDataModule
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.listing import find_shards
from lit_align.data.split import Split


class DataCheck:
    """Checks a run's data.

    Args:
        data: data module, not attached to a Trainer.
        devices: number of devices on all nodes.
    """

    def __init__(self, data: PreferenceDataModule, devices: int) -> None:
        self.data, self.devices = data, devices
        self.batches = 0  # per epoch and device
        self.unindexed: list[str] = []  # training shards without an index
        self._expected: dict[str, Any] | None = None  # see `cache_lines`; digesting weights takes a while

    def train(self) -> list[str]:
        """Describe the training split and its epochs.

        Raises:
            SampleError, ValueError, FileNotFoundError: where a run would.
        """
        lines = self._read(self.data.train)
        if self.data.train.shards:
            order = self.data.order(self.data.train, self.data.shuffle_window, 0, self.devices)
            self.data.check_train(order)
            self.batches = order.batches
            left = order.pairs - order.batches * order.batch_size * self.devices
            lines.append(f"an epoch: {order.batches:,} batches a device; {left:,} pairs are left over")
        return lines

    def val(self) -> list[str]:
        """Describe the held-out split."""
        if self.data.val is None:
            return ["none"]
        lines = self._read(self.data.val)
        if self.data.val.shards:
            self.data.check_val(self.data.order(self.data.val, 0, 0, self.devices))
        return lines

    def _read(self, split: Split) -> list[str]:
        files = find_shards(split.patterns, self.data.reading, must_exist=split.cache is None)
        bare = [file.path for file in files if file.rows is None]
        if split.name == "train":
            self.unindexed = bare
        if any(is_url(path) for path in bare):
            return [f"{len(files):,} shards, {len(bare):,} of them remote and without an index: not checked"]
        split.scan(self.data.vote, self.data.live_vote, self.data.aspect_buckets)
        pairs, ties = sum(map(len, split.shards)), sum(shard.ties for shard in split.shards)
        broken = sum(len(shard.broken) for shard in split.shards)
        return [
            f"{pairs:,} pairs in {len(files):,} shards, {len(files) - len(bare):,} of them with an index; left out: "
            f"{ties:,} ties, {broken:,} broken samples",
            f"ordered by {split.labels.describe()}",
        ]

    def cached(self) -> list[Split]:
        """List the splits that are read from a cache."""
        return [split for split in (self.data.train, self.data.val) if split is not None and split.cache is not None]

    def cache_lines(self, split: Split, backbone: Backbone | None) -> list[str]:
        """Check that a split's cache fits shards, resolution and encoders.

        Raises:
            ValueError, FileNotFoundError: where a run would.
        """
        if self._expected is None:
            self._expected = self._expect(backbone)
        split.reader(self._expected)
        checked = "resolution, shards and encoders" if "encoders" in self._expected else "resolution and shards"
        return [f"{split.name}: {split.cache} fits {checked}"]

    def _expect(self, backbone: Backbone | None) -> dict[str, Any]:
        """Return what caches must have been made with; the encoders only if their weights are on this machine."""
        expected: dict[str, Any] = {"resolution": self.data.resolution, "aspect_buckets": self.data.aspect_buckets}
        if backbone is not None and weights_are_here(backbone):
            expected["encoders"] = backbone.encoders_identity()
        return expected


def reading_line(options: Any) -> str:
    """Describe who reads the pairs of a data module's options, and in which batches."""
    readers = f"{options.num_workers} workers a device" if options.num_workers else "the training process"
    if options.num_workers and options.val_shards is not None:
        readers += f" and {options.num_workers} more for the held-out pairs"
    return f"read by {readers}; batches of {options.batch_size} pairs at {options.resolution} px"
