"""A user's mistake ends in one to three lines that say what to do, in exit code 2 and without a traceback."""

import os
import subprocess
import sys

import pytest

from lit_align.__main__ import main
from lit_align.commands.shared.mistakes import explain
from tests.support.paths import PAIRS, PIPELINE, ROOT

FIT = "fit --config configs/quickstart.yaml --trainer.logger false --trainer.default_root_dir {tmp}"
SHARD = f"{PAIRS}/held_out/00000.tar"
OUT = "--output {tmp}/o"
FILES = {  # in the folder of a test
    "broken.yaml": "trainer: [1,\nmodel: {",
    "list.yaml": "- trainer\n- model\n",
    "misspelled.yaml": "trainer: {max_stpes: 3}\n",
    "unknown.yaml": "trainer: {max_steps: 3}\noptimizer: {class_path: torch.optim.AdamW}\n",
    "no_class.yaml": "trainer: {callbacks: [{class_path: lit_align.callbacks.SampleGird}]}\n",
    "not_a_tar.tar": "this is no tar file" * 100,
    "not_a_checkpoint.ckpt": "this is no checkpoint",
    "prompts.txt": "a fox\n",
    "empty.txt": "",
    "pairs.csv": "image_0,image_1,prompt\na.png,b.png,a fox\n",
    "presets.yaml": "mine: {class_path: lit_align.scoring.Sharpnes}\n",
    "full/file": "",
}

