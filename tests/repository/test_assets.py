"""The bundled data, and the measure of style on it."""

import importlib
import sys

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline

from lit_align.commands.score.command import score
from lit_align.data.labels.score_files import read_scores, side_file, survey
from lit_align.data.shards.storage import expand
from lit_align.scoring.presets import load_scorers
from tests.support.paths import PAIRS, PIPELINE, ROOT

SCORERS = ROOT / "assets/emoji/scorers"


@pytest.fixture(scope="module")
def measure():
    return example("measure")


@pytest.fixture(scope="module")
def win_rates():
    return example("win_rates")


def example(name):
    """A module of examples/emoji, whose modules import each other by name."""
    sys.path.insert(0, str(ROOT / "examples/emoji"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


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


def test_measure_tells_real_styles_apart(measure):
    _, chosen, rejected = measure.held_out_pairs(str(PAIRS / "held_out/*.tar"))
    assert measure.is_high_contrast(chosen).all()
    assert not measure.is_high_contrast(rejected).any()
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    assert not measure.is_high_contrast(grey).any()


def test_base_draws_both_styles(measure, monkeypatch):
    """Without a word of style the base has no strong preference of its own."""
    monkeypatch.setattr(measure, "STEPS", 10)  # of 25: coarser images of the same styles
    backbone = measure.StableDiffusionXL(str(PIPELINE))
    prompts, _, _ = measure.held_out_pairs(str(PAIRS / "held_out/00000.tar"))
    share = measure.is_high_contrast(measure.draw(backbone, prompts, 1)).float().mean()
    assert 0.25 < share < 0.75


# -- the bundled scorers


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_bundled_scores_are_those_of_the_bundled_scorers(split, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shards = [str(path) for path in sorted((PAIRS / split).glob("*.tar"))[:2]]
    names = ["clip", "style", "colour"]
    score(shards, ",".join(names), SCORERS / "scorers.yaml", output=str(tmp_path), accelerator="cpu")
    for shard in shards:
        stored, fresh = read_scores(side_file(shard)), read_scores(side_file(shard, str(tmp_path)))
        for name in names:
            assert stored[name].identity == fresh[name].identity
            assert stored[name].contents == fresh[name].contents
            for old, new in zip(stored[name][3:], fresh[name][3:], strict=True):
                torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-5)


def test_bundled_clip_knows_the_emoji_and_style_the_styles(measure, monkeypatch):
    """On held-out pairs: which of the 72 names belongs to an image, and which style it has."""
    monkeypatch.chdir(ROOT)
    prompts, chosen, rejected = measure.held_out_pairs(str(PAIRS / "held_out/*.tar"))
    scorers = load_scorers(["clip", "style"], SCORERS / "scorers.yaml")
    for images in (chosen[:24], rejected[:24]):
        grid = torch.stack([scorers["clip"].score(list(images), [prompt] * 24) for prompt in prompts], 1)  # (24, 72)
        assert (grid.argmax(1) == torch.arange(24)).float().mean() > 0.9
    assert scorers["style"].score(list(chosen), prompts).max() < -2
    assert scorers["style"].score(list(rejected), prompts).min() > 2
    assert sum(path.stat().st_size for path in SCORERS.rglob("*")) < 5e6


def test_win_rates_by_hand(win_rates):
    base = torch.zeros(3, 2, 2)  # scorers, prompts, repeats
    aligned = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[0.4, 1.0], [-1.0, -1.0]], [[0.0, 3.9], [-4.0, 0.0]]])
    won = win_rates.wins(aligned, base)
    assert won.tolist() == [[1, 0.5], [0.75, 0], [0.5, 0.5]]  # a tie, within the margin, counts one half
    found = win_rates.summarize(won)
    assert [found[name][0] for name in ("clip", "style", "colour")] == [0.75, 0.375, 0.5]
    assert found["macro"][0] == pytest.approx((0.75 + 0.375 + 0.5) / 3)
    assert found["colour"] == [0.5, 0.5, 0.5]


def test_margins_are_those_of_the_vote_in_training(win_rates, monkeypatch):
    """About a tenth of each score's deviation on the training pairs."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs/quickstart_balanced_dpo.yaml").read_text())
    assert config["data"]["vote"]["margins"] == win_rates.MARGINS
    found = survey(expand(config["data"]["train_shards"]), None, win_rates.SCORERS)
    for name, margin in win_rates.MARGINS.items():
        assert margin == pytest.approx(found[name].scale / 10, rel=0.1)


def test_bootstrap_interval_is_that_of_the_normal_approximation(win_rates):
    values = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, low, high = win_rates.interval(values)
    half = 1.96 * values.std().item() / 20
    assert mean == pytest.approx(values.mean().item())
    assert high - mean == pytest.approx(half, rel=0.05)
    assert mean - low == pytest.approx(half, rel=0.05)
