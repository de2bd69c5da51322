"""Draw before-after.png from the images that `lit-align test` wrote, and print how the style has changed.

python examples/emoji/before_after.py --test runs/quickstart/test --output runs/quickstart/before-after.png
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from lit_align.callbacks.sample_grid import draw_grid
from lit_align.common.files import write_png
from lit_align.data.decoder import decode_pixels
from lit_align.data.images import to_planes
from lit_align.scoring.scorers.analytic import colourfulness, high_contrast

SHOWN = 16  # prompts in the picture


def read_images(folder: Path) -> Tensor:
    """All images of a model, (prompts, 3, height, width) uint8."""
    return torch.stack([to_planes(decode_pixels(path.read_bytes())) for path in sorted(folder.glob("*.png"))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", type=Path, required=True, help="output folder of lit-align test")
    parser.add_argument("--output", type=Path, required=True, help="the picture, a PNG")
    arguments = parser.parse_args()
    results = json.loads((arguments.test / "results.json").read_text(encoding="utf-8"))
    prompts = [row["prompt"] for row in results["prompts"]]
    before, after = (read_images(arguments.test / "images" / model) for model in list(results["models"])[:2])
    rows = {"before": list(before[:SHOWN]), "after": list(after[:SHOWN])}
    write_png(arguments.output, draw_grid(prompts[:SHOWN], rows, cell=64))
    shares = [high_contrast(images).float().mean().item() for images in (before, after)]
    colours = [colourfulness(images).mean().item() for images in (before, after)]
    print(f"\n  images in high contrast   {shares[0]:6.1%} -> {shares[1]:6.1%}   of {len(before)}")
    print(f"  mean colourfulness        {colours[0]:6.1f} -> {colours[1]:6.1f}")
    print(f"  picture                   {arguments.output}")


if __name__ == "__main__":
    main()
