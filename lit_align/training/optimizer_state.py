"""The state of an optimizer after a resume."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_align.internals import set_unscales_gradients


def fit_to_weights(optimizer: Optimizer) -> None:
    """Bring a restored state into the form that the optimizer's step expects.

    A checkpoint keeps the strides of its tensors, and fused kernels walk the memory of a weight and its state side by
    side: a run that goes on in another order of weights (`model.backbone.channels_last`) would mix up their values.
    Fused kernels also count steps on the weights' device. The groups come back too; they say whether a step is fused.
    """
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for weight in group["params"]:
            state = optimizer.state.get(weight, {})
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if name == "step" and on_device:
                    state[name] = value.to(weight.device, torch.float32)
                elif value.shape == weight.shape and value.stride() != weight.stride():
                    state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    set_unscales_gradients(optimizer, all(group.get("fused") for group in optimizer.param_groups))
