"""The benchmark beside the released scripts: what it reads from outside of a process, and all of it at toy size."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.peers_marks import watch
from benchmarks.peers_scripts import DPO, MAPO, find
from tests.support.paths import ROOT

BURN = "import time; end = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"


def run(code, folder, steps, seconds=60.0):
    return watch([sys.executable, "-c", code], steps, folder / "log.txt", folder, os.environ, seconds)


@pytest.mark.parametrize("bar", ["tqdm", "mark"])
def test_cpu_seconds_of_each_step_are_read_from_what_a_process_says(tmp_path, bar):
    begin = (
        "from tqdm import tqdm; bar = tqdm(total=3, desc='Steps'); say = lambda step: (bar.update(1), bar.refresh())"
    )
    if bar == "mark":
        begin = "import sys; say = lambda step: print(f'Steps: {step}/3', file=sys.stderr, flush=True)"
    burn = "\n".join(f"{BURN.format(seconds=0.3 * step)}\ntime.sleep(0.2); say({step})" for step in (1, 2, 3))
    found = run(f"{begin}\n{burn}", tmp_path, 3)
    assert found["fastest"] == pytest.approx(0.6, abs=0.15)
    assert found["slowest"] == pytest.approx(0.9, abs=0.15)
    assert found["CPU s a step"] == pytest.approx(0.75, abs=0.15)
    assert found["CPU s in all"] > 1.8
    assert 0.005 < found["peak GB"] < 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "print('Steps: 1/2', flush=True); raise SystemExit('no such file')",
            r"exit code 1, steps \[1\] of 2.*no such",
        ),
        ("print('Steps: 1/2')", r"exit code 0, steps \[1\] of 2"),
    ],
    ids=["fails", "stops early"],
)
def test_a_training_that_ends_too_early_is_an_error(tmp_path, code, said):
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        run(code, tmp_path, 2)


def test_a_training_that_takes_too_long_is_killed(tmp_path):
    with pytest.raises(RuntimeError, match="exit code -9"):
        run("import time; time.sleep(60)", tmp_path, 2, seconds=0.5)


def test_released_scripts_are_found_in_a_checkout_or_in_a_folder_of_them(tmp_path):
    for name, files in (("mapo", [MAPO, "args.py"]), ("diffusers", [DPO]), ("other", [MAPO])):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
    assert find([tmp_path], MAPO) == find([tmp_path / "mapo"], MAPO) == tmp_path / "mapo" / MAPO
    assert find([tmp_path], DPO) == tmp_path / "diffusers" / DPO
    assert find([tmp_path / "other"], MAPO) is None
    assert find([], DPO) is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_training_of_ours_runs_at_toy_size(tmp_path):
    command = [sys.executable, "benchmarks/peers.py", "--out", tmp_path, "--toy", "--minutes=28"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert not [row for row in rows.values() if "skipped" in row]
    trainings = {name: row for name, row in rows.items() if row["stage"] == "trainings"}
    assert len(trainings) == 6
    assert all(row["CPU s a step"] > 0 and row["peak GB"] > 0.2 for row in trainings.values())
    assert trainings["bare UNet loop"]["times the bare loop"] == 1
