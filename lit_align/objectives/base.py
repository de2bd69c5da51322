"""The face of every objective."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lit_align.types import ObjectiveOutput, PairErrors
from lit_align.user_errors import UserValueError


class Objective(ABC):
    """Maps the policy's (and the reference's) errors on pairs to a loss.

    Parameter names are unique among families of objectives: when the command line changes `class_path`,
    parameters of the same name keep their old values.
    """

    needs_reference: ClassVar[bool]
    needs_vote: ClassVar[bool] = False  # whether pairs must have been ordered by the vote of scorers

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

    def concerns(self) -> list[str]:
        """What is unusual about its numbers, each with the option and the reason; `lit-align doctor` says it."""
        return []


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of `values` (batch,) over the pairs that count; 0, with zero gradient, where none does."""
    counted = weight.sum()
    total = (values * weight).sum()
    return total / counted.where(counted > 0, counted.new_ones(()))


def in_double(errors: PairErrors) -> PairErrors:
    """The errors in float64: one number an image costs nothing, and factors of 1000 and more magnify rounding.

    Apple's GPUs have no float64; float32 stays there, good to about 1e-4 where the margin is tiny.
    """
    if errors.chosen.device.type == "mps":
        return PairErrors(errors.chosen.float(), errors.rejected.float())
    return PairErrors(errors.chosen.double(), errors.rejected.double())


def positive(name: str, value: float) -> float:
    """`value`, where it is a number above zero.

    Raises:
        ValueError: if it is not.
    """
    if not value > 0:
        raise UserValueError(f"{name} is {value}; it must be greater than 0.")
    return float(value)
