"""The bundled data and models, and small pipelines of the other kinds."""

import atexit
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import webdataset as wds
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lit_align.data.shards.layout import read_samples

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


def fork(function: Callable[[], None], **environment: str) -> multiprocessing.Process:
    """Start a function in a process of its own; a fork, because importing everything again takes 10 seconds."""

    def run():
        os.environ.update(environment)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def fork_ranks(function: Callable[[], None], timeout: float = 200) -> None:
    """Run a function in two processes with the environment that torchrun gives its own.

    Args:
        function: it is to say on which rank it is.
        timeout: seconds until both must have ended without an error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [fork(function, **torchrun, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    try:
        for process in both:
            process.join(timeout)
        assert [process.exitcode for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()  # the other one, where one failed, would wait for it


@cache
def small_sdxl() -> Path:
    """The bundled pipeline with a random UNet of a quarter of the weights, for what any UNet shows.

    A step takes half the time of one with the bundled UNet, in bfloat16 a third. Half as wide, it would round alike
    without the care of `round_alike`.
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
