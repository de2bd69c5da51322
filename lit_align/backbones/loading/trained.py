"""Read trained denoisers from checkpoints of `lit-align fit`."""

import copy
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lit_align.backbones.base import Backbone
from lit_align.backbones.compiled import plain_name
from lit_align.backbones.loading.sharded import META, is_sharded, read_full
from lit_align.backbones.lora import REFERENCE, LoRA
from lit_align.backbones.sharding import Denoiser, non_finite
from lit_align.user_errors import UserValueError

PREFIX = "backbone.denoiser."


class Trained(NamedTuple):
    """Policy of a checkpoint, without the reference."""

    weights: dict[str, Tensor]  # by name in the denoiser: all of it or its LoRA; mapped from the file, read when used
    info: dict[str, Any]  # see `Backbone.export_info`
    step: int  # optimizer steps


def read_trained(path: Path) -> Trained:
    """Read the policy of a checkpoint, one file or sharded.

    Raises:
        FileNotFoundError: if there is none.
        IsADirectoryError: if it is a folder, but not a sharded checkpoint.
        ValueError: if it was not written by lit-align, or is damaged.
    """
    sharded = is_sharded(path)
    try:
        checkpoint = torch.load(path / META if sharded else path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserValueError(f"{path} is not a checkpoint, or is damaged: {str(error).splitlines()[0]}") from error
    info = checkpoint.get("lit_align") if isinstance(checkpoint, dict) else None
    if info is None:
        raise UserValueError(f"{path} was not written by lit-align: it has no entry 'lit_align'.")
    found = read_full(path, PREFIX) if sharded else checkpoint["state_dict"]
    weights = {
        name.removeprefix(PREFIX): value
        for name, value in ((plain_name(name), value) for name, value in found.items())
        if name.startswith(PREFIX) and f".{REFERENCE}." not in name
    }
    return Trained(weights, info, checkpoint["global_step"])


def cast(trained: Trained, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy the weights in `dtype`: a running training overwrites its last checkpoint, from which they are mapped.

    Raises:
        UserValueError: if a weight is not finite, or not in `dtype`.
    """
    # Files of weights hold contiguous ones only, which those in channels_last order are not.
    weights = {name: value.to(dtype, copy=True).contiguous() for name, value in trained.weights.items()}
    if found := non_finite(weights):
        before = non_finite({name: trained.weights[name] for name in found})
        what, remedy = (
            ("in the checkpoint", "choose an earlier one") if before else (f"in {dtype}", "choose fp32 or bf16")
        )
        raise UserValueError(
            f"The checkpoint of step {trained.step:,} cannot be used: {len(found)} of its {len(weights)} weights are "
            f"not finite {what}, such as {found[0]}; {remedy}."
        )
    return weights


def build_unet(trained: Trained, dtype: torch.dtype) -> Denoiser:
    """Build the UNet of a full fine-tuning in `dtype`."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(trained.info["denoiser_config"])
    unet.load_state_dict(cast(trained, dtype), strict=True, assign=True)
    return unet


def merge_trained_lora(backbone: Backbone, trained: Trained) -> Denoiser:
    """Copy the backbone's denoiser and merge the checkpoint's LoRA into the copy.

    Raises:
        ValueError: if the LoRA belongs to another denoiser.
    """
    denoiser = copy.deepcopy(backbone.denoiser)
    denoiser.add_adapter(LoRA(**trained.info["lora"]).config())
    own = {name: value for name, value in denoiser.state_dict().items() if ".lora_" in name}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    if shapes != {name: tuple(value.shape) for name, value in trained.weights.items()}:
        raise UserValueError(
            f"unet: the checkpoint's LoRA was trained on {trained.info['repo']!r} and does not fit {backbone.repo!r}."
        )
    denoiser.load_state_dict(cast(trained, torch.float32), strict=False)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    return denoiser
