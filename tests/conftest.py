"""The bundled data and models, and small pipelines of the other kinds."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import webdataset as wds
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lit_align.data.samples import read_samples

ROOT = Path(__file__).parent.parent
PIPELINE = ROOT / "assets/emoji/pipeline"
PAIRS = ROOT / "assets/emoji/pairs/high_contrast-over-color"


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)


def read_dicts(shard) -> list[dict]:
    """The samples of a shard, as webdataset writes them."""
    return [{"__key__": sample.key, **sample.fields} for sample in read_samples(str(shard))]


def write_dicts(shard, samples: list[dict]) -> str:
    """Write a shard of such samples, fields that are None left out."""
    with wds.TarWriter(str(shard)) as writer:
        for sample in samples:
            writer.write({name: value for name, value in sample.items() if value is not None})
    return str(shard)


def write_stable_diffusion(folder: Path, prediction_type: str) -> Path:
    """A small Stable Diffusion pipeline: the bundled VAE and first text encoder, a random UNet of the kind of 1.5."""
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


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd15", "epsilon")


@pytest.fixture(scope="session")
def sd21(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd21", "v_prediction")
