"""FSDP2 sharding of a denoiser's weights, and conversion between full tensors and one device's shard."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

Denoiser = Any  # UNet2DConditionModel, whose base classes are not typed


def shard_denoiser(
    denoiser: Denoiser, mesh: dist.DeviceMesh, dtype: torch.dtype | None, keep_for_backward: bool = False
) -> None:
    """Apply FSDP2 per block, in place, so that a forward pass gathers one block at a time. Idempotent.

    Args:
        denoiser: UNet to shard; its weights keep their names.
        mesh: one-dimensional device mesh.
        dtype: precision of gathered weights; None keeps their own. Gradients are summed in float32.
        keep_for_backward: keep gathered weights from the forward pass until the backward pass has used them.
    """
    if isinstance(denoiser, FSDPModule):
        return
    # Inputs are not cast: in bfloat16, SDXL's sizes in pixels would no longer be whole numbers.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    transformers = [module for module in denoiser.modules() if isinstance(module, BasicTransformerBlock)]
    blocks = [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]
    for module in (*transformers, *blocks, denoiser):
        # Set for the root too: torch would keep it gathered until a backward pass, which a reference never has.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_for_backward)
    if keep_for_backward:
        denoiser.register_forward_hook(_reshard_without_backward)


def _reshard_without_backward(denoiser: nn.Module, *_: object) -> None:
    """Reshard after a forward pass without gradients; otherwise the next step would use these gathered weights."""
    if not torch.is_grad_enabled():
        for module in denoiser.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def to_local(tensor: Tensor) -> Tensor:
    """Return this device's shard, sharing its memory; an unsharded tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors of which this device's part holds a value that is not finite; 8-bit ones cannot."""
    found = {name: to_local(value.detach()) for name, value in tensors.items()}
    real = {name: value for name, value in found.items() if value.is_floating_point() and value.itemsize > 1}
    return [name for name, value in real.items() if not value.is_meta and not value.isfinite().all()]


def to_full(tensor: Tensor) -> Tensor:
    """Return the full tensor on every device. A collective if the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full_(target: Tensor, value: Tensor) -> None:
    """Copy the full tensor `value`, equal on all devices, into `target`, sharded or not."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    to_local(target).copy_(to_local(value))


def norm_of_parts(norms: Tensor, like: nn.Parameter) -> Tensor:
    """Combine the norms (n,) of this device's parts into one Euclidean norm over all devices.

    Args:
        norms: (n,) Euclidean norms of parts of one vector.
        like: parameter sharded as these parts are; if it is sharded, this is a collective.
    """
    norm = norms.norm()
    if isinstance(like, DTensor):
        square = norm.square()
        dist.all_reduce(square, group=like.device_mesh.get_group())
        norm = square.sqrt()
    return norm
