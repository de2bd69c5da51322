"""Two models' scores on the same prompts and noise: who wins how often, and by how much."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lit_align.evaluation.intervals import Interval, bootstrap, score_interval, sign_test, wilson
from lit_align.user_errors import UserValueError


@dataclass(frozen=True)
class Outcome:
    """What one scorer says of a model against another."""

    wins: int  # prompts
    ties: int
    losses: int
    win_rate: float  # (wins + ties / 2) / n
    interval: Interval  # of the win rate, `wilson`
    mean: float  # score
    mean_against: float
    difference: float  # of the means
    difference_interval: Interval | None  # by `bootstrap` over prompts; one prompt alone says nothing of others
    sign_test: float  # p value


@dataclass(frozen=True)
class Comparison:
    """What all scorers say."""

    scorers: dict[str, Outcome]
    macro: float  # mean of their win rates
    macro_interval: Interval  # `score_interval` of the prompts' averages
    macro_wins: int  # prompts that more scorers give to the model than to the other
    macro_ties: int
    macro_losses: int
    macro_sign_test: float  # p value


def compare(
    scores: Mapping[str, Tensor], against: Mapping[str, Tensor], tolerances: Mapping[str, float] | None = None
) -> Comparison:
    """Compare a model with another, prompt by prompt.

    Args:
        scores: by scorer's name, (prompts,) each.
        against: the other model's, on the same prompts and from the same noise.
        tolerances: by scorer's name, differences up to which are ties; 0 where none is given.

    Raises:
        ValueError: if a tolerance is negative, not finite or of no scorer.
    """
    tolerances = tolerances or {}
    for name, tolerance in tolerances.items():
        if name not in scores:
            raise UserValueError(f"tolerances: {name!r} is no scorer here; there are {', '.join(scores)}.")
        check_tolerance(name, tolerance)
    outcomes, signs = {}, []
    for name, mine in scores.items():
        difference = mine.double() - against[name].double()
        sign = difference.sign() * (difference.abs() > tolerances.get(name, 0.0))
        outcomes[name] = _outcome(sign, difference, mine, against[name])
        signs.append(sign)
    votes = torch.stack(signs)  # (scorers, prompts)
    by_prompt = ((votes + 1) / 2).mean(0)
    wins, ties, losses = _counts(votes.sum(0).sign())
    mean = by_prompt.mean().item()
    return Comparison(
        scorers=outcomes,
        macro=mean,
        macro_interval=score_interval(mean, (by_prompt * (1 - by_prompt)).mean().item(), len(by_prompt)),
        macro_wins=wins,
        macro_ties=ties,
        macro_losses=losses,
        macro_sign_test=sign_test(wins, losses),
    )


def check_tolerance(name: str, tolerance: float) -> None:
    """Raise a ValueError if a scorer's tie tolerance is none: by an infinite one all prompts would be ties."""
    if not (isfinite(tolerance) and tolerance >= 0):
        raise UserValueError(f"tolerances: that of {name} is {tolerance}; it must be 0 or more, and finite.")


def _counts(sign: Tensor) -> tuple[int, int, int]:
    """Wins, ties and losses."""
    wins, ties, losses = (int((sign == value).sum()) for value in (1, 0, -1))
    return wins, ties, losses


def _outcome(sign: Tensor, difference: Tensor, mine: Tensor, other: Tensor) -> Outcome:
    wins, ties, losses = _counts(sign)
    return Outcome(
        wins=wins,
        ties=ties,
        losses=losses,
        win_rate=(wins + ties / 2) / (wins + ties + losses),
        interval=wilson(wins, ties, losses),
        mean=mine.double().mean().item(),
        mean_against=other.double().mean().item(),
        difference=difference.mean().item(),
        difference_interval=bootstrap(difference) if len(difference) > 1 else None,
        sign_test=sign_test(wins, losses),
    )
