"""Options that choose between kernels of equal mathematics."""

from typing import Literal, get_args

import torch

from lit_align.backbones import Backbone
from lit_align.backbones.attention import AttentionKernel, check_kernel, use_kernel
from lit_align.user_errors import UserValueError

MatmulPrecision = Literal["highest", "high", "medium"]


def check_names(float32_matmul: str | None, attention: str) -> None:
    """Refuse unknown names of the options `model.float32_matmul` and `model.attention`."""
    chosen = {"float32_matmul": (float32_matmul, MatmulPrecision), "attention": (attention, AttentionKernel)}
    for name, (value, known) in chosen.items():
        if value is not None and value not in get_args(known):
            raise UserValueError(f"model.{name} is {value!r}; choose {', '.join(get_args(known))}.")


def choose_kernels(backbone: Backbone, float32_matmul: str | None, attention: str, dtype: torch.dtype) -> None:
    """Let a backbone compute with the chosen kernels. Idempotent.

    Args:
        backbone: on its device.
        float32_matmul: precision of products for the whole process, or None to leave it.
        attention: kernel of the denoisers' attention.
        dtype: compute precision.

    Raises:
        UserValueError: if the attention's kernel cannot be used with this model, device and precision.
    """
    if float32_matmul is not None:
        torch.set_float32_matmul_precision(float32_matmul)
    check_kernel(backbone.denoiser, attention, next(backbone.denoiser.parameters()).device, dtype)
    use_kernel(backbone, attention)
