"""Settings of a vote: who votes on a pair, and by which rule votes become a verdict."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_align.scoring import consensus
from lit_align.user_errors import UserValueError

Rule = Literal["majority", "unanimous", "single", "random", "vanilla", "normalized"]
HUMAN = "human"  # the stored label, as a voter or as the tie breaker
PREFER = "prefer:"


class Ballot(NamedTuple):
    """Scores, labels and keys of some pairs: the input of a vote."""

    differences: Mapping[str, Tensor]  # by scorer: (pairs,) score of image 0 minus score of image 1
    human: Tensor  # (pairs,) +1 where the human label prefers image 0, -1 where image 1, 0 for a tie
    keys: Sequence[str] | None = None  # keys of the pairs, which seed rule `random`
    scales: Mapping[str, float] | None = None  # by scorer: standard deviation of its scores over the dataset


class Verdict(NamedTuple):
    """Result of a vote."""

    sign: Tensor  # (pairs,) int64: +1 for image 0, -1 for image 1, 0 undecided
    vote_share: Tensor  # (pairs,) float32: share of all weights that voted for the verdict; 0 if the tie rule decided
    balance: Tensor  # (pairs,) float32: that share less the share against it, at least 0


@dataclass(frozen=True)
class Vote:
    """Vote of scorers on which image of a pair is preferred.

    Rules: `majority` (weighted by `weights`), `unanimous`, and the baselines of BalancedDPO's ablation: `single` (one
    voter), `random` (one voter drawn per pair), `vanilla` (sum of raw scores) and `normalized` (sum of scores divided
    by their standard deviation over the dataset).

    Args:
        voters: names of scorers; `human` is the stored label.
        rule: how votes become a verdict.
        ties: what decides a pair without a consensus: `human`, `skip` (not trained on) or `prefer:SCORER`.
        weights: weight by voter for rule `majority`; 1 for others.
        margins: score difference by voter up to which it abstains; 0 for others.
        seed: seed of rule `random`.
    """

    voters: list[str]
    rule: Rule = "majority"
    ties: str = HUMAN
    weights: dict[str, float] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_voters()
        self._check_rule()
        self._check_numbers()

    def _check_voters(self) -> None:
        if not self.voters or len(set(self.voters)) != len(self.voters):
            raise UserValueError(f"vote.voters is {self.voters}; name at least one voter, each one once.")
        if self.ties not in (HUMAN, "skip") and not self.ties.startswith(PREFER):
            raise UserValueError(f"vote.ties is {self.ties!r}; it must be human, skip or prefer:SCORER.")
        if not self.scorers:
            raise UserValueError(
                f"vote.voters is {self.voters}, no scorer among them. For the label alone, leave out the vote."
            )

    def _check_rule(self) -> None:
        if self.rule not in RULES:
            raise UserValueError(f"vote.rule is {self.rule!r}; it must be one of {', '.join(RULES)}.")
        if self.rule == "single" and len(self.voters) != 1:
            raise UserValueError(f"vote.rule single needs one voter, but vote.voters names {len(self.voters)}.")
        if self.rule in ("vanilla", "normalized") and HUMAN in self.voters:
            raise UserValueError(f"vote.rule {self.rule} adds scores, and voter 'human' has none. Leave it out.")
        if self.weights and self.rule != "majority":
            raise UserValueError(
                f"vote.weights only apply to rule majority, but vote.rule is {self.rule}. Leave them out."
            )

    def _check_numbers(self) -> None:
        for name, values in (("weights", self.weights), ("margins", self.margins)):
            for voter, value in values.items():
                if voter not in self.voters or (voter == HUMAN and name == "margins"):
                    raise UserValueError(
                        f"vote.{name} names {voter!r}, which is not a scorer among vote.voters {self.voters}."
                    )
                if not value >= 0:
                    raise UserValueError(f"vote.{name}: {voter} has {value}; it must be at least 0.")
        if not any(self.weights.get(voter, 1.0) for voter in self.voters):
            raise UserValueError("vote.weights are all 0, so nobody votes. Give one voter a weight above 0.")

    @property
    def scorers(self) -> list[str]:
        """Names of the scorers whose scores are needed, the tie breaker included."""
        preferred = [self.ties.removeprefix(PREFER)] if self.ties.startswith(PREFER) else []
        return [name for name in dict.fromkeys([*self.voters, *preferred]) if name != HUMAN]

    @property
    def needs_data_set(self) -> bool:
        """Whether a verdict depends on the pair's key or on all other pairs' scores."""
        return self.rule in ("random", "normalized")

    def decide(self, ballot: Ballot) -> Verdict:
        """Decide which image of each pair is preferred."""
        votes = self._votes(ballot)
        agreed = RULES[self.rule](self, votes, ballot)
        sign = consensus.break_ties(agreed, self._tie_breaker(ballot))
        weights = self._weights()
        share, balance = consensus.support(votes, agreed, weights), consensus.balance(votes, agreed, weights)
        return Verdict(sign.long(), share.float(), balance.float())

    def _votes(self, ballot: Ballot) -> Tensor:
        """Votes (pairs, voters) as signs."""
        margins = {voter: torch.tensor(self.margins.get(voter, 0.0)) for voter in self.voters}
        columns = [
            ballot.human.double() if voter == HUMAN else consensus.cast_votes(ballot.differences[voter], margin)
            for voter, margin in margins.items()
        ]
        return torch.stack(columns, 1)

    def _weights(self) -> Tensor:
        return torch.tensor([self.weights.get(voter, 1.0) for voter in self.voters], dtype=torch.float64)

    def _differences(self, ballot: Ballot) -> Tensor:
        """Raw score differences (pairs, voters); 0 where the voter abstains."""
        raw = torch.stack([ballot.differences[voter].double() for voter in self.voters], 1)
        return raw * self._votes(ballot).abs()

    def _scales(self, ballot: Ballot) -> Tensor:
        assert ballot.scales is not None, "needs_data_set"
        return torch.tensor([ballot.scales[voter] for voter in self.voters], dtype=torch.float64)

    def _random_voters(self, ballot: Ballot) -> Tensor:
        """Draw a voter's column (pairs,) for each pair, from seed and key alone."""
        assert ballot.keys is not None, "needs_data_set"
        digests = [hashlib.sha256(f"{self.seed}/{key}".encode()).digest() for key in ballot.keys]
        return torch.tensor([int.from_bytes(digest[:8], "big") % len(self.voters) for digest in digests])

    def _tie_breaker(self, ballot: Ballot) -> Tensor:
        """Votes (pairs,) of the tie breaker."""
        if self.ties == HUMAN:
            return ballot.human
        if self.ties == "skip":
            return torch.zeros_like(ballot.human)
        return consensus.cast_votes(ballot.differences[self.ties.removeprefix(PREFER)], torch.tensor(0.0))

    def __str__(self) -> str:
        weights = f", weights {self.weights}" if self.weights else ""
        margins = f", margins {self.margins}" if self.margins else ""
        seed = f", seed {self.seed}" if self.rule == "random" else ""
        return f"{self.rule} of {', '.join(self.voters)}{weights}{margins}{seed}; ties: {self.ties}"


RULES: dict[str, Callable[[Vote, Tensor, Ballot], Tensor]] = {
    "majority": lambda vote, votes, ballot: consensus.majority(votes, vote._weights()),
    "unanimous": lambda vote, votes, ballot: consensus.unanimous(votes),
    "single": lambda vote, votes, ballot: consensus.single(votes, 0),
    "random": lambda vote, votes, ballot: consensus.random_voter(votes, vote._random_voters(ballot)),
    "vanilla": lambda vote, votes, ballot: consensus.vanilla(vote._differences(ballot)),
    "normalized": lambda vote, votes, ballot: consensus.normalized(vote._differences(ballot), vote._scales(ballot)),
}
