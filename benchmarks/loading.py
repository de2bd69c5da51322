"""Measure the peak main memory of a process that loads a LoRA's backbone, by way of loading.

python benchmarks/loading.py --pipeline DIR/sd15       DIR is made by benchmarks/full_size.py
"""

import argparse
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.peers_marks import peak_bytes
from lit_align.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_align.backbones.loading.meta import load_frozen_in

WAYS = {"float32": "in float32 first", "bfloat16": "in bfloat16", "nf4": "in float32, then NF4"}


def load(pipeline: Path, way: str) -> None:
    """Load, cast for bf16-mixed, and read each weight once, for weights may be mapped from their file until then."""
    kind = StableDiffusionXL if (pipeline / "text_encoder_2").exists() else StableDiffusion
    imports = peak_bytes()
    with nullcontext() if way == "float32" else load_frozen_in(torch.bfloat16):
        backbone = kind(str(pipeline), lora=LoRA(base="nf4" if way == "nf4" else "compute"))
    backbone.cast_frozen(torch.bfloat16)
    backbone.load_encoders()
    for weight in backbone.parameters():
        weight.flatten()[::2048].float().sum()
    print(f"| {WAYS[way]} | {peak_bytes() / 1e9:.2f} | {imports / 1e9:.2f} |", flush=True)


def main() -> None:
    """Measure each way in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--way", choices=WAYS, help="one alone, in this process")
    arguments = parser.parse_args()
    if arguments.way:
        load(arguments.pipeline, arguments.way)
        return
    print("| frozen weights are loaded | peak GB | of which imports |\n|---|---|---|", flush=True)
    for way in WAYS:
        subprocess.run([sys.executable, __file__, f"--pipeline={arguments.pipeline}", f"--way={way}"], check=True)


if __name__ == "__main__":
    main()
