"""Sample images from a backbone: one image per prompt, each from its own seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from lit_align.backbones.base import Backbone
from lit_align.backbones.encoders import to_pixels
from lit_align.common.choices import Sampler

# Increase when equal arguments give another image: stored images are only reused within one version.
SAMPLING_VERSION = 1
SCHEDULERS: dict[Sampler, tuple[Any, dict[str, Any]]] = {  # class, changes to the pipeline's config
    "euler": (EulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),  # its default clips latents to [-1, 1]
    "dpm++": (DPMSolverMultistepScheduler, {}),
}
assert set(SCHEDULERS) == set(get_args(Sampler))


class SampledImages(NamedTuple):
    """Sampled images, and which of them are valid."""

    images: Tensor  # (n, 3, height, width) uint8 on the CPU
    finite: Tensor  # (n,) bool on the CPU: latents and decoded values are free of NaN and infinity


def generate(
    backbone: Backbone,
    prompts: list[str],
    seeds: list[int],
    height: int,
    width: int,
    steps: int = 50,
    guidance_scale: float = 5.0,
    sampler: Sampler = "euler",
    after_step: Callable[[], object] | None = None,
) -> Tensor:
    """Return the images (n, 3, height, width) uint8 of `sample_images`, without checking that they are finite."""
    return sample_images(
        backbone, prompts, seeds, height, width, steps, guidance_scale, sampler, after_step=after_step
    ).images


@torch.no_grad()
def sample_images(
    backbone: Backbone,
    prompts: list[str],
    seeds: list[int],
    height: int,
    width: int,
    steps: int = 50,
    guidance_scale: float = 5.0,
    sampler: Sampler = "euler",
    after_step: Callable[[], object] | None = None,
) -> SampledImages:
    """Sample one image per prompt and seed; the caller chooses the autocast.

    An image's first noise depends only on its seed, so images of one prompt and seed are comparable across batches.
    Global random state, train/eval modes and weights are restored. Encoders loaded here are freed again; wrap several
    calls in `borrowed_encoders` to load them once. `after_step` is called after each sampling step, and may raise.
    """
    device = next(backbone.denoiser.parameters()).device
    shape = backbone.latent_shape(height, width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with _eval_mode(backbone), backbone.borrowed_encoders():
        pipeline = _pipeline(backbone, sampler)
        latents = pipeline(
            prompt=prompts,
            latents=noise.to(device),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            callback_on_step_end=None if after_step is None else partial(_call, after_step),
        ).images
        del pipeline  # it refers to the borrowed encoders, which could not be freed
        values = backbone.decode(latents)
    finite = latents.isfinite().flatten(1).all(1) & values.isfinite().flatten(1).all(1)
    return SampledImages(to_pixels(values).cpu(), finite.cpu())


def _pipeline(backbone: Backbone, sampler: Sampler) -> Any:
    pipeline, (scheduler, changes) = backbone.pipeline(), SCHEDULERS[sampler]
    pipeline.scheduler = scheduler.from_config(backbone.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _call(after_step: Callable[[], object], *pipeline_state: object) -> dict[str, Any]:
    """Call `after_step` as diffusers calls back after a sampling step; changes none of its tensors."""
    after_step()
    return {}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, and restore each submodule's own mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
