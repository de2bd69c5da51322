"""Optimizers for bfloat16 weights that keep the bits which rounding takes away, and so step as on float32 weights.

The first 16 bits of a float32 number are a bfloat16 number. An optimizer's state holds the distance of a weight's
float32 bits from those of its nearest bfloat16 number as int16, so that both together are the float32 number, bit for
bit. Kahan summation in bfloat16 takes as many bytes, keeps 8 of these bits, and knows no weight decay, whose steps are
rounded away; stochastic rounding draws numbers, which differ between ranks.
"""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_align.user_errors import UserValueError

LOW = "low_bits"  # in an optimizer's state of a weight: int16, of the weight's shape
KNOWN = ("torch.optim.", "bitsandbytes.optim.", "transformers.optimization.")  # treat each weight by itself
HALF = 1 << 15


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into the nearest bfloat16, ties away from zero, and the distance of the bits, int16."""
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)  # one pattern of NaN, which does not overflow
    high = (bits + HALF) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Undo `split` bit for bit."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


class Compensated(Optimizer):
    """First base of an optimizer's class: steps on float32 weights, of which the model holds the bfloat16 half.

    A step takes one weight at a time, so that only one is in float32. Weights of other precisions are left alone.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, group["params"]) for group in self.param_groups]
        for group, _ in groups:
            group["params"] = []
        try:
            for group, weights in groups:
                for weight in weights:
                    if weight.grad is not None:
                        self._step_one(group, weight)
                group["params"] = []
        finally:
            for group, weights in groups:
                group["params"] = weights
        return loss

    def _step_one(self, group: dict[str, Any], weight: nn.Parameter) -> None:
        """Step on a float32 stand-in: DDP loses its hold on a weight whose own data change their precision."""
        if weight.dtype != torch.bfloat16:
            group["params"] = [weight]
            super().step()
            return
        assert weight.grad is not None
        state = self.state.pop(weight, {})
        low = state.pop(LOW, None)
        full = nn.Parameter(weight.detach().float() if low is None else join(weight.detach(), low))
        full.grad = weight.grad.float()
        if state:  # optimizers begin where a weight's state is empty
            self.state[full] = state
        group["params"] = [full]
        try:
            super().step()
            new, low = split(full.detach())
            weight.copy_(new)
        finally:
            self.state[weight] = self.state.pop(full, {})
            if low is not None:
                self.state[weight][LOW] = low

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore states in their own precision: optimizers cast them to that of the weights, bfloat16."""
        super().load_state_dict(state_dict)
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, weight in zip(numbers, weights, strict=True):
            state = self.state.get(weight, {})
            for name, value in state_dict["state"].get(number, {}).items():
                if name in state and isinstance(value, Tensor) and value.dtype != state[name].dtype:
                    state[name] = value.to(weight.device, copy=True)


def compensated(build: OptimizerCallable) -> OptimizerCallable:
    """Return a function that builds the optimizer of `build`, with `Compensated` as its first base."""

    @wraps(build)
    def build_compensated(*arguments: Any, **options: Any) -> Optimizer:
        optimizer = build(*arguments, **options)
        kind = type(optimizer)
        if not f"{kind.__module__}.".startswith(KNOWN) or isinstance(optimizer, torch.optim.LBFGS):
            raise UserValueError(
                f"model.compensate_rounding is true, which steps each weight by itself, but model.optimizer is "
                f"{kind.__name__} of {kind.__module__}, which may look at all weights at once. Choose an AdamW of "
                "torch.optim or bitsandbytes.optim, or set model.compensate_rounding to false."
            )
        members = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        optimizer.__class__ = type(kind.__name__, (Compensated, kind), members)  # the name by which a run knows it
        return optimizer

    build_compensated.steps_one_by_one = True  # type: ignore[attr-defined]  # for who measures its memory
    return build_compensated


def check_compensation(compensates: bool, precision: str) -> None:
    """Refuse to keep the bits of weights that are not in bfloat16.

    Args:
        compensates: `model.compensate_rounding`.
        precision: of the Trainer, in full spelling.

    Raises:
        UserValueError: that names both options.
    """
    if compensates and precision != "bf16-true":
        raise UserValueError(
            f"model.compensate_rounding is true, but trainer.precision is {precision}, whose weights are not in "
            "bfloat16. Set trainer.precision to bf16-true, or model.compensate_rounding to false."
        )
