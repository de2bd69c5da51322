"""Two models' scores on the same prompts and noise: who wins how often, and by how much."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_align.evaluation.intervals import Interval, bootstrap, sign_test, wilson


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
    difference_interval: Interval  # by `bootstrap` over prompts
    sign_test: float  # p value


@dataclass(frozen=True)
class Comparison:
    """What all scorers say."""

    scorers: dict[str, Outcome]
    macro: float  # mean of their win rates
    macro_interval: Interval  # by `bootstrap` over prompts


def compare(
    scores: Mapping[str, Tensor], against: Mapping[str, Tensor], tolerances: Mapping[str, float] | None = None
) -> Comparison:
    """Compare a model with another, prompt by prompt.

    Args:
        scores: by scorer's name, (prompts,) each.
        against: the other model's, on the same prompts and from the same noise.
        tolerances: by scorer's name, differences up to which are ties; 0 where none is given.

    Raises:
        ValueError: if a tolerance is negative or of no scorer.
    """
    tolerances = tolerances or {}
    for name, tolerance in tolerances.items():
        if name not in scores:
            raise ValueError(f"tolerances: {name!r} is no scorer here; there are {', '.join(scores)}.")
        if not tolerance >= 0:
            raise ValueError(f"tolerances: that of {name} is {tolerance}; it must be 0 or more.")
    outcomes, points = {}, []
    for name, mine in scores.items():
        difference = mine.double() - against[name].double()
        sign = difference.sign() * (difference.abs() > tolerances.get(name, 0.0))
        outcomes[name] = _outcome(sign, difference, mine, against[name])
        points.append((sign + 1) / 2)
    by_prompt = torch.stack(points).mean(0)
    low, high = bootstrap(by_prompt)
    return Comparison(outcomes, by_prompt.mean().item(), Interval(max(0.0, low), min(1.0, high)))


def _outcome(sign: Tensor, difference: Tensor, mine: Tensor, other: Tensor) -> Outcome:
    wins, ties, losses = (int((sign == value).sum()) for value in (1, 0, -1))
    return Outcome(
        wins=wins,
        ties=ties,
        losses=losses,
        win_rate=(wins + ties / 2) / (wins + ties + losses),
        interval=wilson(wins, ties, losses),
        mean=mine.double().mean().item(),
        mean_against=other.double().mean().item(),
        difference=difference.mean().item(),
        difference_interval=bootstrap(difference),
        sign_test=sign_test(wins, losses),
    )
