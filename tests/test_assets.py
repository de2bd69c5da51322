"""The bundled data, and the measure of style on it."""

import importlib.util

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from tests.conftest import PAIRS, PIPELINE, ROOT


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("measure", ROOT / "examples/emoji/measure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_assets_are_small_and_licensed():
    files = [path for path in (ROOT / "assets").rglob("*") if path.is_file()]
    assert len(files) > 30
    assert sum(path.stat().st_size for path in files) < 25e6
    assert "Copyright (c) Microsoft Corporation" in (ROOT / "assets/emoji/LICENSE").read_text()


def test_bundled_pipeline_is_sdxl_of_the_stated_size():
    pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
    assert pipeline.unet.config.addition_embed_type == "text_time"
    sizes = [sum(p.numel() for p in part.parameters()) for part in (pipeline.unet, pipeline.vae)]
    assert sizes == [4_115_652, 658_375]
    assert pipeline.tokenizer.tokenize("red apple") == ["red</w>", "apple</w>"]
    assert pipeline("fox", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_colourfulness_by_hand(measure):
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    images[0] = 100  # grey
    images[1, 0] = 255  # red: rg = 255, yb = 127.5 everywhere
    images[2, 0, 0] = 255  # half red, half black: both have deviation and mean of half their value
    half = (127.5**2 + 63.75**2) ** 0.5
    assert measure.colourfulness(images).tolist() == pytest.approx([0, 0.3 * 2 * half, 1.3 * half], rel=1e-5)


def test_measure_tells_real_styles_apart(measure):
    _, chosen, rejected = measure.held_out_pairs(str(PAIRS / "held_out/*.tar"))
    assert measure.is_high_contrast(chosen).all()
    assert not measure.is_high_contrast(rejected).any()
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    assert not measure.is_high_contrast(grey).any()


def test_base_draws_both_styles(measure):
    """Without a word of style the base has no strong preference of its own."""
    torch.set_num_threads(2)
    backbone = measure.StableDiffusionXL(str(PIPELINE))
    prompts, _, _ = measure.held_out_pairs(str(PAIRS / "held_out/00000.tar"))
    share = measure.is_high_contrast(measure.draw(backbone, prompts, 1)).float().mean()
    assert 0.25 < share < 0.75
