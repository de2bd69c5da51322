"""Choose the backbone class of a pipeline, and load denoisers that `lit-align` or diffusers has written."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from lit_align.backbones.base import Backbone
from lit_align.backbones.loading.model_files import without_incidental
from lit_align.backbones.loading.sharded import is_sharded
from lit_align.backbones.loading.trained import build_unet, merge_trained_lora, read_trained
from lit_align.backbones.nf4 import is_quantized
from lit_align.backbones.sdxl import StableDiffusionXL
from lit_align.backbones.sharding import Denoiser
from lit_align.backbones.stable_diffusion import StableDiffusion
from lit_align.user_errors import UserFileNotFoundError, UserValueError

LORA_FILE = "pytorch_lora_weights.safetensors"
SHAPE = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "sample_size")
CHECKPOINT = ".ckpt"
SAMPLED = 4096  # about how many weights of each tensor a fingerprint reads


def backbone_class(repo: str) -> type[Backbone]:
    """Find the backbone class for the pipeline in `repo`, a hub id or a local folder.

    Raises:
        ValueError: if there is none.
    """
    classes: list[type[Backbone]] = [StableDiffusion, StableDiffusionXL]
    found = DiffusionPipeline.load_config(repo).get("_class_name")
    for backbone in classes:
        if backbone.pipeline_class.__name__ == found:
            return backbone
    known = " or a ".join(backbone.pipeline_class.__name__ for backbone in classes)
    raise UserValueError(f"repo: {repo!r} holds a {found}; it must hold a {known}.")


def load_denoiser(backbone: Backbone, path: str) -> Denoiser:
    """Load a denoiser that replaces the backbone's: a UNet, or a copy of the backbone's UNet with a LoRA merged in.

    Args:
        backbone: float32 and untrained; it is not changed.
        path: UNet folder, folder or file of a LoRA in safetensors, or checkpoint of `lit-align fit`.

    Raises:
        FileNotFoundError: if `path` is none of these.
        ValueError: if it does not fit the backbone.
    """
    if is_quantized(backbone.denoiser):
        raise UserValueError(
            f"unet: {path!r} cannot be merged into weights in NF4, which would round the LoRA. Load the backbone "
            "without model.backbone.lora."
        )
    location = Path(path)
    if (location / "config.json").is_file():
        return _load_unet(backbone, location)
    file = location if location.is_file() or is_sharded(location) else location / LORA_FILE
    if not file.exists():
        raise UserFileNotFoundError(
            f"unet: {path!r} is neither a UNet folder (config.json) nor a LoRA ({LORA_FILE}) nor a checkpoint "
            f"({CHECKPOINT}). Name an output of lit-align export or a checkpoint of lit-align fit."
        )
    denoiser = _load_checkpoint(backbone, file) if file.suffix == CHECKPOINT else _merge_lora(backbone, file)
    return denoiser.requires_grad_(False).eval()


def _load_checkpoint(backbone: Backbone, file: Path) -> Denoiser:
    trained = read_trained(file)
    found, wanted = trained.info["pipeline"], backbone.pipeline_class.__name__
    if found != wanted:
        raise UserValueError(
            f"unet: {file} belongs to a {found}, but {backbone.repo!r} is a {wanted}. Choose another unet or repo."
        )
    if trained.info["lora"] is not None:
        return merge_trained_lora(backbone, trained)
    denoiser = build_unet(trained, backbone.denoiser.dtype)
    _check_shape(backbone, denoiser, file)
    return denoiser


def _load_unet(backbone: Backbone, folder: Path) -> Denoiser:
    denoiser = UNet2DConditionModel.from_pretrained(folder, dtype=backbone.denoiser.dtype, use_safetensors=True)
    _check_shape(backbone, denoiser, folder)
    return denoiser.requires_grad_(False).eval()


def _check_shape(backbone: Backbone, denoiser: Denoiser, path: Path) -> None:
    backbone.check_denoiser_config(path, denoiser.config)
    for name in SHAPE:
        found, wanted = denoiser.config.get(name), backbone.denoiser.config.get(name)
        if found != wanted:
            raise UserValueError(f"unet: {path} has {name} {found}, but the UNet of {backbone.repo!r} has {wanted}.")


def _merge_lora(backbone: Backbone, file: Path) -> Denoiser:
    try:
        with safe_open(file, framework="pt") as weights:
            foreign = [name for name in weights.keys() if not name.startswith("unet.")]  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise UserValueError(f"unet: {file} is not a safetensors file: {error}.") from error
    if foreign:
        raise UserValueError(
            f"unet: {file} changes more than the UNet, or is not in diffusers' layout: it has {foreign[0]!r}. "
            "Use a LoRA of only the UNet, as lit-align export writes it."
        )
    denoiser = copy.deepcopy(backbone.denoiser)
    denoiser.load_lora_adapter(file.parent, weight_name=file.name, prefix="unet", use_safetensors=True)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    return denoiser


def fingerprint(backbone: Backbone, denoiser: Denoiser) -> str:
    """Digest all that decides an image to 16 hexadecimal digits: weights, configs, tokenizers and schedule.

    Reads some thousand evenly spaced weights of each tensor: all of SDXL's would take half a minute, and training
    changes every weight.
    """
    texts = [encoder.config.to_dict() for encoder in backbone.text_encoders]
    configs = [dict(part.config) for part in (backbone.scheduler, backbone.vae, denoiser)] + texts
    settings = [type(backbone).__name__, backbone.prompts_identity(), *map(without_incidental, configs)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    modules: dict[str, Any] = {"denoiser": denoiser, "text_encoders": backbone.text_encoders, "vae": backbone.vae}
    for part, module in modules.items():
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{part}/{name}/{tuple(value.shape)}".encode())
            some = value.detach().flatten()[:: max(1, value.numel() // SAMPLED)]
            digest.update(some.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
