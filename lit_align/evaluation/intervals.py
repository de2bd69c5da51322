"""How sure a win rate is: intervals and a test, for prompts that are a sample of all that one could have asked."""

from math import comb, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.user_errors import UserValueError

Z = 1.959963984540054  # the normal distribution's 97.5 % point: all intervals are of 95 %
RESAMPLES = 10_000


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float


def wilson(wins: int, ties: int, losses: int) -> Interval:
    """The interval of the win rate (wins + ties / 2) / n, see `score_interval`: a prompt counts 1, 1/2 or 0.

    Without ties it is Wilson's own (1927).

    Raises:
        ValueError: if there is nothing to count.
    """
    n = wins + ties + losses
    if n == 0:
        raise UserValueError("A win rate needs at least one prompt.")
    return score_interval((wins + ties / 2) / n, ties / 4 / n, n)


def score_interval(mean: float, deficit: float, n: int) -> Interval:
    """The interval of the mean of n values in [0, 1], one a prompt, by inverting the score test.

    Values x with mean p have the variance p (1 - p) - E[x (1 - x)]: that of a coin, less what they lose by not being 0
    or 1. That deficit is shrunk by n / (n + z^2), for it too is only measured: the interval of ties alone is as wide as
    that of wins alone. It lies in [0, 1], and has a width even where all values are the same.

    Args:
        mean: of x.
        deficit: mean of x (1 - x); 0 where every prompt is won or lost.
        n: values, at least 1.
    """
    a = Z * Z / n
    # (mean - p)^2 <= a (p (1 - p) - lost), a quadratic inequality in p
    lost = deficit / (1 + a)
    middle = mean + a / 2
    reach = sqrt(max(0.0, middle**2 - (1 + a) * (mean**2 + a * lost)))
    return Interval(max(0.0, (middle - reach) / (1 + a)), min(1.0, (middle + reach) / (1 + a)))


def bootstrap(values: Tensor) -> Interval:
    """The interval of the mean of values (n,), one a prompt, by resampling prompts (Efron 1979: percentiles).

    The same values give the same interval. Resampling understates the spread of n values by sqrt((n - 1) / n), which is
    made good. The interval of one value has no width, which says nothing of the mean.

    Raises:
        ValueError: if there are no values.
    """
    if len(values) == 0:
        raise UserValueError("An interval needs at least one value.")
    values = values.double()
    generator = torch.Generator().manual_seed(0)
    # In parts, so that thousands of prompts do not take gigabytes.
    means = [
        values[torch.randint(len(values), (RESAMPLES // 10, len(values)), generator=generator)].mean(1)
        for _ in range(10)
    ]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = values.mean().item()
    wider = sqrt(len(values) / max(1, len(values) - 1))
    return Interval(mean + (low - mean) * wider, mean + (high - mean) * wider)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p value of so uneven a count, or a more uneven one, if both models were alike; ties are left out."""
    n = wins + losses
    tail = sum(comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**n))
