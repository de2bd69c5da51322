"""The bundled data, models and scorers, and the measure of style on them."""

import importlib.util
import json

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from lit_align.backbones import StableDiffusionXL
from lit_align.backbones.sampling import generate
from lit_align.commands.score.command import score
from lit_align.data.labels.score_files import read_scores, side_file, survey
from lit_align.data.shards.patterns import expand
from lit_align.scoring.presets import load_scorers
from lit_align.scoring.scorers.analytic import high_contrast
from tests.support.paths import PAIRS, PIPELINE, ROOT

SCORERS = ROOT / "assets/emoji/scorers"


@pytest.fixture(scope="module")
def held_out():
    """Prompts, chosen and rejected images (72, 3, 32, 32) uint8 of the held-out pairs."""
    return load_example("check_style").read_pairs(str(PAIRS / "held_out/*.tar"))


def load_example(name):
    """A script of examples/emoji as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/emoji/{name}.py")
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


def test_high_contrast_tells_real_styles_apart(held_out):
    _, chosen, rejected = held_out
    assert len(chosen) == len(rejected) == 72
    assert high_contrast(chosen).all()
    assert not high_contrast(rejected).any()


def test_base_draws_both_styles(held_out):
    """Prompts name no style, and the base has no strong preference. 10 steps draw coarse images of both."""
    prompts, _, _ = held_out
    images = generate(StableDiffusionXL(str(PIPELINE)), prompts[:26], list(range(26)), 32, 32, 10, 3.0)
    assert 0.25 < high_contrast(images).float().mean() < 0.75


def test_before_after_draws_what_the_test_left(tmp_path, monkeypatch, capsys):
    prompts = [f"prompt {number}" for number in range(20)]
    for model, colour in (("base", "red"), ("aligned", "black")):
        (tmp_path / "images" / model).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"images/{model}/{number:05d}.png")
    results = {"prompts": [{"prompt": prompt} for prompt in prompts], "models": {"base": {}, "aligned": {}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["before_after", f"--test={tmp_path}", f"--output={tmp_path}/picture.png"])
    load_example("before_after").main()
    assert "images in high contrast     0.0% -> 100.0%   of 20" in capsys.readouterr().out
    with Image.open(tmp_path / "picture.png") as picture:
        assert {(255, 0, 0), (0, 0, 0)} <= {colour for _, colour in picture.getcolors()}


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


def test_bundled_clip_knows_the_emoji_and_style_the_styles(held_out, monkeypatch):
    """On held-out pairs the CLIP finds the name among 72, and the style scorer tells the styles apart."""
    monkeypatch.chdir(ROOT)
    prompts, chosen, rejected = held_out
    scorers = load_scorers(["clip", "style"], SCORERS / "scorers.yaml")
    for images in (chosen[:24], rejected[:24]):
        grid = torch.stack([scorers["clip"].score(list(images), [prompt] * 24) for prompt in prompts], 1)  # (24, 72)
        assert (grid.argmax(1) == torch.arange(24)).float().mean() > 0.9
    assert scorers["style"].score(list(chosen), prompts).max() < -2
    assert scorers["style"].score(list(rejected), prompts).min() > 2
    assert sum(path.stat().st_size for path in SCORERS.rglob("*")) < 5e6


def test_tolerances_are_the_margins_of_the_vote_in_training(monkeypatch):
    """They are about a tenth of each score's deviation on the training pairs."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs/quickstart_balanced_dpo.yaml").read_text())
    tested = yaml.safe_load((ROOT / "configs/test/emoji_balanced_dpo.yaml").read_text())
    margins = config["data"]["vote"]["margins"]
    assert margins == tested["tolerances"]
    assert config["data"]["vote"]["voters"] == tested["scorers"] == list(margins)
    found = survey(expand(config["data"]["train_shards"]), None, list(margins))
    for name, margin in margins.items():
        assert margin == pytest.approx(found[name].scale / 10, rel=0.1)
