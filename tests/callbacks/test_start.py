"""Before the first step: the banner comes first, then what takes time, and a signal ends the run there."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lit_align.__main__ import main
from tests.support.paths import PAIRS, ROOT
from tests.support.pipelines import small_sdxl
from tests.support.processes import fork, fork_ranks

VALIDATION, GUARD, STEPS = 2 * 4, 8, 3  # passes: 2 batches of 4 draws; 8 draws of a batch; an image
CODES = {"SIGUSR1": 75, "SIGTERM": 143, "SIGINT": 130}


def words(folder, *callbacks, steps=STEPS):
    """Return the options of a small quickstart, whose config has the callbacks of the shipped one."""
    kept = {"every_n_train_steps": 1, "save_last": "link"}
    grid = {"prompts": ["fox", "tulip"], "every_n_steps": 0, "height": 32, "width": 32, "steps": steps}
    listed = {"lightning.pytorch.callbacks.ModelCheckpoint": kept, "DivergenceGuard": {}, "SampleGrid": grid}
    named = [{"class_path": name, "init_args": arguments} for name, arguments in listed.items()]
    overlay = folder / "callbacks.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [*callbacks, *named]}}))
    return [
        "fit",
        "--config=configs/quickstart.yaml",
        f"--config={overlay}",
        f"--model.backbone.init_args.repo={small_sdxl()}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=2",
        "--data.batch_size=4",
        f"--data.train_shards={PAIRS}/train/00000.tar",
        f"--data.val_shards={PAIRS}/held_out/00002.tar",
    ]


def sender(folder, number, at, rank=None):
    arguments = {"number": number, "at": at, "file": str(folder / "passes"), "rank": rank}
    return {"class_path": "tests.support.signals.SendAtPass", "init_args": arguments}


def run(arguments):
    """Run the command in a forked process; returns its exit code."""
    process = fork(lambda: main(arguments))
    process.join(100)
    return process.exitcode


def written(folder):
    """List the files that a run leaves behind its logs."""
    return [path for path in folder.rglob("*") if path.suffix in (".ckpt", ".png", ".safetensors", ".part")]


@pytest.mark.parametrize(
    ("number", "at", "ends"),
    [
        ("SIGTERM", 0, 0),  # in `on_fit_start`
        ("SIGUSR1", 2, 4),  # in the first batch of the first validation, which ends after its 4 draws
        ("SIGINT", VALIDATION + 3, VALIDATION + 3),  # in the guard's
        ("SIGTERM", VALIDATION + GUARD + 2, VALIDATION + GUARD + 2),  # in the middle of the first image
        ("SIGUSR1", VALIDATION + GUARD + STEPS + 1, VALIDATION + GUARD + STEPS + 1),  # in the second image
    ],
)
def test_a_signal_ends_the_run_within_a_pass_or_a_batch(tmp_path, monkeypatch, capfd, number, at, ends):
    monkeypatch.chdir(ROOT)
    assert run(words(tmp_path, sender(tmp_path, number, at))) == CODES[number]
    assert (tmp_path / "passes.0").read_text() == str(ends)
    assert written(tmp_path) == []
    assert not list(tmp_path.rglob("config.yaml"))
    assert f"{number}: what is at work before the first step stops after" in capfd.readouterr().err


def test_sigusr1_in_the_setup_has_its_exit_code(tmp_path, monkeypatch):
    """Before there is a handler that ranks agree by; SIGTERM ends a process there by itself."""
    monkeypatch.chdir(ROOT)
    assert run(words(tmp_path, sender(tmp_path, "SIGUSR1", -1))) == 75
    assert written(tmp_path) == []


def test_a_run_that_was_ended_at_its_start_begins_and_resumes(tmp_path, monkeypatch):
    """`--ckpt_path last`, as fit.sbatch requeues a run: from step 0, and then from the checkpoint of step 1."""
    monkeypatch.chdir(ROOT)
    assert run(words(tmp_path, sender(tmp_path, "SIGUSR1", VALIDATION + GUARD + 1))) == 75
    assert run([*words(tmp_path), "--ckpt_path=last"]) == 0
    checkpoints = [path for path in written(tmp_path) if path.suffix == ".ckpt"]
    assert len(checkpoints) == 2  # of step 1, and the link
    before = {path: path.stat().st_mtime_ns for path in written(tmp_path)}
    again = [*words(tmp_path, sender(tmp_path, "SIGUSR1", 0)), "--ckpt_path=last", "--trainer.max_steps=2"]
    assert run(again) == 75
    assert {path: path.stat().st_mtime_ns for path in written(tmp_path)} == before


@pytest.mark.parametrize("at", [2, VALIDATION + GUARD + 2])
def test_one_rank_ends_all_before_the_first_step(tmp_path, monkeypatch, at):
    """Only the second process gets a signal, in the first validation or a base image; both end at one pass."""
    monkeypatch.chdir(ROOT)
    arguments = [*words(tmp_path, sender(tmp_path, "SIGUSR1", at, rank=1)), "--trainer.devices=2"]

    def rank():
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--trainer.strategy=ddp"])
        assert end.value.code == 75

    fork_ranks(rank, 100)
    ends = [int((tmp_path / f"passes.{rank}").read_text()) for rank in (0, 1)]
    assert ends == [at + 2, at + 2] if at < VALIDATION else ends == [at, at]
    assert written(tmp_path) == []


def test_ranks_with_unequal_validations_do_not_wait_for_each_other(tmp_path, monkeypatch):
    """5 held-out batches: 2 for the first process, 3 for the second, which agree only where both have one more."""
    monkeypatch.chdir(ROOT)
    options = ["--trainer.limit_val_batches=1.0", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fork_ranks(lambda: main([*words(tmp_path), *options]), 100)
    assert [path.suffix for path in written(tmp_path)].count(".ckpt") == 2  # of step 1, and the link


def test_the_banner_comes_before_what_takes_time(tmp_path, monkeypatch):
    """In a log file; then Ctrl-C in the base images, which would take minutes."""
    monkeypatch.chdir(ROOT)
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        command = [sys.executable, "-m", "lit_align", *words(tmp_path, steps=100_000)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    deadline = time.monotonic() + 100
    while "images of the base model" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    said = log.read_text()
    order = [
        "lit-align: StableDiffusionXL from",
        "first validation: 2/2 (100%)",
        "DivergenceGuard: the start of the training errors",
        "images of the base model: 2 of 32 x 32 pixels, 100000 sampling steps each",
        "SIGINT: what is at work",
        "ends before its first step with exit code 130. There is nothing to save.",
    ]
    places = [said.index(line) for line in order]
    assert places == sorted(places)
    assert "Traceback" not in said
    assert "fit:" not in said
