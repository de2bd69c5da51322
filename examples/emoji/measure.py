"""Did the style change? Images of held-out prompts before and after, from the same noise.

    python examples/emoji/measure.py --config configs/quickstart.yaml --unet runs/quickstart/unet \\
        --output runs/quickstart

The measure of style: an image is in the preferred style, high contrast, if its colourfulness (Hasler and
Süsstrunk 2003; 0 for grey) is under 20 and at least 70 % of its pixels are near black or near white, so that a grey
smear counts as neither. Its accuracy is measured, in the same run, where the style is known: on the real images, on
their reconstructions by the VAE, and on images that the base model itself redraws from them (image to image, 60 % of
the noise), with all the base's imperfections.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
import yaml
from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from lit_align.backbones import StableDiffusionXL
from lit_align.backbones.sampling import generate
from lit_align.callbacks.sample_grid import draw_grid
from lit_align.common.files import write_png
from lit_align.data import PreferenceDataModule
from lit_align.objectives import MaPO
from lit_align.scoring.scorers.analytic import colourfulness
from lit_align.training.module import AlignmentModule

COLOURFULNESS = 20.0
EXTREME_SHARE = 0.7
STEPS, GUIDANCE = 25, 3.0


def is_high_contrast(images: Tensor) -> Tensor:
    """(n,) bool: without colour, and mostly near black or near white."""
    grey = images.float().mean(1)
    extreme = ((grey < 64) | (grey > 191)).float().flatten(1).mean(1)
    return (colourfulness(images) < COLOURFULNESS) & (extreme >= EXTREME_SHARE)


def held_out_pairs(shards: str) -> tuple[list[str], Tensor, Tensor]:
    """Prompts, chosen and rejected images (n, 3, 32, 32) uint8."""
    data = PreferenceDataModule("unused", shards, resolution=32, batch_size=1000, num_workers=0)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    return batch.prompts, batch.chosen, batch.rejected


def draw(backbone: StableDiffusionXL, prompts: list[str], repeats: int) -> Tensor:
    """`repeats` images of every prompt, prompt after prompt; prompt i, repeat r from seed 1000 r + i."""
    jobs = [(i, 1000 * r + i) for i in range(len(prompts)) for r in range(repeats)]
    images = []
    for first in tqdm(range(0, len(jobs), 24), desc="  drawing", unit="batch", leave=False):
        numbers, seeds = zip(*jobs[first : first + 24], strict=True)
        images.append(generate(backbone, [prompts[i] for i in numbers], list(seeds), 32, 32, STEPS, GUIDANCE))
    return torch.cat(images)


@torch.no_grad()
def redraw(backbone: StableDiffusionXL, prompts: list[str], images: Tensor) -> Tensor:
    """The base's own version of images whose style is known."""
    pipeline = StableDiffusionXLImg2ImgPipeline(**backbone.pipeline().components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompts,
        image=images.float() / 255,
        strength=0.6,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return backbone.decode_latents(latents)


def accuracy_of_measure(backbone: StableDiffusionXL, prompts: list[str], chosen: Tensor, rejected: Tensor) -> None:
    """Print how often the measure is right where the style is known."""
    known = {
        "real images": (chosen, rejected),
        "VAE reconstructions": tuple(backbone.decode_latents(backbone.encode_images(x)) for x in (chosen, rejected)),
        "redrawn by the base": tuple(redraw(backbone, prompts, x) for x in (chosen, rejected)),
    }
    for name, (high_contrast, colour) in known.items():
        right = torch.cat([is_high_contrast(high_contrast), ~is_high_contrast(colour)]).float().mean()
        print(f"  accuracy of the measure on {2 * len(prompts)} {name}: {right:.1%}")


def held_out_accuracy(backbone: StableDiffusionXL, shards: str) -> float:
    """Implicit accuracy by `validate`, on its fixed draw."""
    module = AlignmentModule(backbone, MaPO(), validation_draws=4)
    data = PreferenceDataModule("unused", shards, resolution=32, batch_size=36, num_workers=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.validate(module, data, verbose=False)
    return metrics["val/accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the run's config: base model and held-out pairs")
    parser.add_argument("--unet", type=Path, required=True, help="the exported UNet")
    parser.add_argument("--output", type=Path, required=True, help="folder for before-after.png")
    parser.add_argument("--prompts_of", help="other shards, to measure on their prompts")
    parser.add_argument("--repeats", type=int, default=2, help="images per prompt")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()

    config = yaml.safe_load(arguments.config.read_text())
    shards = arguments.prompts_of or config["data"]["val_shards"]
    backbone = StableDiffusionXL(config["model"]["backbone"]["init_args"]["repo"])
    prompts, chosen, rejected = held_out_pairs(shards)

    print(f"\nMeasuring on {len(prompts)} prompts, {arguments.repeats} images each, the same noise before and after")
    accuracy_of_measure(backbone, prompts, chosen, rejected)
    before, accuracy_before = draw(backbone, prompts, arguments.repeats), held_out_accuracy(backbone, shards)
    backbone.denoiser.load_state_dict(UNet2DConditionModel.from_pretrained(arguments.unet).state_dict())
    after, accuracy_after = draw(backbone, prompts, arguments.repeats), held_out_accuracy(backbone, shards)

    picture = arguments.output / "before-after.png"
    shown = range(0, 16 * arguments.repeats, arguments.repeats)
    rows = {"before": [before[i] for i in shown], "after": [after[i] for i in shown]}
    write_png(picture, draw_grid(prompts[:16], rows, cell=64))
    shares = [is_high_contrast(images).float().mean().item() for images in (before, after)]
    colours = [colourfulness(images).mean().item() for images in (before, after)]
    results = {"images": len(before), "style_share": shares, "colourfulness": colours}
    results["accuracy"] = [accuracy_before, accuracy_after]
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n  images in the preferred style   {shares[0]:6.1%} -> {shares[1]:6.1%}   of {len(before)}")
    print(f"  mean colourfulness              {colours[0]:6.1f} -> {colours[1]:6.1f}")
    print(f"  held-out preference accuracy    {accuracy_before:6.1%} -> {accuracy_after:6.1%}")
    print(f"  picture                         {picture}")
    print(f"  weights                         {arguments.unet}")


if __name__ == "__main__":
    main()
