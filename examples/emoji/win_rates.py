"""Win rates of aligned models against the base, by the three bundled scorers, with intervals.

    python examples/emoji/win_rates.py --unet runs/NAME/unet --output runs/NAME

One image a prompt and repeat, from the same noise for both models. An image wins where its score is greater than that
of the base's image; a difference within the scorer's margin, the one of its vote in training, is a tie and counts one
half. The macro-average is the mean over the scorers. Intervals (95 %) are from 10,000 bootstrap samples of the prompts.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from measure import draw, held_out_pairs
from torch import Tensor

from lit_align.backbones import StableDiffusionXL
from lit_align.callbacks.sample_grid import draw_grid
from lit_align.common.files import write_png
from lit_align.scoring.consensus import cast_votes
from lit_align.scoring.presets import load_scorers

PIPELINE = "assets/emoji/pipeline"
PROMPTS = "assets/emoji/pairs/high_contrast-over-color/held_out/*.tar"
SCORERS = ("clip", "style", "colour")
PRESETS = Path("assets/emoji/scorers/scorers.yaml")
MARGINS = {"clip": 0.004, "style": 0.4, "colour": 4.0}  # a tenth of each score's deviation on all training pairs


def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """(scorers, prompts, repeats) of images (prompts * repeats, 3, h, w), prompt after prompt."""
    repeats = len(images) // len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(repeats)]
    scores = [scorer.prepare("cpu").score(list(images), repeated) for scorer in load_scorers(SCORERS, PRESETS).values()]
    return torch.stack(scores).view(len(SCORERS), len(prompts), repeats)


def wins(aligned: Tensor, base: Tensor) -> Tensor:
    """(scorers, prompts): share of repeats won, of scores (scorers, prompts, repeats)."""
    margins = torch.tensor([MARGINS[name] for name in SCORERS]).view(-1, 1, 1)
    return (cast_votes(aligned - base, margins) + 1).mean(-1) / 2


def interval(values: Tensor, samples: int = 10_000) -> list[float]:
    """Mean and 95 % interval of values (prompts,), by the bootstrap."""
    rows = torch.randint(len(values), (samples, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[rows].mean(1)
    return [values.mean().item(), *means.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()]


def summarize(won: Tensor) -> dict[str, list[float]]:
    """Win rate and interval by scorer, and of their macro-average, of wins (scorers, prompts)."""
    by_scorer = {name: interval(values) for name, values in zip(SCORERS, won, strict=True)}
    return by_scorer | {"macro": interval(won.mean(0))}


def base_images(backbone: StableDiffusionXL, prompts: list[str], repeats: int, cache: Path) -> Tensor:
    """The base's images, drawn once for all runs."""
    path = cache / f"base-{len(prompts)}x{repeats}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")  # two runs may draw them at a time
        torch.save(draw(backbone, prompts, repeats), part)
        part.replace(path)
    return torch.load(path, weights_only=True)


def compare(unet: Path, prompts: list[str], repeats: int, cache: Path, picture: Path) -> Tensor:
    """Wins (scorers, prompts) of the exported UNet; draws both models' images side by side."""
    backbone = StableDiffusionXL(PIPELINE)
    before = base_images(backbone, prompts, repeats, cache)
    backbone.denoiser.load_state_dict(UNet2DConditionModel.from_pretrained(unet).state_dict())
    after = draw(backbone, prompts, repeats)
    shown = range(0, min(16, len(prompts)) * repeats, repeats)
    rows = {"base": [before[i] for i in shown], "aligned": [after[i] for i in shown]}
    write_png(picture, draw_grid(prompts[:16], rows, cell=64))
    return wins(score(after, prompts), score(before, prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", type=Path, required=True, help="the exported UNet")
    parser.add_argument("--output", type=Path, required=True, help="folder for win_rates.json and the picture")
    parser.add_argument("--prompts_of", default=PROMPTS, help="shards with the prompts")
    parser.add_argument("--repeats", type=int, default=2, help="images per prompt")
    arguments = parser.parse_args()
    prompts = held_out_pairs(arguments.prompts_of)[0]
    won = compare(arguments.unet, prompts, arguments.repeats, arguments.output, arguments.output / "before-after.png")
    found = summarize(won)
    (arguments.output / "win_rates.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nwin rates against the base, {len(prompts)} prompts, {arguments.repeats} images each")
    for name, (mean, low, high) in found.items():
        print(f"  {name:8} {mean:6.1%}   95 % interval {low:.1%} to {high:.1%}")


if __name__ == "__main__":
    main()
