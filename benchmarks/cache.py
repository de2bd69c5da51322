"""Measure how much faster a training step is on a cache: steps of the quickstart on images and on latents, in turns.

python benchmarks/cache.py [--steps 20] [--rounds 3]
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.alignment_runs import Clock
from lit_align.backbones import StableDiffusionXL
from lit_align.cli import main as lit_align
from lit_align.data import PreferenceDataModule
from lit_align.objectives import MaPO
from lit_align.training.module import AlignmentModule

CONFIG = "configs/quickstart.yaml"
SHARDS = "assets/emoji/pairs/high_contrast-over-color/train/*.tar"
PIPELINE = "assets/emoji/pipeline"


def time_steps(cache: str | None, steps: int) -> float:
    """Median seconds of a step of 16 pairs, without the first two steps."""
    L.seed_everything(0, verbose=False)
    module = AlignmentModule(
        StableDiffusionXL(PIPELINE), MaPO(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)
    )
    data = PreferenceDataModule(
        SHARDS, resolution=32, batch_size=16, num_workers=0, flip_probability=0.0, train_cache=cache
    )
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(module, data)
    return statistics.median(clock.seconds()[1:])


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="training steps per round and way")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in each of which both ways have their turn")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lit_align(["encode", f"--config={CONFIG}", f"--output={folder}/cache", "--accelerator=cpu"])
        rounds = []
        for _ in range(arguments.rounds):
            with contextlib.redirect_stderr(io.StringIO()):
                rounds.append([time_steps(cache, arguments.steps) for cache in (None, f"{folder}/cache")])
    images, latents = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"a step of 16 pairs on images: {1000 * images:.0f} ms, on a cache: {1000 * latents:.0f} ms")
    print(f"times as fast: {images / latents:.2f} (by round: {', '.join(f'{a / b:.2f}' for a, b in rounds)})")


if __name__ == "__main__":
    main()
