"""Which image of a pair several scorers prefer together: pure functions on tensors.

A vote is a sign: +1 for image 0, -1 for image 1, 0 for an abstention. Votes are (pairs, voters). Only signs are
counted, so that no scorer's scale dominates (the idea of BalancedDPO, arXiv 2503.12575; the rules are a
reconstruction, with the baselines that the paper's ablation names).
"""

import torch
from torch import Tensor

ROUNDING = 1e-9  # a weighted sum closer to zero than this part of all weights is a tie: 0.1 + 0.2 - 0.3 is one


def cast_votes(differences: Tensor, margins: Tensor) -> Tensor:
    """Votes, float64, of score differences image 0 - image 1 (pairs, voters).

    A voter abstains where the difference is not greater than its margin (voters,), in the unit of its score.
    """
    return differences.sign().double() * (differences.abs() > margins)


def majority(votes: Tensor, weights: Tensor | None = None) -> Tensor:
    """(pairs,): the sign of the (weighted) sum of votes; weights are (voters,)."""
    return _sign(tally(votes, weights))


def tally(votes: Tensor, weights: Tensor | None = None) -> Tensor:
    """(pairs,) in [-1, 1]: the balance of votes as part of all weights; 1 where all voters agree on image 0."""
    weights = torch.ones(votes.shape[1]) if weights is None else weights
    return votes @ weights.double() / weights.double().sum()


def support(votes: Tensor, agreed: Tensor, weights: Tensor) -> Tensor:
    """(pairs,) in [0, 1]: the part of all weight that is for the consensus `agreed` (pairs,); 0 where there is none."""
    backing = ((votes == agreed[:, None]) & (agreed[:, None] != 0)).double()
    return backing @ weights.double() / weights.double().sum()


def unanimous(votes: Tensor) -> Tensor:
    """(pairs,): the vote where all cast the same one; an abstention is no agreement."""
    return _sign(torch.where(tally(votes).abs() > 1 - ROUNDING, tally(votes), 0.0))


def single(votes: Tensor, voter: int) -> Tensor:
    """(pairs,): one voter's votes."""
    return votes[:, voter]


def random_voter(votes: Tensor, chosen: Tensor) -> Tensor:
    """(pairs,): each pair's vote by the one voter that was drawn for it; `chosen` is (pairs,) int64."""
    return votes.gather(1, chosen[:, None])[:, 0]


def vanilla(differences: Tensor) -> Tensor:
    """(pairs,): the sign of the sum of raw score differences, ruled by the scorer with the widest scale."""
    return differences.double().sum(1).sign()


def normalized(differences: Tensor, scales: Tensor) -> Tensor:
    """(pairs,): the same after each score is divided by its standard deviation over the data set, (voters,).

    That is z-scoring, whose mean cancels in a difference.
    """
    return vanilla(differences.double() / scales)


def break_ties(consensus: Tensor, tie_breaker: Tensor) -> Tensor:
    """(pairs,): the consensus, or the tie breaker's vote where there is none; 0 where that abstains too."""
    return torch.where(consensus == 0, tie_breaker.to(consensus), consensus)


def _sign(balance: Tensor) -> Tensor:
    return torch.where(balance.abs() > ROUNDING, balance.sign(), 0.0)
