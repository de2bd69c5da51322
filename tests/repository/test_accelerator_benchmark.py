"""The benchmark for an accelerator: its pipelines have the published sizes, and all of it runs at toy size."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel

from benchmarks.accelerator_peers import STAGE
from benchmarks.accelerator_record import Record
from benchmarks.accelerator_score import NAME, clip_config, score
from benchmarks.accelerator_site import Site
from benchmarks.full_size import KINDS, write_pipeline
from lit_align.data.labels.score_files import read_scores, side_file
from tests.support.paths import ROOT


@pytest.mark.parametrize("kind", KINDS)
def test_unets_have_the_published_numbers_of_parameters(kind):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**KINDS[kind].unet)
    assert sum(parameter.numel() for parameter in unet.parameters()) == KINDS[kind].parameters


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_a_pipeline_and_draws_with_it(kind, tmp_path):
    write_pipeline(tmp_path / kind, kind, toy=True)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / kind, dtype=torch.float32)
    assert type(pipeline).__name__ == KINDS[kind].pipeline
    assert pipeline.scheduler.config.prediction_type == KINDS[kind].prediction
    image = pipeline("a fox", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    assert image.std() > 0


def test_failures_and_skipped_measurements_are_recorded(tmp_path):
    record = Record(tmp_path, {"device": "none"}, 60)

    def fails():
        raise SystemExit("out of | memory")

    assert record.measure("one", "good", lambda: {"pairs/s": 2.5, "losses": [0.5]}) == {"pairs/s": 2.5, "losses": [0.5]}
    assert record.measure("one", "bad", fails) is None
    assert record.measure("two", "long", lambda: {}, seconds=100) is None
    record.pass_over("two", "optional", "not asked for")
    found = json.loads((tmp_path / "results.json").read_text())
    good, bad, long, optional = found["results"]
    assert (good["pairs/s"], good["losses"]) == (2.5, [0.5])
    assert bad["failed"] == "SystemExit: out of | memory"
    assert long["skipped"].endswith("s were left")
    assert optional == {"stage": "two", "name": "optional", "passed over": "not asked for"}
    table = (tmp_path / "results.md").read_text()
    assert "| good | 2.5 |" in table
    assert "out of / memory" in table
    assert "losses" not in table


def test_the_scorer_has_the_size_of_vit_h():
    with torch.device("meta"):
        model = CLIPModel(clip_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441


def test_all_images_of_a_shard_are_scored_at_toy_size(tmp_path):
    site = Site(tmp_path, "cpu", toy=True, workers=0)
    facts = score(site)
    assert facts["precision"] == "float32"
    assert facts["of the model alone"] == pytest.approx(facts["images/s"] / facts["model alone, images/s"])
    assert facts["images/s"] > 0
    scores = read_scores(side_file(site.pairs("sdxl"), str(tmp_path / "scores")))[NAME]
    assert len(scores.keys) == site.count
    assert scores.finite.all()
    assert torch.cat([scores.score_0, scores.score_1]).unique().numel() == 2 * site.count


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_runs_at_toy_size(tmp_path):
    command = [sys.executable, "benchmarks/accelerator.py", "--out", tmp_path, "--rehearse", "--minutes=28"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["stage"], row["name"]): row for row in found["results"]}
    assert not [row for row in rows.values() if "skipped" in row]
    assert len({stage for stage, _ in rows}) == 12
    assert [row for row in rows.values() if "passed over" in row] == [rows[STAGE, "all"]]
    assert all(row["pairs/s"] > 0 for (stage, _), row in rows.items() if "MaPO" in stage)
    resumed = rows["kill -9 and resume", "SDXL LoRA"]
    assert (resumed["largest difference"], resumed["resumed after step"]) == (0, 1)
    assert rows["SDXL LoRA, MaPO", "2 pairs, cached, activations kept"]["doctor's GB"] > 0
