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
    contents: frozenset[str] = frozenset()  # digests of what the scorers saw; one, unless some are stale


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
        absent = any(shard in found.missing for found in self.surveys.values())  # for the whole run
        decisions = {} if absent else self._decisions(shard)

        def decide(pair: RawPair) -> Decision:
            by_label = decisions.get(pair.key)
            if by_label is None:
                raise SampleError(
                    f"{pair.place}: {side_file(shard, self.folder)} lacks a score of it by one of "
                    f"{', '.join(self.vote.scorers)}. Run lit-align score on this shard, with the same options."
                )
            return by_label[human_sign(pair)]

        return decide

    def _decisions(self, shard: str) -> dict[str, dict[int, Decision]]:
        """By key, then by human label, which may be a voter or the tie breaker."""
        scores = read_scores(side_file(shard, self.folder))
        if any(name not in scores for name in self.vote.scorers):
            return {}
        rows = {name: scores[name].rows() for name in self.vote.scorers}
        first, *others = rows.values()
        keys = [key for key in first if all(key in other for other in others)]
        differences, contents = {}, []
        for name, known in rows.items():
            order = torch.tensor([known[key] for key in keys], dtype=torch.long)
            differences[name] = (scores[name].score_0.double() - scores[name].score_1.double())[order]
            contents.append([scores[name].contents[known[key]] for key in keys])
        seen = [frozenset(digests) for digests in zip(*contents, strict=True)]
        scales = {name: found.scale for name, found in self.surveys.items()}
        decided: dict[str, dict[int, Decision]] = {key: {} for key in keys}
        for human in (-1, 0, 1):
            labels = torch.full((len(keys),), human)
            verdict = self.vote.decide(Ballot(differences, labels, keys, scales))
            signs, strengths = verdict.sign.tolist(), verdict.strength.tolist()
            for key, sign, strength, digests in zip(keys, signs, strengths, seen, strict=True):
                decided[key][human] = Decision(sign, strength, digests)
        return decided

    def describe(self) -> str:
        scorers = "; ".join(f"{name}: {found.identity}" for name, found in sorted(self.surveys.items()))
        return f"{self.vote} ({scorers})"


def check_content(pair: RawPair, decision: Decision) -> None:
    """Refuse scores of other images or another prompt.

    Raises:
        SampleError: if the pair has changed since it was scored.
    """
    if decision.contents and decision.contents != {content_digest(pair)}:
        raise SampleError(
            f"{pair.place}: its scores are stale: images or prompt have changed since they were scored. "
            "Run lit-align score on this shard, with the same options and --overwrite."
        )
