"""Frozen linear layers in NF4, 4 bits a weight (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_align.user_errors import UserValueError

BLOCK = 64  # weights that share a scale, as in QLoRA


class NF4Linear(nn.Linear):
    """A frozen linear layer that stores its weight in NF4, and restores it for each product.

    Scales are float32, stored as int32 of equal bits, so that a cast of the module does not round them.

    Args:
        layer: layer whose weight is rounded; its bias is kept.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, state = _functional().quantize_4bit(layer.weight.detach(), blocksize=BLOCK, quant_type="nf4")
        self.weight = nn.Parameter(packed, requires_grad=False)  # (weights / 2, 1) uint8
        self.scales = nn.Parameter(state.absmax.view(torch.int32), requires_grad=False)  # (weights / BLOCK,)
        self.bias = layer.bias
        # Empty; it has the precision of the restored weight, and follows casts of the module.
        self.like = nn.Parameter(layer.weight.detach().new_empty(0), requires_grad=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the restored weight."""
        return self.out_features, self.in_features

    def restored(self) -> Tensor:
        """Return the weight (out_features, in_features) in the precision of the module."""
        return _restore(self.weight, self.scales, self.shape, self.like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self)
        return product


class _Product(torch.autograd.Function):
    """Product with a restored weight that autograd does not keep: the backward pass restores it again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: NF4Linear) -> Tensor:
        ctx.save_for_backward(layer.weight, layer.scales)
        ctx.shape, ctx.dtype = layer.shape, layer.like.dtype
        return F.linear(inputs, layer.restored(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        packed, scales = ctx.saved_tensors
        weight = _restore(packed, scales, ctx.shape, ctx.dtype)
        return gradient.to(weight.dtype) @ weight, None


def _restore(packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    functional, absmax = _functional(), scales.view(torch.float32)
    state = functional.QuantState(absmax, torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    restored: Tensor = functional.dequantize_4bit(packed, state)
    return restored


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserValueError(
            "model.backbone.lora.base is nf4, which needs bitsandbytes: pip install -e '.[8bit]' in the checkout of "
            "lit-align, or set it to compute."
        ) from error
    return functional


def quantize_linears(model: nn.Module) -> None:
    """Replace the linear layers of a frozen model by layers in NF4; convolutions and norms stay as they are.

    Raises:
        UserValueError: if bitsandbytes is not installed.
    """
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, NF4Linear(layer))


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has layers in NF4."""
    return any(isinstance(module, NF4Linear) for module in model.modules())


def count_weights(model: nn.Module) -> int:
    """Count the weights of a model, a packed weight as many as it restores to."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    more = sum(m.in_features * m.out_features - m.weight.numel() - m.scales.numel() for m in packed)
    return sum(weight.numel() for weight in model.parameters()) + more
