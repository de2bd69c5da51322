"""Denoisers whose weights are shared out among devices (FSDP2), and their tensors as a part or as a whole."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from lit_align.backbones.reference import Denoiser


def shard_denoiser(
    denoiser: "Denoiser", mesh: dist.DeviceMesh, dtype: torch.dtype | None, keep_for_backward: bool = False
) -> None:
    """Share a UNet's weights out, block by block: a forward pass gathers one block at a time; again changes nothing.

    Args:
        denoiser: in place; names of its weights stay as they are.
        mesh: of one dimension.
        dtype: in which weights are gathered; None leaves them as they are. Gradients are summed in float32.
        keep_for_backward: what a forward pass has gathered stays until the backward pass has used it.
    """
    if isinstance(denoiser, FSDPModule):
        return
    # Inputs stay as they are: SDXL's sizes in pixels are not whole numbers any more in bfloat16.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    transformers = [module for module in denoiser.modules() if isinstance(module, BasicTransformerBlock)]
    blocks = [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]
    for module in (*transformers, *blocks, denoiser):
        # Also the outermost, which torch would leave gathered until a backward pass that a reference never has.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_for_backward)
    if keep_for_backward:
        denoiser.register_forward_hook(_let_go_without_backward)


def _let_go_without_backward(denoiser: nn.Module, *_: object) -> None:
    """After a forward pass that no backward pass follows: else the next step would be taken with these weights."""
    if not torch.is_grad_enabled():
        for module in denoiser.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this device, sharing its memory; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on every device; where it is sharded, a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Write `value`, which all devices have as a whole, into `target`, sharded or not."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    local(target).copy_(local(value))


def norm_of_parts(norms: Tensor, like: nn.Parameter) -> Tensor:
    """Euclidean norm over all devices of what has these norms (n,) on this one; a collective if `like` is sharded."""
    norm = norms.norm()
    if isinstance(like, DTensor):
        square = norm.square()
        dist.all_reduce(square, group=like.device_mesh.get_group())
        norm = square.sqrt()
    return norm
