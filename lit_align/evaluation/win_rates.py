"""Win rates and mean differences of two models, whose images have the prompts and the noise in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lit_align.evaluation.intervals import Interval, bootstrap, score_interval, sign_test, wilson
from lit_align.user_errors import UserValueError


@dataclass(frozen=True)
class Outcome:
    """Result of one scorer for a model against another."""

    wins: int  # number of prompts
    ties: int
    losses: int
    win_rate: float  # (wins + ties / 2) / n
    interval: Interval  # of the win rate, by `wilson`
    mean: float  # of the scores
    mean_against: float
    difference: float  # of the means
    difference_interval: Interval | None  # by `bootstrap` over prompts; none if there is one prompt
    sign_test: float  # p value


@dataclass(frozen=True)
class Comparison:
    """Results of all scorers for a model against another."""

    scorers: dict[str, Outcome]
    macro: float  # mean of the scorers' win rates
    macro_interval: Interval  # by `score_interval` of the prompts' averages
    macro_wins: int  # prompts on which more scorers prefer this model than the other
    macro_ties: int
    macro_losses: int
    macro_sign_test: float  # p value


def compare(
    scores: Mapping[str, Tensor], against: Mapping[str, Tensor], tolerances: Mapping[str, float] | None = None
) -> Comparison:
    """Compare a model with another, prompt by prompt.

    Args:
        scores: by name of the scorer, (prompts,) each.
        against: scores of the other model, on these prompts and this noise.
        tolerances: by name of the scorer, differences up to which a prompt is a tie; 0 by default.

    Raises:
        UserValueError: if a tolerance is negative, not finite or of an unknown scorer.
    """
    tolerances = tolerances or {}
    for name, tolerance in tolerances.items():
        if name not in scores:
            raise UserValueError(f"tolerances: {name!r} is not a scorer here; choose from {', '.join(scores)}.")
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
    """Refuse a tie tolerance that is negative or not finite; an infinite one would make all prompts ties."""
    if not (isfinite(tolerance) and tolerance >= 0):
        raise UserValueError(f"tolerances.{name} is {tolerance}; it must be 0 or more, and finite.")


def _counts(sign: Tensor) -> tuple[int, int, int]:
    """Count wins, ties and losses in signs (prompts,)."""
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
