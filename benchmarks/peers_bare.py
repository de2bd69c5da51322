"""The bare UNet loop that the benchmark of the released scripts divides by: its own process, nothing encoded.

python benchmarks/peers_bare.py PIPELINE --side 128 --pairs 2 --steps 4

A step is one forward and backward pass over random noisy latents of both images of each pair, with gradient
checkpointing, the clipping of gradients, and AdamW on all weights: no data, no encoders, no objective but the mean
squared error.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.peers_marks import mark

TOKENS = 77  # of a prompt


def main() -> None:
    """Train on random numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of an SDXL pipeline")
    parser.add_argument("--side", type=int, required=True, help="of the images in pixels")
    parser.add_argument("--pairs", type=int, required=True, help="a step")
    parser.add_argument("--steps", type=int, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(arguments.pipeline, subfolder="unet", torch_dtype=torch.float32)
    unet.train()
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6)
    images, config = 2 * arguments.pairs, unet.config
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    tokens = torch.randn(images, TOKENS, config["cross_attention_dim"])
    added = {"text_embeds": torch.randn(images, pooled), "time_ids": torch.full((images, 6), float(arguments.side))}
    for step in range(1, arguments.steps + 1):
        latents, noise = torch.randn(2, images, config["in_channels"], arguments.side // 8, arguments.side // 8)
        times = torch.randint(0, 1000, (images,))
        mse_loss(unet(latents, times, tokens, added_cond_kwargs=added).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark(step, arguments.steps)


if __name__ == "__main__":
    main()
