"""Logged means, by weight and by timestep range."""

from types import SimpleNamespace

import pytest
import torch

from lit_align.training.metrics import PreferenceMetrics, WeightedMeans, implicit_accuracy
from lit_align.types import ObjectiveOutput, PairErrors


def test_weighted_means_over_updates_and_ranks():
    metric = WeightedMeans(["a", "b"])
    metric.update({"a": (torch.tensor([1.0, 3.0]), torch.ones(2)), "b": (torch.tensor([5.0]), torch.zeros(1))}
                  | {"b": (torch.tensor([5.0, torch.nan]), torch.zeros(2))})  # fmt: skip
    metric.update({"a": (torch.tensor([7.0, 100.0]), torch.tensor([1.0, 0.0])), "b": (torch.zeros(2), torch.zeros(2))})
    result = metric.compute()
    assert result == {"a": pytest.approx(11 / 3)}


def test_a_pair_of_weight_zero_may_have_any_value():
    metric = WeightedMeans(["a"])
    metric.update({"a": (torch.tensor([1.0, torch.nan, torch.inf, 3.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]))})
    assert metric.compute() == {"a": 2}


def test_votes_are_counted_where_one_was_cast():
    """Won, tied by a live vote, lost against the label, and unreadable, which counts nowhere."""
    metrics = PreferenceMetrics([], timesteps=1000)
    ones = torch.ones(4)
    pairs = SimpleNamespace(
        weight=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        voted=True,
        vote_share=torch.tensor([0.75, 0.0, 1.0, 0.5]),
        human=torch.tensor([1, 1, -1, 1]),
    )
    metrics.observe(ObjectiveOutput(ones, ones, {}), PairErrors(ones, ones), torch.zeros(4), pairs)
    result = metrics.compute()
    assert result["vote/share"].item() == pytest.approx(1.75 / 3)
    assert result["vote/ties"].item() == pytest.approx(1 / 3)
    assert result["vote/human_agreement"] == 0.5


def test_errors_by_timestep_range_and_ties_of_accuracy():
    metrics = PreferenceMetrics([], timesteps=1000)
    errors = PairErrors(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 2.0, 2.0]))
    output = ObjectiveOutput(torch.tensor([3.0, 5.0, 7.0]), torch.tensor([1.0, 0.0, -1.0]), {})
    pairs = SimpleNamespace(weight=torch.ones(3), voted=False, vote_share=torch.zeros(3), human=torch.ones(3))
    metrics.observe(output, errors, torch.tensor([0, 249, 250]), pairs)
    result = metrics.compute()
    assert result["loss"] == 5
    assert result["loss/t0-249"] == 4
    assert result["loss/t250-499"] == 7
    assert result["chosen_error/t0-249"] == 1.5
    assert result["chosen_error/t250-499"] == 4
    assert "chosen_error/t500-749" not in result
    assert result["accuracy"] == 0.5
    assert result["margin"] == 0
    assert result["chosen_error"].item() == pytest.approx(7 / 3)
    assert result["rejected_error"] == result["rejected_error/t250-499"] == 2
    assert implicit_accuracy(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]
