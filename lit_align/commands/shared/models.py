"""Models that draw images: how to find, load and run them."""

import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lit_align.backbones import sampling
from lit_align.backbones.base import DTYPES, Backbone, Precision
from lit_align.backbones.loading.denoisers import CHECKPOINT, LORA_FILE, backbone_class, fingerprint, load_denoiser
from lit_align.backbones.loading.sharded import is_sharded
from lit_align.backbones.loading.trained import read_trained
from lit_align.backbones.reference import Denoiser
from lit_align.backbones.sampling import Sampler
from lit_align.commands.shared.announced_checkpoint import announce_checkpoint
from lit_align.user_errors import UserFileNotFoundError, UserValueError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ModelSpec(NamedTuple):
    """Location of a model that generates images."""

    repo: str  # hub id or local folder of a pipeline
    unet: str | None  # folder or file that replaces the UNet of `repo`, or a LoRA on it


class Sampling(NamedTuple):
    """Size, steps and precision of drawn images."""

    height: int  # pixels
    width: int
    steps: int
    precision: Precision
    sampler: Sampler = "euler"


class Model(NamedTuple):
    """A denoiser with its pipeline, which other denoisers share."""

    backbone: Backbone
    denoiser: Denoiser
    fingerprint: str

    def draw(self, prompts: list[str], seeds: list[int], guidance_scale: float, how: Sampling) -> Tensor:
        """Draw images (n, 3, height, width) uint8 on the CPU.

        Raises:
            UserValueError: if an image is not finite; written to a file, it would have one colour.
        """
        self.backbone.denoiser = self.denoiser
        device = self.denoiser.device.type
        dtype = DTYPES[how.precision]
        with nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype):
            images, finite = sampling.sample_images(
                self.backbone, prompts, seeds, how.height, how.width, how.steps, guidance_scale, how.sampler
            )
        if not finite.all():
            row = finite.tolist().index(False)
            raise UserValueError(
                f"{self.backbone.repo} drew nothing for {prompts[row]!r}, seed {seeds[row]}: its numbers are not "
                f"finite in {how.precision}. Try --precision bf16 or fp32, with another --output."
            )
        return images


def load_models(specs: Sequence[ModelSpec], vae_repo: str | None, variant: str | None) -> list[Model]:
    """Load models in float32 on the CPU; models of one pipeline share its other parts."""
    backbones: dict[str, Backbone] = {}
    models: dict[ModelSpec, Model] = {}
    for spec in specs:
        if spec.repo not in backbones:
            kind = backbone_class(spec.repo)
            # One image at a time through the VAE, so that a large batch takes little memory.
            backbone = kind(spec.repo, vae_repo, variant=variant, vae_slicing=True).requires_grad_(False)
            backbones[spec.repo] = backbone
        backbone = backbones[spec.repo]
        if spec not in models:
            if spec.unet is not None and Path(spec.unet).suffix == CHECKPOINT:
                announce_checkpoint(Path(spec.unet))
            # `Model.draw` replaces the backbone's denoiser, but all models are loaded before the first image.
            denoiser = backbone.denoiser if spec.unet is None else load_denoiser(backbone, spec.unet)
            models[spec] = Model(backbone, denoiser, fingerprint(backbone, denoiser))
    return [models[spec] for spec in specs]


def move_models(models: Sequence[Model], device: torch.device, precision: Precision) -> None:
    """Move models to a device. Text encoders stay in float32, because SDXL casts `time_ids` to their precision."""
    for model in models:
        model.backbone.denoiser = model.denoiser
        model.backbone.to(device)
        nn.Module.to(model.denoiser, DTYPES[precision])  # diffusers' own `to` warns of parts that UNets do not have


def check_numbers(counts: dict[str, int], sizes: dict[str, int | None]) -> None:
    """Raise a UserValueError unless counts are at least 1 and sizes in pixels are multiples of 8."""
    for name, value in counts.items():
        if value < 1:
            raise UserValueError(f"{name} is {value}; it must be at least 1.")
    for name, size in sizes.items():
        if size is not None and (size < 8 or size % 8):
            raise UserValueError(f"{name} is {size}; it must be a multiple of 8 pixels.")


def default_precision(device: torch.device) -> Precision:
    """Return the fastest precision in which models draw well on the device."""
    return "fp16" if device.type == "cuda" else "fp32"


def default_guidance_scale(repo: str) -> float:
    """Return the default of the pipeline's `__call__`: 5 for SDXL, 7.5 for Stable Diffusion."""
    return float(signature(backbone_class(repo).pipeline_class.__call__).parameters["guidance_scale"].default)


def native_size(repos: Iterable[str], vae_repo: str | None) -> int:
    """Return the default side of a pipeline's images in pixels. Reads no weights.

    Raises:
        UserValueError: if the pipelines have different sizes.
    """
    sizes = set()
    for repo in repos:
        wanted = UNet2DConditionModel.load_config(repo, subfolder="unet")["sample_size"]
        encoders = backbone_class(repo).without_denoiser(repo=repo, vae_repo=vae_repo)
        _, latents, _ = encoders.latent_shape(1 << 16, 1 << 16)  # proportional to the image's size
        sizes.add((wanted << 16) // latents)
    if len(sizes) > 1:
        raise UserValueError(f"The models draw {sorted(sizes)} pixels by themselves. Say --height and --width.")
    return int(sizes.pop())


def is_pipeline(name: str) -> bool:
    """Whether a model's name is a folder of a pipeline or a hub id, rather than weights of a UNet.

    Raises:
        UserFileNotFoundError: if it is neither.
    """
    path = Path(name)
    if path.is_file() or is_sharded(path) or any((path / file).is_file() for file in ("config.json", LORA_FILE)):
        return False
    if (path / "model_index.json").is_file() or (not path.exists() and HUB_ID.fullmatch(name)):
        return True
    raise UserFileNotFoundError(
        f"model: {name!r} is neither a checkpoint of lit-align fit ({CHECKPOINT}), nor a UNet folder (config.json), a "
        f"LoRA ({LORA_FILE}) or a pipeline (model_index.json), nor the name of one on the hub."
    )


def find_base(models: Iterable[str], base: str | None) -> str:
    """Return the pipeline that models were trained from: `base`, or the one named by their checkpoints.

    Raises:
        UserValueError: if the checkpoints name none or several.
    """
    if base is not None:
        return base
    named = {read_trained(Path(name)).info["repo"] for name in models if Path(name).suffix == CHECKPOINT}
    if len(named) != 1:
        found = f"checkpoints name {', '.join(map(repr, sorted(named)))}" if named else "no checkpoint names it"
        raise UserValueError(f"base: which pipeline was the model trained from? Here {found}. Say --base.")
    return str(named.pop())


def spec_of(model: str, base: str) -> ModelSpec:
    """Return where to load a model from: its own pipeline, or `base` with the model's UNet."""
    return ModelSpec(model, None) if is_pipeline(model) else ModelSpec(base, model)


def at_a_time(batch_size: int, device: torch.device) -> int:
    """Return how many images to draw or score in one pass.

    Always 1 on the CPU, where larger batches are hardly faster but round differently: results would depend on the batch
    size and the number of processes.
    """
    return 1 if device.type == "cpu" else batch_size
