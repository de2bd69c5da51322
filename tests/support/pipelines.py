"""Pipelines with small random UNets, of the three supported kinds."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tests.support.paths import PIPELINE


@cache
def small_sdxl() -> Path:
    """Write the bundled pipeline with a random UNet of a quarter of the weights, once per process.

    A step takes half as long as with the bundled UNet, a third as long in bfloat16. A UNet of half this width would not
    show rounding differences between policy and reference, which the bfloat16 tests need.
    """
    folder = Path(tempfile.mkdtemp()) / "sdxl"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    shutil.copytree(PIPELINE, folder)
    config = UNet2DConditionModel.load_config(PIPELINE, subfolder="unet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config, block_out_channels=(32, 64), norm_num_groups=8)
    unet.save_pretrained(folder / "unet")
    return folder


def write_stable_diffusion(folder: Path, prediction_type: str) -> Path:
    """Write a small Stable Diffusion pipeline: the bundled VAE and text encoder, a random UNet built like SD1.5's."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(PIPELINE, subfolder="text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(PIPELINE, subfolder="tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
