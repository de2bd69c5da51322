"""The face of every objective."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lit_align.types import ObjectiveOutput, PairErrors


class Objective(ABC):
    """Maps the policy's (and the reference's) errors on pairs to a loss.

    Parameter names are unique among objectives: when the command line changes `class_path`,
    parameters of the same name keep their old values.
    """

    needs_reference: ClassVar[bool]

    @abstractmethod
    def __call__(self, policy: PairErrors, reference: PairErrors | None, weight: Tensor) -> ObjectiveOutput:
        """The loss of a batch.

        Args:
            policy: errors of the model in training, (batch,) each.
            reference: errors of the reference model on the same noise, or None.
            weight: (batch,), 0 for pairs that count for nothing, not even in the mean.
        """

    @abstractmethod
    def formula(self) -> str:
        """The loss with its numbers, for people to read at the start of a run."""


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of `values` (batch,) over the pairs that count; 0, with zero gradient, where none does."""
    counted = weight.sum()
    total = (values * weight).sum()
    return total / counted.where(counted > 0, counted.new_ones(()))
