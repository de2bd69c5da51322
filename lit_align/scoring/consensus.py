"""Rules by which several scorers decide together which image of a pair is better: pure functions on tensors.

A vote is a sign: +1 for image 0, -1 for image 1, 0 for an abstention; votes are (pairs, voters). Counting signs keeps
one scorer's scale from dominating (BalancedDPO, arXiv 2503.12575). The paper does not spell the rules out: these are
a reconstruction, with the baselines that its ablation names.
"""

import torch
from torch import Tensor

ROUNDING = 1e-9  # balances closer to 0 are ties: 0.1 + 0.2 - 0.3 rounds to 6e-17


def cast_votes(differences: Tensor, margins: Tensor) -> Tensor:
    """Turn score differences into votes, float64 of the shape of `differences`.

    Args:
        differences: (pairs, voters) score of image 0 minus score of image 1.
        margins: (voters,) in the unit of the voter's score; a voter abstains up to this difference.
    """
    return differences.sign().double() * (differences.abs() > margins)


def majority(votes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Decide by the sign of the sum of votes (pairs,), weighted by `weights` (voters,)."""
    return _sign(tally(votes, weights))


def tally(votes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Balance of votes (pairs,) as a share of all weights, from -1 to 1; 1 where all voters prefer image 0."""
    weights = torch.ones(votes.shape[1]) if weights is None else weights
    return votes @ weights.double() / weights.double().sum()


def support(votes: Tensor, agreed: Tensor, weights: Tensor) -> Tensor:
    """Share (pairs,) of all weights that votes for the consensus `agreed` (pairs,); 0 without a consensus."""
    backing = ((votes == agreed[:, None]) & (agreed[:, None] != 0)).double()
    return backing @ weights.double() / weights.double().sum()


def balance(votes: Tensor, agreed: Tensor, weights: Tensor) -> Tensor:
    """Share (pairs,) of all weights for the consensus `agreed` less that against it, at least 0; 0 without one."""
    return (tally(votes, weights) * agreed).clamp(min=0)


def unanimous(votes: Tensor) -> Tensor:
    """Decide (pairs,) only where all voters agree; an abstention counts as disagreement."""
    return _sign(torch.where(tally(votes).abs() > 1 - ROUNDING, tally(votes), 0.0))


def single(votes: Tensor, voter: int) -> Tensor:
    """Decide (pairs,) by one voter alone."""
    return votes[:, voter]


def random_voter(votes: Tensor, chosen: Tensor) -> Tensor:
    """Decide (pairs,) each pair by one voter, whose column is in `chosen` (pairs,) int64."""
    return votes.gather(1, chosen[:, None])[:, 0]


def vanilla(differences: Tensor) -> Tensor:
    """Decide (pairs,) by the sign of the sum of raw score differences: the scorer with the widest scale dominates."""
    return differences.double().sum(1).sign()


def normalized(differences: Tensor, scales: Tensor) -> Tensor:
    """Decide (pairs,) by the sum of z-scored differences; the means of the scores cancel.

    Args:
        differences: (pairs, voters) score of image 0 minus score of image 1.
        scales: (voters,) standard deviation of each voter's scores over the dataset.
    """
    return vanilla(differences.double() / scales)


def break_ties(consensus: Tensor, tie_breaker: Tensor) -> Tensor:
    """Return the consensus (pairs,), or the tie breaker's vote where there is none; 0 where both abstain."""
    return torch.where(consensus == 0, tie_breaker.to(consensus), consensus)


def _sign(balance: Tensor) -> Tensor:
    return torch.where(balance.abs() > ROUNDING, balance.sign(), 0.0)
