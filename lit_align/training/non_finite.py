"""Optimizer steps whose gradients are not finite, and checkpoints whose values are not."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lit_align.backbones.sharding import non_finite
from lit_align.user_errors import UserValueError

NonFinite = Literal["stop", "skip"]
ADVICE = (
    "The weights are those from before this step. Look for broken pairs and lower the learning rate; bf16-mixed or "
    "32-true instead of half precision helps too. If such steps are rare, set model.non_finite to skip."
)


class Skipping:
    """Counts skipped steps, and decides when the run must end.

    Args:
        policy: `stop` at the first such step, or `skip` it.
        limit: number of steps that `skip` may skip; one more ends the run.
    """

    def __init__(self, policy: NonFinite, limit: int) -> None:
        if policy not in ("stop", "skip"):
            raise UserValueError(f"model.non_finite is {policy!r}; it must be stop or skip.")
        if limit < 1:
            raise UserValueError(f"model.skip_limit is {limit}; it must be at least 1.")
        self.policy, self.limit = policy, limit
        self.count = 0
        self.fault: str | None = None  # why the run must end

    def leave_out(self, step: int, norm: float) -> None:
        """Count a step that the optimizer skips; `norm` of its gradients is equal on all ranks."""
        self.count += 1
        what = f"the gradient norm is {norm}, and this step was skipped"
        if self.policy == "skip" and self.count <= self.limit:
            warnings.warn(f"step {step:,}: {what} ({self.count} of model.skip_limit {self.limit})", stacklevel=2)
        elif self.policy == "skip":
            self.fault = f"{what}, one more than model.skip_limit {self.limit}"
        else:
            self.fault = what


def describe_non_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """Count the weights and states of optimizers in a checkpoint that are not finite here; None if all are finite."""
    states = [of for optimizer in checkpoint.get("optimizer_states", []) for of in optimizer.get("state", {}).items()]
    named = {f"{weight}.{name}": value for weight, state in states for name, value in state.items()}
    moments = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    parts = {"weights": checkpoint["state_dict"], "states of the optimizer": moments}
    found = {what: non_finite(tensors) for what, tensors in parts.items()}
    counts = [f"{len(bad)} of {len(parts[what])} {what} ({bad[0]})" for what, bad in found.items() if bad]
    return f"{' and '.join(counts)} are not finite" if counts else None
