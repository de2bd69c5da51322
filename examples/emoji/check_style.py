"""Check the scorer of high contrast where the style is known: how many of the held-out images does it judge rightly?

    python examples/emoji/check_style.py

Three kinds of images are judged: the real ones, their reconstructions by the VAE, and versions that the base draws over
them (image to image, 60 % of the noise), with all the base's imperfections.
"""

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from lit_align.backbones import StableDiffusionXL
from lit_align.data.decoder import decode_pixels
from lit_align.data.images import to_planes
from lit_align.data.shards.layout import parse_sample, read_samples
from lit_align.data.shards.patterns import expand
from lit_align.scoring.scorers.analytic import high_contrast

PAIRS = "assets/emoji/pairs/high_contrast-over-color/held_out/*.tar"
STEPS, GUIDANCE, STRENGTH = 25, 3.0, 0.6


def read_pairs(shards: str) -> tuple[list[str], Tensor, Tensor]:
    """Prompts, chosen and rejected images (n, 3, 32, 32) uint8."""
    pairs = [parse_sample(sample) for shard in expand(shards) for sample in read_samples(shard)]
    images = torch.stack(
        [torch.stack([to_planes(decode_pixels(data)) for data in (pair.image_0, pair.image_1)]) for pair in pairs]
    )
    chosen = torch.tensor([0 if pair.label_0 > 0.5 else 1 for pair in pairs])
    rows = torch.arange(len(pairs))
    return [pair.prompt for pair in pairs], images[rows, chosen], images[rows, 1 - chosen]


@torch.no_grad()
def redraw(backbone: StableDiffusionXL, prompts: list[str], images: Tensor) -> Tensor:
    """The base's own versions (n, 3, 32, 32) uint8 of images whose style is known."""
    pipeline = StableDiffusionXLImg2ImgPipeline(**backbone.pipeline().components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompts,
        image=images.float() / 255,
        strength=STRENGTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return backbone.decode_latents(latents)


@torch.no_grad()
def main() -> None:
    backbone = StableDiffusionXL("assets/emoji/pipeline")
    prompts, chosen, rejected = read_pairs(PAIRS)
    known = {
        "real images": (chosen, rejected),
        "VAE reconstructions": tuple(backbone.decode_latents(backbone.encode_images(x)) for x in (chosen, rejected)),
        "redrawn by the base": tuple(redraw(backbone, prompts, x) for x in (chosen, rejected)),
    }
    for name, (contrast, colour) in known.items():
        right = torch.cat([high_contrast(contrast), ~high_contrast(colour)]).float().mean()
        print(f"{right:.1%} of {2 * len(prompts)} {name} are judged rightly")


if __name__ == "__main__":
    main()
