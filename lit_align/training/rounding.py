"""Which weights in half precision a step of the optimizer can change at all, before rounding takes the change away."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_align.backbones.sharding import to_local
from lit_align.training.compensated import Compensated

STEP_IS_RATE = ("adam", "lion")  # in names of optimizers that change each weight by about the learning rate
FEW = 0.9  # a smaller share of weights that can change asks for another precision


@torch.no_grad()
def moving_share(parameters: Iterable[Tensor], change: float) -> float:
    """Share of weights that differ after adding or subtracting `change`, 1 for none at all. Shards: this device's."""
    moving, total = 0, 0
    for weight in map(to_local, parameters):
        differ = (weight + change != weight) | (weight - change != weight)
        moving, total = moving + int(differ.sum()), total + weight.numel()
    return moving / total if total else 1.0


def rounding_line(optimizer: torch.optim.Optimizer, precision: str) -> str | None:
    """Describe what rounding leaves of an optimizer's steps; None where weights are not in half precision.

    Args:
        optimizer: before its first step; of each group the highest rate that is known counts, as warm-ups begin at 0.
        precision: of the Trainer.
    """
    groups = [(group["params"], _rate(group)) for group in optimizer.param_groups]
    half = {weight.dtype for weights, _ in groups for weight in weights} & {torch.bfloat16, torch.float16}
    if not half:
        return None
    if isinstance(optimizer, Compensated):
        return (
            f"{precision}: model.compensate_rounding keeps what is rounded off, so that steps act as on float32 weights"
        )
    lost = f"changes of less than 1/{round(4 / torch.finfo(half.pop()).eps)} of a weight are rounded away"
    if not any(name in type(optimizer).__name__.lower() for name in STEP_IS_RATE):
        return f"{precision}: {lost}; {_remedy(precision)}"
    counts = [sum(weight.numel() for weight in weights) for weights, _ in groups]
    shares = [moving_share(weights, rate) for weights, rate in groups]
    share = sum(count * part for count, part in zip(counts, shares, strict=True)) / sum(counts)
    rate = max(rate for _, rate in groups)
    remedy = f"; {_remedy(precision)}" if share < FEW else ""
    moving = f"{share:.1%} of the weights can change in a step of the learning rate {rate:g}"
    return f"{precision}: {moving}, as {lost}{remedy}"


def _remedy(precision: str) -> str:
    compensated = ", model.compensate_rounding the bits beyond bfloat16" if precision == "bf16-true" else ""
    return f"bf16-mixed keeps float32 weights{compensated}"


def _rate(group: dict[str, Any]) -> float:
    return max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))
