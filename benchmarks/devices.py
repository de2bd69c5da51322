"""Compute what training SDXL at 1024 px needs on many devices: memory of each, and bytes that each sends in a step.

python benchmarks/devices.py --pipeline DIR/sdxl [--devices 8 64 512] [--rate 400]

Nothing is trained: memory is the doctor's estimate, operations are counted, and traffic follows from the number of
weights, with ring collectives. `--rate` is the assumed TFLOP/s of a device at work. DIR is made by
benchmarks/full_size.py; its configs alone are read.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.accelerator_rates import forward_flops
from benchmarks.accelerator_site import Site
from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.backbones.loading.meta import shapes_only
from lit_align.memory import Work, estimate
from lit_align.memory.shares import Shares
from lit_align.objectives import MaPO
from lit_align.training.module import AlignmentModule

SIDE = 1024  # pixels
BF16, FP32 = 2, 4  # bytes
COLUMNS = (
    "training",
    "devices",
    "memory GB",
    "GB sent in a step",
    "ms of work in a step",
    "GB/s that hide the traffic",
)


class Training(NamedTuple):
    """What is trained and how; a step has one micro-batch of one pair."""

    name: str
    strategy: str
    lora: bool
    gathers: int  # of all weights in bfloat16 in a micro-batch
    passes: int  # forward passes that a step costs, for each image; recomputation is not counted


TRAININGS = (
    Training("LoRA, DDP", "ddp", lora=True, gathers=0, passes=2),
    Training("all weights, FSDP2", "fsdp2", lora=False, gathers=2, passes=3),
    Training("all weights, ZeRO2", "zero2", lora=False, gathers=1, passes=3),
)


def traffic(training: Training, trained: int, devices: int) -> float:
    """Return the bytes that a device sends in a step of one micro-batch.

    A ring moves (devices - 1) / devices of what is gathered or reduced, and twice that where all need the sum.

    Args:
        training: its strategy.
        trained: number of trained weights; their gradients are summed in float32.
        devices: that take part.
    """
    summed = FP32 * trained * (2 if training.strategy == "ddp" else 1)
    return (devices - 1) / devices * (summed + training.gathers * BF16 * trained)


def rows(pipeline: Path, counts: list[int], rate: float) -> Iterator[tuple[str, ...]]:
    """Compute the table's rows; `rate` is in operations per second."""
    flops = 2 * forward_flops(Site(pipeline.parent, "cpu", toy=False, workers=0), pipeline.name)  # of a pair
    for training in TRAININGS:
        for devices in counts:
            module = build(pipeline, training.lora)
            trained = sum(weight.numel() for weight in module.backbone.trainable_parameters().values())
            shares = Shares.of(training.strategy, devices)
            work = Work("cuda", "bf16-mixed", 1, SIDE, SIDE, encoded=True, shares=shares)
            sent, seconds = traffic(training, trained, devices), training.passes * flops / rate
            numbers = (estimate(module, work).total / 1e9, sent / 1e9, 1000 * seconds, sent / 1e9 / seconds)
            yield training.name, str(devices), *(f"{number:.3g}" for number in numbers)


def build(pipeline: Path, lora: bool) -> AlignmentModule:
    """Build the training's module without weights."""
    with shapes_only():
        backbone = StableDiffusionXL(str(pipeline), lora=LoRA() if lora else None, gradient_checkpointing=True)
        return AlignmentModule(backbone, MaPO(), partial(torch.optim.AdamW, fused=True))


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="a folder of benchmarks/full_size.py")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rate", type=float, default=400.0, help="assumed TFLOP/s of a device")
    arguments = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows(arguments.pipeline, arguments.devices, 1e12 * arguments.rate):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
