"""Base class of all objectives, and helpers for their formulas."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_align.types import ObjectiveOutput, PairErrors, PairFacts
from lit_align.user_errors import UserValueError


class Objective(ABC):
    """Maps the errors of the policy, and of the reference, on pairs to one loss per pair.

    Parameter names are unique to a family of objectives: when the command line changes `class_path`, parameters with
    equal names keep their old values.
    """

    needs_reference: bool
    needs_vote: bool = False  # whether pairs must be ordered by a vote of scorers
    needs: frozenset[str] = frozenset()  # names of the `PairFacts` that it reads
    needs_v: bool = False  # whether it makes sense for models that predict v alone
    compares: bool = True  # whether the rejected image has a part in the loss
    form: int = 1  # to be raised with a change of a formula, see `changed_since`

    @abstractmethod
    def __call__(
        self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None = None
    ) -> ObjectiveOutput:
        """Compute the loss of each pair; the caller takes the mean.

        Args:
            policy: errors of the model in training, (batch,) each.
            reference: errors of the reference model on the same noise and timesteps; None if it is not needed.
            facts: those that `needs` names; an objective that needs none may lack the argument.
        """

    def name(self) -> str:
        """Return the name by which a checkpoint knows the objective again."""
        return type(self).__name__

    @abstractmethod
    def formula(self) -> str:
        """Write the loss with its numbers, for the banner at the start of a run."""

    def changed_since(self, form: int, settings: Mapping[str, Any]) -> str | None:
        """Say how the loss differs from that of an earlier form, or return None if it does not.

        Args:
            form: of the objective with which a run began.
            settings: of that run, by option.
        """
        return None

    def concerns(self) -> list[str]:
        """List unusual numbers, each with the option to change and the reason, for `lit-align doctor`."""
        return []


def given(facts: PairFacts | None, name: str) -> Tensor:
    """Return a fact, (batch,), that the objective's `needs` names."""
    value = None if facts is None else getattr(facts, name)
    assert isinstance(value, Tensor), f"needs {name}"
    return value


def in_double(errors: PairErrors) -> PairErrors:
    """Convert errors to float64: factors of 1000 and more magnify rounding, and one number per image costs nothing.

    Apple's GPUs have no float64; there, errors stay float32, and tiny margins are exact to about 1e-4.
    """
    if errors.chosen.device.type == "mps":
        return PairErrors(errors.chosen.float(), errors.rejected.float())
    return PairErrors(errors.chosen.double(), errors.rejected.double())


def positive(name: str, value: float) -> float:
    """Return `value` if it is greater than 0.

    Raises:
        UserValueError: if it is not.
    """
    if not value > 0:
        raise UserValueError(f"{name} is {value}; it must be greater than 0.")
    return float(value)


def at_least_0(name: str, value: float) -> float:
    """Return `value` if it is 0 or greater.

    Raises:
        UserValueError: if it is not.
    """
    if not value >= 0:
        raise UserValueError(f"{name} is {value}; it must be at least 0.")
    return float(value)
