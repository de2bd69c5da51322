"""`lit-align export`: from a training checkpoint to weights that diffusers loads in one line."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lit_align.backbones.base import DTYPES, Precision
from lit_align.backbones.reference import POLICY, REFERENCE

PREFIX = "backbone.denoiser."


def export(ckpt_path: Path, output: Path, precision: Precision = "fp32", overwrite: bool = False) -> None:
    """Write the trained weights of a checkpoint as safetensors in diffusers' layout.

    Args:
        ckpt_path: a checkpoint that `lit-align fit` wrote.
        output: new folder; it becomes a UNet folder, or holds `pytorch_lora_weights.safetensors`.
        precision: of the weights in the files.
        overwrite: replace `output` if it exists.

    Raises:
        FileExistsError: if `output` exists and is not to be replaced.
        ValueError: if the file is not a checkpoint of lit-align.
    """
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists. Choose another folder or pass --overwrite true.")
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    info = checkpoint.get("lit_align")
    if info is None:
        raise ValueError(f"ckpt_path: {ckpt_path} was not written by lit-align: it has no entry 'lit_align'.")
    weights = {
        name.removeprefix(PREFIX): value.to(DTYPES[precision])
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(PREFIX) and f".{REFERENCE}." not in name
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as part:
        folder = Path(part) / output.name  # complete before it gets its name
        how_to_load = _write_unet(weights, info, folder) if info["lora"] is None else _write_lora(weights, info, folder)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    print(f"Exported {len(weights)} tensors of step {checkpoint['global_step']} to {output}")
    print(f"Load it: {how_to_load.replace('OUTPUT', repr(str(output)))}")


def _write_unet(weights: dict[str, Tensor], info: dict[str, Any], folder: Path) -> str:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(info["denoiser_config"])
    unet.load_state_dict(weights, strict=True, assign=True)
    unet.save_pretrained(folder, safe_serialization=True)
    return (
        "unet = UNet2DConditionModel.from_pretrained(OUTPUT); "
        f"pipeline = {info['pipeline']}.from_pretrained({info['repo']!r}, unet=unet)"
    )


def _write_lora(weights: dict[str, Tensor], info: dict[str, Any], folder: Path) -> str:
    """peft names a trained factor after its adapter; files have no adapter name."""
    pipeline = getattr(diffusers, info["pipeline"])
    layers = {name.replace(f".{POLICY}.weight", ".weight"): value for name, value in weights.items()}
    lora = info["lora"]
    metadata = {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": list(lora["target_modules"])}
    pipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return "pipeline.load_lora_weights(OUTPUT)"
