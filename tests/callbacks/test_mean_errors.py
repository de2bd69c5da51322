"""Means of chosen errors, and how unsure they are, by hand."""

from types import SimpleNamespace

import pytest
import torch

from lit_align.callbacks.mean_errors import chosen_sums, mean_of


def test_pairs_of_weight_zero_count_for_nothing():
    """Two pairs of 0.1 and 0.3, and one that could not be read; then a step in which no pair counts."""
    pairs = SimpleNamespace(weight=torch.tensor([1.0, 0.0, 1.0]))
    sums = chosen_sums(pairs, torch.tensor([0.1, torch.nan, 0.3], dtype=torch.float64)).tolist()
    assert sums == pytest.approx([0.4, 0.1, 2])
    nothing = chosen_sums(SimpleNamespace(weight=torch.zeros(2)), torch.ones(2)).tolist()
    assert nothing == [0, 0, 0]
    assert mean_of([sums, nothing]) == pytest.approx((0.2, 0.1))  # the deviation of two, 0.1414, over the root of two
    assert mean_of([nothing]) is None
