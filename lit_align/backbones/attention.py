"""The kernel that computes a denoiser's attention."""

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_align.backbones.base import Backbone
from lit_align.user_errors import UserValueError

AttentionKernel = Literal["auto", "flash", "efficient", "cudnn", "math"]
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
QUERIES, KEYS = 64, (64, 77)  # of a trial: self-attention, and attention to the tokens of a prompt


class OneKernel:
    """A processor of diffusers' attention layers that lets torch use one kernel only.

    It acts within the layer, and so where gradient checkpointing computes the layer a second time, and nowhere else:
    the VAE's head of 512 channels is too wide for flash attention.

    Args:
        processor: computes the attention by `scaled_dot_product_attention`.
        kernel: name of the kernel.
    """

    def __init__(self, processor: Any, kernel: str) -> None:
        self.processor, self.kernel = processor, kernel

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with sdpa_kernel(KERNELS[self.kernel]):
            return self.processor(*inputs, **options)


def use_kernel(backbone: Backbone, kernel: str) -> None:
    """Let the denoiser and its frozen copy attend by this kernel; `auto` leaves the choice to torch. Idempotent."""
    for denoiser in (backbone.denoiser, *(backbone.reference.own_denoisers() if backbone.reference else [])):
        for layer in _layers(denoiser):
            processor: Any = layer.processor
            plain = processor.processor if isinstance(processor, OneKernel) else processor
            chosen: Any = plain if kernel == "auto" else OneKernel(plain, kernel)
            layer.set_processor(chosen)


def check_kernel(denoiser: nn.Module, kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Try a kernel on a few numbers for each width of a denoiser's heads.

    Raises:
        UserValueError: if it cannot compute attention of this width and precision on this device, with torch's reasons.
    """
    if kernel == "auto":
        return
    for width in sorted({layer.inner_dim // layer.heads for layer in _layers(denoiser)}):
        reasons = _reasons(kernel, width, device, dtype)
        if reasons is not None:
            name = str(dtype).removeprefix("torch.")
            raise UserValueError(
                f"model.attention is {kernel}, which cannot compute attention with heads of {width} channels in {name} "
                f"on {device.type}: {reasons} Set model.attention to auto, so that torch chooses."
            )


@torch.inference_mode(False)
@torch.enable_grad()
def _reasons(kernel: str, width: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a kernel cannot be used; None if it can."""
    options: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    query = torch.ones(1, 1, QUERIES, width, **options)
    with warnings.catch_warnings(record=True) as said, torch.autocast(device.type, enabled=False):
        warnings.simplefilter("always")
        for count in KEYS:
            key = torch.ones(1, 1, count, width, **options)
            try:
                with sdpa_kernel(KERNELS[kernel]):
                    F.scaled_dot_product_attention(query, key, key).sum().backward()  # not every kernel has both passes
            except RuntimeError as error:
                lines = [str(one.message).split(" (Triggered")[0] for one in said]
                return " ".join(" ".join([*lines, f"{error}."]).split()).replace("..", ".")
    return None


def _layers(denoiser: nn.Module) -> list[Attention]:
    return [module for module in denoiser.modules() if isinstance(module, Attention)]
