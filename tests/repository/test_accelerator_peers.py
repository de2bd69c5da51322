"""Released scripts in the accelerator's benchmark: how their steps are timed, and what becomes of one that fails."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from benchmarks.accelerator_peers import STAGE, TRAININGS, Peers
from benchmarks.accelerator_record import Record
from benchmarks.accelerator_site import Site, pair
from benchmarks.peers_scripts import MAPO, Setting, find, offline
from tests.support.paths import ROOT

# A script that takes 0.2 s a step, imports its neighbour `data`, and would write a file at its end.
SCRIPT = """
import sys, time, torch
from pathlib import Path
import data
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([weight])
for step in range({steps}):
    time.sleep(2 if step == 0 else 0.2)
    weight.sum().backward()
    optimizer.step()
Path(sys.argv[1].removeprefix("--output=")).write_text(data.WORDS + __name__)
"""


def checkout(folder, script):
    """Write a folder in which `find` finds MaPO's script."""
    folder.mkdir()
    (folder / MAPO).write_text(script)
    (folder / "args.py").touch()
    (folder / "data.py").write_text("WORDS = 'neighbour '")
    return folder


@pytest.mark.parametrize("steps", [4, 2], ids=["ends it", "is too short"])
def test_a_script_is_timed_from_step_to_step_and_ended(tmp_path, steps):
    script = checkout(tmp_path / "mapo", SCRIPT.format(steps=steps)) / MAPO
    facts, output = tmp_path / "facts.json", tmp_path / "output.txt"
    start = [sys.executable, ROOT / "benchmarks/peers_device.py", facts, "--skip=1", "--steps=3", "--pairs=2"]
    subprocess.run([*start, script.name, f"--output={output}"], cwd=script.parent, check=True)
    if steps == 2:
        assert not facts.exists()
        assert output.read_text() == "neighbour __main__"
        return
    found = json.loads(facts.read_text())
    assert 200 <= found["ms a step"] < 1000  # not the first step's 2 s
    assert found["pairs/s"] == pytest.approx(2000 / found["ms a step"])
    assert 0.05 < found["peak GB"] < 3
    assert not output.exists()


def test_without_checkouts_the_stage_is_passed_over(tmp_path):
    record = Record(tmp_path, {}, 60)
    Peers([], sys.executable, Site(tmp_path, "cpu", True, 0), record).measure(None)
    assert record.rows == [{"stage": STAGE, "name": "all", "passed over": "--peer names no checkouts"}]


def test_a_script_that_fails_or_is_missing_is_recorded_and_the_rest_left_out(tmp_path):
    folder = checkout(tmp_path / "mapo", "import a_package_that_is_not_there")
    record = Record(tmp_path, {}, 600)
    Peers([folder], sys.executable, Site(tmp_path, "cpu", True, 0), record).measure(None)
    failed, missing = record.rows
    assert failed["name"] == "MaPO, all weights, 8-bit AdamW: released train.py"
    assert "No module named 'a_package_that_is_not_there'" in failed["failed"]
    assert (missing["name"], missing["passed over"]) == ("DiffusionDPO, LoRA", f"--peer has no {TRAININGS[1].script}")


def test_lit_align_is_divided_by_the_script(tmp_path):
    folder = checkout(tmp_path / "mapo", SCRIPT.format(steps=2))
    record = Record(tmp_path, {}, 600)
    Peers([folder], sys.executable, Site(tmp_path, "cpu", True, 0), record).measure(None)
    theirs, ours, _ = record.rows
    assert ours["name"] == "MaPO, all weights, 8-bit AdamW: lit-align, on the fly"
    assert ours["pairs/s, times the script's"] == pytest.approx(ours["pairs/s"] / theirs["pairs/s"])
    assert ours["peak GB, times the script's"] == pytest.approx(ours["peak GB"] / theirs["peak GB"])


def test_scripts_read_the_pairs_of_the_shard_and_ask_for_what_we_ask_for(tmp_path):
    site = Site(tmp_path, "cpu", True, 0)
    setting = Setting(tmp_path / "sdxl", tmp_path, 64, 2, 23, "bf16-mixed", 8)
    setting.write_table(site.pairs("sdxl"))
    rows = pq.read_table(setting.table).to_pylist()
    assert len(rows) == site.count
    first = pair(0, 64)
    assert rows[0] == {
        "jpg_0": first.image_0,
        "jpg_1": first.image_1,
        "label_0": 1.0,
        "label_1": 0.0,
        "caption": first.prompt,
    }
    line = setting.released(find([checkout(tmp_path / "mapo", "")], MAPO), "--use_8bit_adam")
    assert line[0] == "train.py"
    asked = {"--mixed_precision=bf16", "--max_train_steps=23", "--train_batch_size=2", "--resolution=64"}
    asked |= {"--dataloader_num_workers=8", "--gradient_checkpointing", "--no_hflip", "--use_8bit_adam"}
    assert asked <= set(line)
    ours = setting.ours("cache", lora=True)
    assert (ours["trainer.precision"], ours["trainer.max_steps"], ours["data.batch_size"]) == ("bf16-mixed", 23, 2)
    assert ours["model.objective"] == {"class_path": "lit_align.objectives.DiffusionDPO"}


def test_a_script_does_not_see_how_this_process_was_started(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "2")
    found = offline(tmp_path)
    assert not {"WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "SLURM_NTASKS"} & found.keys()
    assert found["PATH"] == os.environ["PATH"]
    assert found["HF_HUB_OFFLINE"] == "1"
