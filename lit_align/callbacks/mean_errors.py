"""Means of chosen errors over steps and ranks, with their standard errors."""

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.types import PairInfo


class Mean(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


def chosen_sums(pairs: PairInfo, errors: Tensor) -> Tensor:
    """Sum the chosen errors (batch,) of pairs that count: (3,) sum, sum of squares, number of pairs."""
    counted = torch.where(pairs.weight > 0, errors, 0.0)
    return torch.stack([counted.sum(), counted.square().sum(), (pairs.weight > 0).sum()])


def mean_of(steps: Iterable[Sequence[float]]) -> Mean | None:
    """Average over all pairs of some steps, given by their `chosen_sums`; None if no pair counts."""
    total, squares, pairs = (sum(column) for column in zip((0.0, 0.0, 0.0), *steps, strict=True))
    if not pairs:
        return None
    mean = total / pairs
    return Mean(mean, sqrt(max(0.0, squares / pairs - mean * mean) / max(1, pairs - 1)))
