"""Images from a backbone: one image per prompt, each from its own seed."""

import torch
from torch import Tensor

from lit_align.backbones.base import Backbone


@torch.no_grad()
def generate(
    backbone: Backbone,
    prompts: list[str],
    seeds: list[int],
    height: int,
    width: int,
    steps: int = 50,
    guidance_scale: float = 5.0,
) -> Tensor:
    """Images (n, 3, height, width) uint8 on the CPU, by Euler steps; the caller chooses the autocast.

    The first noise of an image depends on its seed alone, so the same prompt and seed give comparable images
    whatever the batch is. Global random state, modes and weights are as before on return. Encoders that were not loaded
    are freed again; `borrowed_encoders` around several calls keeps them for all of these.
    """
    device = next(backbone.denoiser.parameters()).device
    shape = backbone.latent_shape(height, width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with backbone.borrowed_encoders():
            pipeline = backbone.pipeline()
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
            images = backbone.decode_latents(latents)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return images.cpu()
