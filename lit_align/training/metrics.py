"""Weighted means of per-pair values: exact over micro-batches, accumulation and ranks."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_align.types import ObjectiveOutput, PairErrors, PairInfo


class WeightedMeans(Metric):
    """Weighted means of many named values, as two small sums that stay on the device until `compute`.

    Args:
        names: of the values, in the order of the rows that `update` takes.
    """

    full_state_update = False
    sums: Tensor
    weights: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.add_state("sums", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("weights", torch.zeros(len(self.names)), dist_reduce_fx="sum")

    def _apply(self, fn, exclude_state: Sequence[str] = ""):  # type: ignore[no-untyped-def]  # torchmetrics' own signature
        """Follow the module to a device, but not to half precision, in which sums stop to grow at 512 pairs."""
        return super()._apply(lambda value: value.to(fn(value).device), exclude_state)

    def update(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add values and their weights, both (batch,), for every name."""
        stacked = torch.stack([values[name][0].float() for name in self.names])
        weights = torch.stack([values[name][1].float() for name in self.names])
        # NaN times a weight of 0 would be NaN.
        self.sums += torch.where(weights > 0, stacked * weights, 0.0).sum(1)
        self.weights += weights.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Return means by name, without names that have no weight."""
        means = self.sums / self.weights
        counted = (self.weights > 0).tolist()
        return {name: mean for name, mean, seen in zip(self.names, means, counted, strict=True) if seen}


COMMON = ("loss", "accuracy", "margin", "chosen_error", "rejected_error")
VOTE = ("vote/share", "vote/ties", "vote/human_agreement")  # only of voted pairs
ERRORS = ("loss", "chosen_error", "rejected_error")
HELD_OUT = (*ERRORS, "accuracy", "margin", "chosen_drift", "rejected_drift")  # drifts are terms of some objectives


class PreferenceMetrics(WeightedMeans):
    """Metrics that a run logs of its pairs.

    Args:
        terms: names of the objective's terms.
        timesteps: of the noise schedule.
        by_range: values that are also logged by timestep range, if the objective has them.
        ranges: number of equal ranges of timesteps.
    """

    def __init__(self, terms: Sequence[str], timesteps: int, by_range: Sequence[str] = ERRORS, ranges: int = 4) -> None:
        edges = [timesteps * part // ranges for part in range(ranges + 1)]
        self.ranges = {f"t{low}-{high - 1}": (low, high) for low, high in itertools.pairwise(edges)}
        self.terms = list(terms)
        self.by_range = [name for name in by_range if name in (*COMMON, *terms)]
        super().__init__([*COMMON, *VOTE, *terms, *(f"{name}/{t}" for name in self.by_range for t in self.ranges)])

    def observe(self, output: ObjectiveOutput, errors: PairErrors, timesteps: Tensor, pairs: PairInfo) -> None:
        """Add a micro-batch: output of the objective, errors of the policy, timesteps (batch,), and its pairs."""
        weight, voted = pairs.weight, pairs.weight * float(pairs.voted)
        tied = (pairs.vote_share == 0).float()
        cast = torch.maximum(weight, tied) * float(pairs.voted)  # live votes may be ties
        values = {
            "loss": (output.losses.detach(), weight),
            "accuracy": (implicit_accuracy(output.margin), weight),
            "margin": (output.margin, weight),
            "chosen_error": (errors.chosen.detach(), weight),
            "rejected_error": (errors.rejected.detach(), weight),
        }
        values |= {
            "vote/share": (pairs.vote_share, cast),
            "vote/ties": (tied, cast),
            "vote/human_agreement": (implicit_accuracy(pairs.human), voted),
        }
        values |= {term: (output.terms[term], weight) for term in self.terms}
        for name, (low, high) in self.ranges.items():
            inside = weight * ((timesteps >= low) & (timesteps < high))
            values |= {f"{value}/{name}": (values[value][0], inside) for value in self.by_range}
        self.update(values)


def implicit_accuracy(margin: Tensor) -> Tensor:
    """Return (batch,): 1 where the policy prefers the chosen image, 0 where the rejected one, 0.5 for a margin of 0."""
    return (margin.sign() + 1) / 2


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Average `values` (batch,) over the pairs that count; 0, with zero gradient, where none counts."""
    counted = weight.sum()
    total = (values * weight).sum()
    return total / counted.where(counted > 0, counted.new_ones(()))
