"""`lit-align export`: writes a checkpoint's weights in the layout of diffusers."""

import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from lit_align.common.choices import Precision
from lit_align.user_errors import UserFileExistsError

WRITTEN = ("config.json", "diffusion_pytorch_model*", "pytorch_lora_weights*")  # names of what an export holds

if TYPE_CHECKING:  # functions import modules that need torch, so that --help does not
    import torch

    from lit_align.backbones.loading.trained import Trained


def export(ckpt_path: Path, output: Path, precision: Precision = "fp32", overwrite: bool = False) -> None:
    """Write the trained weights of a checkpoint as safetensors in diffusers' layout.

    Args:
        ckpt_path: a checkpoint of `lit-align fit`.
        output: new folder; it becomes a UNet folder, or holds `pytorch_lora_weights.safetensors`.
        precision: of the weights in the files.
        overwrite: replace `output` if it holds an export and nothing else.

    Raises:
        UserFileExistsError: if `output` exists and `overwrite` is false, or if it holds anything but an export.
        UserValueError: if the file is not a checkpoint of lit-align.
    """
    from lit_align.backbones.encoder_parts import DTYPES
    from lit_align.backbones.loading.trained import read_trained
    from lit_align.commands.shared.announced_checkpoint import announce_checkpoint

    if output.exists() and not overwrite:
        raise UserFileExistsError(f"output: {output} exists. Choose another folder or pass --overwrite true.")
    check_replaceable(output)
    trained = read_trained(ckpt_path)
    announce_checkpoint(ckpt_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as part:
        folder = Path(part) / output.name  # renamed once complete
        write = _write_unet if trained.info["lora"] is None else _write_lora
        how_to_load = write(trained, DTYPES[precision], folder)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    print(f"Exported {len(trained.weights)} tensors of step {trained.step} to {output}")
    print(f"Load it: {how_to_load.replace('OUTPUT', repr(str(output)))}")


def check_replaceable(output: Path) -> None:
    """Refuse to replace anything but the files of an export.

    Raises:
        UserFileExistsError: naming what else is there.
    """
    if not output.exists():
        return
    found = sorted(path.name for path in output.iterdir()) if output.is_dir() and not output.is_symlink() else None
    foreign = None if found is None else next((n for n in found if not any(fnmatch(n, own) for own in WRITTEN)), None)
    if found is None or foreign is not None:
        what = "is not a folder" if found is None else f"holds {foreign}, which no export writes"
        raise UserFileExistsError(f"output: {output} {what}, and --overwrite would delete it. Choose another folder.")


def _write_unet(trained: "Trained", dtype: "torch.dtype", folder: Path) -> str:
    from lit_align.backbones.loading.trained import build_unet

    build_unet(trained, dtype).save_pretrained(folder, safe_serialization=True)
    return (
        "unet = UNet2DConditionModel.from_pretrained(OUTPUT); "
        f"pipeline = {trained.info['pipeline']}.from_pretrained({trained.info['repo']!r}, unet=unet)"
    )


def _write_lora(trained: "Trained", dtype: "torch.dtype", folder: Path) -> str:
    """Write a LoRA without peft's adapter name, which files do not have, and with its scale in the second factor.

    Only diffusers reads the scale from a file in this layout. Converters and other programs take alpha as equal to the
    rank, so it is: a scale of 1 is right everywhere.
    """
    import diffusers

    from lit_align.backbones.loading.trained import cast
    from lit_align.backbones.lora import POLICY, LoRA

    pipeline, lora = getattr(diffusers, trained.info["pipeline"]), LoRA(**trained.info["lora"])
    scaled = {n: value.float() * lora.scale if ".lora_B." in n else value for n, value in trained.weights.items()}
    weights = cast(trained._replace(weights=scaled), dtype)
    layers = {name.replace(f".{POLICY}.weight", ".weight"): value for name, value in weights.items()}
    metadata = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": list(lora.target_modules)}
    pipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return "pipeline.load_lora_weights(OUTPUT)"
