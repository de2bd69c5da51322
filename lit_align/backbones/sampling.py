"""Images from a backbone: one image per prompt, each from its own seed."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from lit_align.backbones.base import Backbone
from lit_align.backbones.encoders import to_pixels

DRAWING_VERSION = 1  # counts up whenever the same arguments draw another image: kept images are of one version
Sampler = Literal["euler", "ddim", "dpm++"]
SCHEDULERS: dict[Sampler, tuple[Any, dict[str, Any]]] = {  # of diffusers, and what they are told beside the pipeline's
    "euler": (EulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),  # latents go beyond 1, where its default would cut them
    "dpm++": (DPMSolverMultistepScheduler, {}),
}
assert set(SCHEDULERS) == set(get_args(Sampler))


class Drawn(NamedTuple):
    """Images, and whether they are any."""

    images: Tensor  # (n, 3, height, width) uint8 on the CPU
    finite: Tensor  # (n,) bool on the CPU: latents and decoded values were numbers


def generate(
    backbone: Backbone,
    prompts: list[str],
    seeds: list[int],
    height: int,
    width: int,
    steps: int = 50,
    guidance_scale: float = 5.0,
    sampler: Sampler = "euler",
) -> Tensor:
    """The images of `draw`, whatever they show."""
    return draw(backbone, prompts, seeds, height, width, steps, guidance_scale, sampler).images


@torch.no_grad()
def draw(
    backbone: Backbone,
    prompts: list[str],
    seeds: list[int],
    height: int,
    width: int,
    steps: int = 50,
    guidance_scale: float = 5.0,
    sampler: Sampler = "euler",
) -> Drawn:
    """One image for each prompt and seed; the caller chooses the autocast.

    The first noise of an image depends on its seed alone, so the same prompt and seed give comparable images
    whatever the batch is. Global random state, modes and weights are as before on return. Encoders that were not loaded
    are freed again; `borrowed_encoders` around several calls keeps them for all of these.
    """
    device = next(backbone.denoiser.parameters()).device
    shape = backbone.latent_shape(height, width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    modes = {module: module.training for module in backbone.modules()}
    scheduler, options = SCHEDULERS[sampler]
    backbone.eval()
    try:
        with backbone.borrowed_encoders():
            pipeline = backbone.pipeline()
            pipeline.scheduler = scheduler.from_config(backbone.scheduler.config, **options)
            pipeline.set_progress_bar_config(disable=True)
            latents = pipeline(
                prompt=prompts,
                latents=noise.to(device),
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            ).images
            del pipeline  # or it would keep what is borrowed
            values = backbone.decode(latents)
    finally:
        for module, mode in modes.items():
            module.training = mode
    finite = latents.isfinite().flatten(1).all(1) & values.isfinite().flatten(1).all(1)
    return Drawn(to_pixels(values).cpu(), finite.cpu())