MISTAKES = {
    # The command line itself.
    "unknown command": ("ftt", "'ftt'. Do you mean fit?"),
    "unknown command, no near one": ("--config configs/quickstart.yaml", "lit-align --help"),
    "unknown option": ("inspect --shrads x", "--shrads x. Do you mean --shards?"),
    "unknown option of fit": (FIT + " --data.batchsize 3", "Do you mean --data.batch_size?"),
    "unknown import": ("import foldr", "'folder'"),
    "import of nothing": ("import", "pick-a-pic"),
    "option missing": ("export --ckpt_path x", "output"),
    "option without a value": ("export --ckpt_path", "ckpt_path"),
    "option missing in fit": ("fit --trainer.accelerator cpu", "model.backbone"),
    "neither files nor repo": ("import pick-a-pic --output {tmp}/out", "--files or --repo"),
    "table and folders": ("import folder --output {tmp}/out --chosen {tmp}", "--chosen and --rejected"),
    # Values.
    "wrong type": (FIT + " --data.batch_size many", "data.batch_size"),
    "zero": (FIT + " --data.batch_size 0", "data.batch_size is 0"),
    "wrong choice": ("export --ckpt_path x --output y --precision fp8", "precision"),
    "precision of Lightning": (FIT + " --trainer.precision 12", "precision"),
    "boolean seed": (FIT + " --seed_everything false", "seed_everything is False"),
    "strategy that we refuse": (FIT + " --trainer.strategy deepspeed", "deepspeed"),
    "unknown strategy": (FIT + " --trainer.strategy dpp", "dpp"),
    "unknown accelerator": (FIT + " --trainer.accelerator gpuu", "gpuu"),
    "no GPU": (FIT + " --trainer.accelerator gpu", "no GPU"),
    "no GPU in generate": ("predict --model {pipeline} --prompts emoji --output {tmp}/o --accelerator gpu", "no GPU"),
    "mistyped number": (FIT + " --model.objective.beta_mapo=0.1e", "beta_mapo"),
    # Class names.
    "unknown objective": (FIT + " --model.objective MapPO", "MapPO"),
    "unknown backbone": (FIT + " --model.backbone SDXL", "SDXL"),
    "unknown callback": (FIT + " --config {tmp}/no_class.yaml", "SampleGird"),
    "argument of another objective": (FIT + " --model.objective.init_args.beta_dpo=1", "beta_dpo"),
    "unknown scorer": ("score --shards {shard} --scorers clipp --output {tmp}/o", "clipp"),
    "unknown scorer class": ("score --shards {shard} --scorers mine --presets {tmp}/presets.yaml", "Sharpnes"),
    # Configs.
    "no config": ("fit --config configs/quikstart.yaml", "configs/quikstart.yaml"),
    "broken YAML": ("fit --config {tmp}/broken.yaml", "broken.yaml"),
    "config is a list": ("fit --config {tmp}/list.yaml", "list.yaml"),
    "misspelled key": (
        FIT + " --config {tmp}/misspelled.yaml",
        "'trainer.max_stpes'. Do you mean --trainer.max_steps?",
    ),
    "unknown section": ("fit --config configs/quickstart.yaml --config {tmp}/unknown.yaml", "optimizer"),
    "config of a command in encode": ("encode --config {tmp}/list.yaml --output {tmp}/cache", "list.yaml"),
    "no config in encode": ("encode --config {tmp}/none.yaml --output {tmp}/cache", "none.yaml"),
    # Files of data.
    "no shards": (FIT + " --data.train_shards nothing/*.tar", "there is no file 'nothing/*.tar'"),
    "no shards to inspect": ("inspect --shards nothing/*.tar", "nothing/*.tar"),
    "no shards to score": ("score --shards nothing/*.tar --scorers clip", "nothing/*.tar"),
    "shard is no tar file": (FIT + " --data.train_shards {tmp}/not_a_tar.tar", "not_a_tar.tar"),
    "no cache": (FIT + " --data.train_cache {tmp}/none", "none"),
    "no table": ("import folder --output {tmp}/out --table {tmp}/none.csv", "none.csv"),
    "column missing": ("import folder --output {tmp}/out --table {tmp}/pairs.csv", "label"),
    "no Parquet files": ("import pick-a-pic --output {tmp}/out --files {tmp}/none-*.parquet", "none-"),
    "wrong repository name": ("import pick-a-pic --output {tmp}/out --repo pickapic", "OWNER/NAME"),
    "no annotations": ("import hpd --output {tmp}/out --annotations {tmp}/train.json", "train"),
    "no prompts": ("predict --model {pipeline} --prompts {tmp}/none.txt --output {tmp}/o", "none.txt"),
    "empty prompts": ("predict --model {pipeline} --prompts {tmp}/empty.txt --output {tmp}/o", "empty.txt"),
    # Models and checkpoints.
    "no checkpoint to export": ("export --ckpt_path {tmp}/none.ckpt --output {tmp}/out", "none.ckpt"),
    "export of another file": ("export --ckpt_path {tmp}/not_a_checkpoint.ckpt --output {tmp}/out", "not_a_checkpoint"),
    "output exists": ("export --ckpt_path {tmp}/none.ckpt --output {tmp}/full", "--overwrite"),
    "no checkpoint to resume": (FIT + " --ckpt_path {tmp}/none.ckpt", "none.ckpt"),
    "no checkpoint to validate": (FIT.replace("fit", "validate", 1) + " --ckpt_path {tmp}/none.ckpt", "none.ckpt"),
    "no pipeline": (FIT + " --model.backbone.init_args.repo {tmp}/none", "none"),
    "pipeline not in the cache": (FIT + " --model.backbone.init_args.repo nobody/nothing", "HF_HUB_OFFLINE"),
    "folder is no pipeline": (FIT + " --model.backbone.init_args.repo {tmp}/full", "full"),
    "no model to draw with": ("predict --model {tmp}/none --prompts emoji --output {tmp}/o", "none"),
    "wrong base": (
        "test --models.mine {pipeline} --base nobody/nothing --prompts emoji --scorers clip " + OUT,
        "nobody/nothing",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch):
    monkeypatch.delenv("LIT_ALIGN_DEBUG", raising=False)


def words_of(line, folder):
    return [word.format(tmp=folder, shard=SHARD, pipeline=PIPELINE) for word in line.split()]


@pytest.mark.parametrize(("line", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_a_few_lines(line, expected, folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words_of(line, folder))
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert expected in said
    lines = said.strip().splitlines()
    assert 1 <= len(lines) <= 3, said
    assert "Traceback" not in said


def test_there_are_many_mistakes():
    assert len(MISTAKES) >= 40


def run(*words, **environment):
    """Run the command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", "lit_align", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)


def test_a_process_ends_with_code_2_and_shows_the_traceback_on_demand(folder):
    words = words_of("import folder --output {tmp}/out --table {tmp}/none.csv", folder)
    result = run(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    result = run(*words, LIT_ALIGN_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "none.csv" in result.stderr


def test_a_rank_names_itself(folder, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(SystemExit):
        main(["ftt"])
    assert capsys.readouterr().err.startswith("[rank 3] lit-align: there is no command")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a fault"), ValueError("a fault"), AssertionError()])
def test_a_fault_keeps_its_traceback(error, monkeypatch):
    assert explain(error) is None

    def fail(arguments):
        raise error

    monkeypatch.setattr("lit_align.__main__.run_command", fail)
    with pytest.raises(type(error)):
        main([])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("No module named 's3fs'"), "lit-align's extra s3"),
        (PermissionError(13, "Permission denied", "/shards"), "/shards: Permission denied"),
        (OSError(28, "No space left on device", "/shards"), "the space on the disk"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "Lower the batch size"),
        (type("GatedRepoError", (OSError,), {})("Access denied"), "hf auth login"),
    ],
)
def test_errors_of_libraries_are_explained(error, expected):
    lines = explain(error)
    assert expected in lines
    assert len(lines.splitlines()) <= 3


def test_interrupt(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_align.__main__.run_command", interrupt)
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 130
