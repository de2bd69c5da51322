"""Labels known before training: they choose an image of each pair by the human label or a vote on stored scores."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_align.data.labels.score_files import Scores, Survey, read_scores, side_file
from lit_align.scoring.vote import Ballot, Vote


class Decisions(NamedTuple):
    """Chosen images of a shard's samples, in the shard's order."""

    sign: NDArray[np.int8]  # (samples,) +1: image 0 is chosen, -1: image 1 is, 0: undecided
    vote_share: NDArray[np.float32]  # (samples,) share of the votes' weight for the decision
    balance: NDArray[np.float32]  # (samples,) that share less the share against it
    contents: list[str]  # `content_digest` of what was scored; empty if nothing was
    faults: dict[int, str]  # why samples cannot be decided, by position


class _Found(NamedTuple):
    """Stored scores of a shard's samples."""

    contents: list[str]  # as in `Decisions`
    faults: dict[int, str]  # as in `Decisions`
    rows: dict[str, Tensor]  # by scorer: positions of the scores of the samples without a fault, in their order


class Labels(ABC):
    """Rule that chooses an image of each pair."""

    voted: bool
    keep_undecided: bool = False  # whether a live vote decides later

    @abstractmethod
    def decide(self, shard: str, keys: list[str], human: NDArray[np.int8]) -> Decisions:
        """Choose an image of each sample.

        Args:
            shard: path or URL.
            keys: of all samples.
            human: (samples,) human labels: +1: image 0 is preferred, -1: image 1 is, 0: a tie.
        """

    @abstractmethod
    def describe(self) -> str:
        """Describe the rule in words; two rules with equal words choose equally."""


@dataclass(frozen=True)
class HumanLabels(Labels):
    """Choose by the label in the shard; `keep_undecided` keeps ties, for a live vote during training."""

    keep_undecided: bool = False
    voted = False

    def decide(self, shard: str, keys: list[str], human: NDArray[np.int8]) -> Decisions:
        nothing = np.broadcast_to(np.float32(0), len(keys))
        return Decisions(human, nothing, nothing, [""] * len(keys), {})

    def describe(self) -> str:
        return "the human label, until a vote while training" if self.keep_undecided else "the human label"


@dataclass(frozen=True)
class VotedLabels(Labels):
    """Choose by a vote on the scores in side files.

    Args:
        vote: scorers and tie rule.
        folder: of the side files; None: beside the shards.
        surveys: summary of all side files, by scorer.
    """

    vote: Vote
    folder: str | None = None
    surveys: dict[str, Survey] = field(default_factory=dict)
    voted = True

    def decide(self, shard: str, keys: list[str], human: NDArray[np.int8]) -> Decisions:
        absent = any(shard in found.missing for found in self.surveys.values())  # also if scored meanwhile
        scores = {} if absent else read_scores(side_file(shard, self.folder))
        found = self._all(keys, scores) or self._each(shard, keys, scores)
        scored = [number for number in range(len(keys)) if number not in found.faults]
        sign, (vote_share, balance) = np.zeros(len(keys), np.int8), np.zeros((2, len(keys)), np.float32)
        if scored:
            verdict = self.vote.decide(self._ballot(scores, found, [keys[number] for number in scored], human[scored]))
            sign[scored], vote_share[scored] = verdict.sign.numpy(), verdict.vote_share.numpy()
            balance[scored] = verdict.balance.numpy()
        return Decisions(sign, vote_share, balance, found.contents, found.faults)

    def _all(self, keys: list[str], scores: dict[str, Scores]) -> "_Found | None":
        """Find the scores of a shard whose samples all have them, in its order and of equal contents; else None."""
        first, *others = [scores.get(name) for name in self.vote.scorers]
        if first is None or any(other is None or other.contents != first.contents for other in others):
            return None
        if not all(scores[name].keys == keys and scores[name].finite.all() for name in self.vote.scorers):
            return None
        return _Found(first.contents, {}, dict.fromkeys(self.vote.scorers, torch.arange(len(keys))))

    def _each(self, shard: str, keys: list[str], scores: dict[str, Scores]) -> "_Found":
        """Find the scores of each sample by its key."""
        rows = {name: scores[name].rows() if name in scores else {} for name in self.vote.scorers}
        contents, faults = [""] * len(keys), dict[int, str]()
        for number, key in enumerate(keys):
            seen = {scores[name].contents[known[key]] for name, known in rows.items() if key in known}
            if any(key not in known for known in rows.values()):
                faults[number] = self._unscored(shard, key)
            elif len(seen) > 1:
                faults[number] = stale(f"shard {shard}, key {key}")
            else:
                (contents[number],) = seen
        scored = [key for number, key in enumerate(keys) if number not in faults]
        return _Found(contents, faults, {n: torch.tensor([known[key] for key in scored]) for n, known in rows.items()})

    def _ballot(self, scores: dict[str, Scores], found: "_Found", keys: list[str], human: NDArray[np.int8]) -> Ballot:
        differences = {
            name: (scores[name].score_0.double() - scores[name].score_1.double())[rows]
            for name, rows in found.rows.items()
        }
        scales = {name: summary.scale for name, summary in self.surveys.items()}
        return Ballot(differences, torch.from_numpy(human.astype(np.int64)), keys, scales)

    def _unscored(self, shard: str, key: str) -> str:
        return (
            f"shard {shard}, key {key}: {side_file(shard, self.folder)} lacks a score of it by one of "
            f"{', '.join(self.vote.scorers)}. Run lit-align score on this shard, with the same options."
        )

    def describe(self) -> str:
        scorers = "; ".join(f"{name}: {found.identity}" for name, found in sorted(self.surveys.items()))
        return f"{self.vote} ({scorers})"


def stale(location: str) -> str:
    """Message for a sample whose images or prompt have changed since they were scored."""
    return (
        f"{location}: its scores are stale: images or prompt have changed since they were scored. "
        "Run lit-align score on this shard, with the same options and --overwrite."
    )
