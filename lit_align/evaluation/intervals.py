"""Intervals and a test for win rates and mean differences; the prompts are a sample of all possible prompts."""

from math import comb, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.user_errors import UserValueError

Z = 1.959963984540054  # 97.5 % point of the normal distribution, for intervals of 95 %
RESAMPLES = 10_000


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    low: float
    high: float


def wilson(wins: int, ties: int, losses: int) -> Interval:
    """Compute the score interval of the win rate (wins + ties / 2) / n, in which a prompt counts 1, 1/2 or 0.

    Without ties it is the interval of Wilson 1927.

    Raises:
        UserValueError: if all counts are 0.
    """
    n = wins + ties + losses
    if n == 0:
        raise UserValueError("A win rate needs at least one prompt.")
    return score_interval((wins + ties / 2) / n, ties / 4 / n, n)


def score_interval(mean: float, deficit: float, n: int) -> Interval:
    """Compute the interval of the mean of n values in [0, 1], one per prompt, by inverting the score test.

    Values x with mean p have the variance p (1 - p) - E[x (1 - x)]: the variance of a coin, less a deficit because they
    are not all 0 or 1. The deficit is an estimate too, so it is shrunk by n / (n + z^2); ties alone then have an
    interval as wide as wins alone. The interval lies in [0, 1] and has a width even if all values are equal.

    Args:
        mean: of x.
        deficit: mean of x (1 - x); 0 if every prompt is won or lost.
        n: number of values, at least 1.
    """
    a = Z * Z / n
    # (mean - p)^2 <= a (p (1 - p) - lost), a quadratic inequality in p
    lost = deficit / (1 + a)
    middle = mean + a / 2
    reach = sqrt(max(0.0, middle**2 - (1 + a) * (mean**2 + a * lost)))
    return Interval(max(0.0, (middle - reach) / (1 + a)), min(1.0, (middle + reach) / (1 + a)))


def bootstrap(values: Tensor) -> Interval:
    """Compute the interval of the mean of values (n,), one per prompt, by resampling prompts (Efron 1979: percentiles).

    Equal values give equal intervals. Resampling understates the spread of n values by sqrt((n - 1) / n); the interval
    is widened by as much. The interval of one value has no width and is meaningless.

    Raises:
        UserValueError: if there are no values.
    """
    if len(values) == 0:
        raise UserValueError("An interval needs at least one value.")
    values = values.double()
    generator = torch.Generator().manual_seed(0)
    # In ten parts, because thousands of prompts would take gigabytes at once.
    means = [
        values[torch.randint(len(values), (RESAMPLES // 10, len(values)), generator=generator)].mean(1)
        for _ in range(10)
    ]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = values.mean().item()
    wider = sqrt(len(values) / max(1, len(values) - 1))
    return Interval(mean + (low - mean) * wider, mean + (high - mean) * wider)


def sign_test(wins: int, losses: int) -> float:
    """Compute the two-sided p value: the chance that equal models have counts this uneven, or more; ties left out."""
    n = wins + losses
    tail = sum(comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**n))
