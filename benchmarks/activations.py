"""Measure a step's CPU seconds, and the bytes kept for the backward pass, by how activations are recomputed.

python benchmarks/activations.py [--rounds 7]     one thread; the settings take turns in each round
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from lit_align.backbones import Backbone, LoRA, StableDiffusionXL
from lit_align.common.choices import Checkpointing
from lit_align.memory.live import count_saved

ROOT = Path(__file__).parents[1]
SETTINGS: tuple[Checkpointing, ...] = (False, "selective", True)  # of model.backbone.gradient_checkpointing
IMAGES, SIZE = 4, 64  # of a step, and pixels of a side


def make_forward(backbone: Backbone) -> Callable[[], Tensor]:
    """Return a function that computes a scalar loss of random latents."""
    latents = torch.randn(IMAGES, *backbone.latent_shape(SIZE, SIZE))
    timesteps = torch.arange(IMAGES) * 100
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).repeat(IMAGES, 1)
    conditioning = backbone.encode_prompts([f"emoji {number}" for number in range(IMAGES)])
    return lambda: backbone.denoise(latents, timesteps, conditioning, time_ids).square().mean()


def seconds_of(forward: Callable[[], Tensor]) -> float:
    """Measure the CPU seconds of a forward and a backward pass."""
    start = time.process_time()
    forward().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start


def bytes_kept(forward: Callable[[], Tensor], backbone: Backbone) -> int:
    """Count what a forward pass keeps for the backward pass."""
    with count_saved(backbone.parameters()) as saved:
        loss = forward()
        kept = saved()
    loss.backward()  # type: ignore[no-untyped-call]
    return kept


def main() -> None:
    """Print a table with the median seconds of each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    forwards, kept = {}, {}
    for (trained, lora), setting in product({"all weights": None, "LoRA of rank 8": LoRA()}.items(), SETTINGS):
        backbone = StableDiffusionXL(str(ROOT / "assets/emoji/pipeline"), lora=lora, gradient_checkpointing=setting)
        key = trained, str(setting).lower()
        forwards[key] = make_forward(backbone.train())
        kept[key] = bytes_kept(forwards[key], backbone)  # also the first step, which takes longer
    seconds = {key: list[float]() for key in forwards}
    for _ in range(rounds):
        for key, forward in forwards.items():
            seconds[key].append(seconds_of(forward))
    print("| trained | gradient_checkpointing | CPU s a step | each | MB kept |\n|---|---|---|---|---|")
    for key, found in seconds.items():
        values = f"{statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f}"
        print(f"| {' | '.join(key)} | {values} | {kept[key] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
