"""Which image of a pair is the chosen one: the human label's, or that of a vote on stored scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lit_align.data.samples import RawPair, SampleError
from lit_align.data.scores import Survey, content_digest, read_scores, side_file
from lit_align.scoring.vote import Ballot, Vote


class Decision(NamedTuple):
    """The label of one pair."""

    sign: int  # +1: image 0 is chosen, -1: image 1 is, 0: undecided
    strength: float = 0.0  # of the vote
    content: str | None = None  # digest of what was scored


class Labels(ABC):
    """Decides the pairs of a shard."""

    voted: bool
    keep_undecided: bool = False  # whether somebody further on decides

    @abstractmethod
    def of_shard(self, shard: str) -> Callable[[RawPair], Decision]:
        """A function that decides the shard's pairs.

        Raises:
            SampleError: from that function, if a pair has no scores.
        """

    @abstractmethod
    def describe(self) -> str:
        """In words, with all that makes a difference."""


def human_sign(pair: RawPair) -> int:
    """+1 where the human label prefers image 0, -1 where image 1, 0 for a tie."""
    return round(2 * pair.label_0 - 1)


@dataclass(frozen=True)
class HumanLabels(Labels):
    """The label in the shard. With `keep_undecided` ties stay in, for a vote in the training loop."""

    keep_undecided: bool = False
    voted = False

    def of_shard(self, shard: str) -> Callable[[RawPair], Decision]:
        return lambda pair: Decision(human_sign(pair))

    def describe(self) -> str:
        return "the human label, until a vote while training" if self.keep_undecided else "the human label"


@dataclass(frozen=True)
class VotedLabels(Labels):
    """A vote on the scores in side files.

    Args:
        vote: voters and rules.
        folder: of the side files; none: beside the shards.
        surveys: what all side files together hold, by scorer.
    """

    vote: Vote
    folder: str | None = None
    surveys: dict[str, Survey] = field(default_factory=dict)
    voted = True

    def of_shard(self, shard: str) -> Callable[[RawPair], Decision]:
        path = side_file(shard, self.folder)
        decisions = self._decisions(shard)

        def decide(pair: RawPair) -> Decision:
            by_label = decisions.get(pair.key)
            if by_label is None:
                raise SampleError(
                    f"{pair.place}: {path} lacks a score of it by one of {', '.join(self.vote.scorers)}. "
                    f"Run: lit-align score --shards {shard} --scorers {','.join(self.vote.scorers)}."
                )
            return by_label[human_sign(pair)]

        return decide

    def _decisions(self, shard: str) -> dict[str, dict[int, Decision]]:
        """By key, then by human label, which may be a voter or the tie breaker."""
        scores = read_scores(side_file(shard, self.folder))
        if any(name not in scores for name in self.vote.scorers):
            return {}
        if not self.vote.scorers:
            raise ValueError("vote.voters names no scorer. For the human label alone leave data.vote out.")
        rows = {name: {key: row for row, key in enumerate(scores[name].keys)} for name in self.vote.scorers}
        first = scores[self.vote.scorers[0]]
        content = dict(zip(first.keys, first.contents, strict=True))
        keys = [key for key in first.keys if all(key in known for known in rows.values())]
        differences, stale = {}, set()
        for name, known in rows.items():
            order = torch.tensor([known[key] for key in keys], dtype=torch.long)
            differences[name] = (scores[name].score_0.double() - scores[name].score_1.double())[order]
            stale |= {key for key in keys if scores[name].contents[known[key]] != content[key]}
        scales = {name: found.scale for name, found in self.surveys.items()}
        decided: dict[str, dict[int, Decision]] = {key: {} for key in keys if key not in stale}
        for human in (-1, 0, 1):
            labels = torch.full((len(keys),), human)
            verdict = self.vote.decide(Ballot(differences, labels, keys, scales))
            for key, sign, strength in zip(keys, verdict.sign.tolist(), verdict.strength.tolist(), strict=True):
                if key in decided:
                    decided[key][human] = Decision(sign, strength, content[key])
        return decided

    def describe(self) -> str:
        scorers = "; ".join(f"{name}: {found.identity}" for name, found in sorted(self.surveys.items()))
        return f"{self.vote} ({scorers})"


def check_content(pair: RawPair, decision: Decision) -> None:
    """Refuse scores of other images or another prompt.

    Raises:
        SampleError: if the pair has changed since it was scored.
    """
    if decision.content is not None and decision.content != content_digest(pair):
        raise SampleError(
            f"{pair.place}: its scores are stale: images or prompt have changed since they were scored. "
            f"Run: lit-align score --shards {pair.shard} ... --overwrite true."
        )
