"""The training or the held-out set of shards: its pairs, their labels and their reader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_align.common.paths import expand_home
from lit_align.data.cache.pairs import CachedPairReader
from lit_align.data.cache.reader import Cache
from lit_align.data.dataset import PairReader, ShardPairReader
from lit_align.data.images import PairTransform
from lit_align.data.labels.live_vote import LiveVote
from lit_align.data.labels.score_files import survey
from lit_align.data.labels.stored import HumanLabels, Labels, VotedLabels
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.layout import read_samples
from lit_align.data.shards.listing import ShardFile, find_shards
from lit_align.data.shards.scan import Shard, scan_shards
from lit_align.data.shards.spooled import WHOLE, share_copies
from lit_align.scoring.vote import Vote
from lit_align.user_errors import UserValueError


@dataclass
class Split:
    """Set of shards, named `train` or `val` after its options.

    Args:
        name: `train` or `val`.
        patterns: of the shards.
        scores: folder of the side files; None: beside the shards.
        cache: folder of latents and conditioning; None: images are decoded.
        transform: of the images.
        reading: how shards are read.
        shards: result of `scan`.
        labels: rule that chooses images, set by `scan`.
    """

    name: str
    patterns: str | list[str]
    scores: str | None
    cache: str | None
    transform: PairTransform
    reading: ReadOptions
    shards: tuple[Shard, ...] = ()
    labels: Labels = field(default_factory=HumanLabels)

    def __post_init__(self) -> None:
        self.scores, self.cache = (None if path is None else expand_home(path) for path in (self.scores, self.cache))
        if self.cache is not None and self.transform.crop != "center":
            raise UserValueError(
                f"data.crop is {self.transform.crop}; a cache holds the centre. Set it to center, or no train_cache."
            )

    def scan(self, vote: Vote | None, live_vote: LiveVote | None, sizes: bool) -> None:
        """Find the shards, read all labels, and log the numbers of pairs and faults.

        Args:
            vote: chooses images by stored scores.
            live_vote: chooses images while training.
            sizes: also read the images' sizes.

        Raises:
            SampleError, ValueError, FileNotFoundError: if shards or scores are missing, broken or contradictory.
        """
        option, reading = f"data.{self.name}_shards", self.reading
        files = find_shards(self.patterns, reading, must_exist=reading.on_error == "raise" and self.cache is None)
        self.labels = self._labels(files, vote, live_vote)
        cached = self.cache is not None
        self.shards = tuple(scan_shards(files, self.labels, reading, sizes, cached))
        pairs, ties = sum(map(len, self.shards)), sum(shard.ties for shard in self.shards)
        broken = [fault for shard in self.shards for fault in shard.broken]
        rank_zero_info(
            f"{self.name}: {pairs:,} pairs in {len(files)} shards; left out: {ties:,} ties, {len(broken):,} broken "
            f"samples\n  ordered by {(live_vote or self.labels).describe()}"
        )
        if self.labels.voted:
            contested, disputed = (sum(getattr(s, name) for s in self.shards) for name in ("contested", "disputed"))
            rank_zero_info(
                f"  the tie rule decided {contested:,} pairs; the order is against the human label on {disputed:,}"
            )
        reading.check_limit(option, broken)
        if pairs == 0:
            raise UserValueError(f"{option}: no pair with a preference in {len(files)} shards ({ties} ties).")

    def _labels(self, files: Sequence[ShardFile], vote: Vote | None, live_vote: LiveVote | None) -> Labels:
        if live_vote is not None:
            return HumanLabels(keep_undecided=True)
        if vote is None:
            return HumanLabels()
        paths = [file.path for file in files]
        surveys = survey(paths, self.scores, vote.scorers)
        for scorer, found in surveys.items():
            missing = [shard for shard in paths if shard in found.missing and any(read_samples(shard, 0))]
            if missing and self.reading.on_error == "raise":
                raise UserValueError(
                    f"data.{self.name}_shards: {len(missing)} of {len(paths)} shards have no scores by {scorer!r}, "
                    f"first {missing[0]}. Run lit-align score again with the same options to resume it."
                )
        return VotedLabels(vote, self.scores, surveys)

    def reader(self, expected: Mapping[str, Any]) -> PairReader:
        """Make the reader of the pairs, from shards or from the cache.

        Args:
            expected: entries that a cache's fingerprint must have, see `cache.format.rules`.

        Raises:
            ValueError: if the cache does not fit, or lacks a shard.
            FileNotFoundError: if the folder holds no cache.
        """
        if self.cache is None:
            if any(shard.path.startswith(WHOLE) for shard in self.shards):
                share_copies()
            return ShardPairReader(self.transform, self.reading)
        cache = Cache.open(self.cache)
        cache.check(expected)
        absent = [shard.path for shard in self.shards if len(shard) and not cache.has(shard.path)]
        if absent:
            raise UserValueError(
                f"data.{self.name}_cache {self.cache} lacks {len(absent)} of {len(self.shards)} shards, first "
                f"{absent[0]}. Run lit-align encode on these shards."
            )
        if self.transform.flip_probability > 0 and cache.fingerprint["flips"] != "both":
            raise UserValueError(
                f"data.{self.name}_cache {self.cache} has no mirrored images. Set data.flip_probability to 0, "
                "or encode with --flips both."
            )
        if self.name == "val" and cache.moments == 1:
            rank_zero_info(f"{self.cache} holds samples, not means: errors differ from uncached validation.")
        return CachedPairReader(cache, self.transform.flip_probability)
