"""A run that is killed at any moment and resumed ends with the weights of the unbroken run, bit for bit.

Five moments by default; `make test_kills` does thirty and writes tests/records/kills.md.
"""

import json
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_align import cli
from lit_align.backbones.loading import trained
from lit_align.backbones.reference import FrozenCopy
from lit_align.training.checkpoints.atomic_io import AtomicCheckpointIO
from lit_align.training.checkpoints.last_checkpoint import last_checkpoint
from lit_align.training.module import AlignmentModule
from tests.support.paths import PAIRS, ROOT
from tests.support.pipelines import small_sdxl

MOMENTS = {  # name; owner and name of the function, its calls in a run, seconds of a call
    "step": (AlignmentModule, "training_step", 12, 0.2),
    "checkpoint": (AtomicCheckpointIO, "save_checkpoint", 6, 0.15),
    "validation": (AlignmentModule, "validation_step", 6, 0.1),
    "reference update": (FrozenCopy, "update", 4, 0.005),
    "export": (trained, "read_trained", 1, 0.05),
}
KILLS = int(os.environ.get("LIT_ALIGN_KILLS", len(MOMENTS)))
RECORD = ROOT / "tests/records/kills.md"
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 12,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 2, "monitor": "step", "mode": "max", "save_last": "link"}
                | {"save_on_train_epoch_end": True},
            },
            {"class_path": "lit_align.callbacks.ReferenceUpdate", "init_args": {"every_n_steps": 3}},
            {"class_path": "lit_align.callbacks.DivergenceGuard", "init_args": {"max_rise": 100.0}},
        ],
    },
    "model": {
        "backbone": {"class_path": "lit_align.backbones.StableDiffusionXL"},
        "objective": {"class_path": "lit_align.objectives.DiffusionDPO"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-5}},
        "caption_dropout": 0.2,
    },
    "data": {
        "train_shards": [str(PAIRS / "train/00000.tar"), str(PAIRS / "train/00001.tar")],
        "val_shards": str(PAIRS / "held_out/00002.tar"),
        "resolution": 32,
        "batch_size": 4,
        "num_workers": 0,
        "shuffle_window": 16,
    },
}


def dies_inside(moment: str, number: int, delay: float) -> None:
    """Let this process kill itself `delay` seconds after the `number`-th start of `moment`."""
    owner, name, _, _ = MOMENTS[moment]
    original = getattr(owner, name)
    entered = 0

    def watched(*arguments, **options):
        nonlocal entered
        entered += 1
        if entered == number:
            threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return original(*arguments, **options)

    setattr(owner, name, watched)


def train_and_export(config: Path, run: Path, death=None) -> int:
    """Train from the last checkpoint and export, in a forked process; returns its exit code."""

    def work():
        os.chdir(run)
        if death is not None:
            dies_inside(*death)
        cli.main(["fit", "--config", str(config), "--ckpt_path", "last"])
        found = last_checkpoint([run / "checkpoints"])
        cli.main(["export", "--ckpt_path", str(found.path), "--output", "unet", "--overwrite", "true"])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    return code


def prepare(folder: Path) -> tuple[Path, Path]:
    """Write the config of a run; returns its path and the run's folder."""
    folder.mkdir()
    config = folder / "config.yaml"
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
    logger["init_args"] = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    content = json.loads(json.dumps(CONFIG))
    content["trainer"]["logger"] = logger
    content["model"]["backbone"]["init_args"] = {"repo": str(small_sdxl())}
    config.write_text(yaml.safe_dump(content))
    return config, folder


def result(run: Path) -> dict:
    """Read the exported weights, and weights, reference and optimizer of the last checkpoint."""
    found = last_checkpoint([run / "checkpoints"])
    assert found.step == CONFIG["trainer"]["max_steps"]
    checkpoint = torch.load(found.path, weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    states = {f"{n}.{k}": value for n, state in optimizer["state"].items() for k, value in state.items()}
    exported = load_file(run / "unet/diffusion_pytorch_model.safetensors")
    return {"exported": exported, "saved": checkpoint["state_dict"], "optimizer": states}


def same(first: dict, second: dict) -> bool:
    return all(
        first[part].keys() == second[part].keys()
        and all(torch.equal(value, second[part][name]) for name, value in first[part].items())
        for part in first
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("unbroken")
    config, run = prepare(folder / "run")
    assert train_and_export(config, run) == 0
    return result(run)


@pytest.fixture(scope="module")
def rows():
    """Results of the kills, which `make test_kills` records."""
    rows = []
    yield rows
    if len(rows) == KILLS > len(MOMENTS):
        write_record(rows)


def draw_kills() -> list:
    """Draw number, moment, its count and delay of each kill; only one quick kill is not marked slow."""
    chance, kills = random.Random(0), []
    for kill in range(KILLS):
        moment = list(MOMENTS)[kill % len(MOMENTS)]
        *_, times, seconds = MOMENTS[moment]
        drawn = kill, moment, chance.randint(1, times), chance.uniform(0, seconds)
        marks = [] if moment == "checkpoint" and kill < len(MOMENTS) else [pytest.mark.slow]
        kills.append(pytest.param(*drawn, marks=marks, id=f"{kill}-{moment}"))
    return kills


@pytest.mark.parametrize(("kill", "moment", "number", "delay"), draw_kills())
def test_a_killed_run_ends_with_the_weights_of_the_unbroken_one(tmp_path, unbroken, rows, kill, moment, number, delay):
    config, run = prepare(tmp_path / "run")
    assert train_and_export(config, run, (moment, number, delay)) == -signal.SIGKILL
    left = last_checkpoint([run / "checkpoints"])
    assert train_and_export(config, run) == 0
    begins = "begins" if left is None else f"step {left.step}"
    equal = same(result(run), unbroken)
    rows.append((kill + 1, moment, number, round(delay * 1000), begins, equal))
    assert not list(run.rglob("*.part")), "leftovers of a killed save"
    assert equal, rows[-1]
    files = list((run / "checkpoints").iterdir())
    assert sorted(path.name for path in files) == ["epoch=0-step=12.ckpt", "last.ckpt"]
    assert (run / "checkpoints/last.ckpt").resolve() == last_checkpoint([run / "checkpoints"]).path


def write_record(rows) -> None:
    equal = sum(row[-1] for row in rows)
    lines = [
        f"# {len(rows)} kills",
        "",
        "`make test_kills`: a run of 12 steps (DiffusionDPO, full fine-tuning of the small SDXL, the reference copied",
        "every 3 steps, a checkpoint every 2, a validation every 4) and its export get SIGKILL at a moment drawn with",
        "seed 0, and are started again by the same command. Weights of the export, and weights, reference and moments",
        f"of the last checkpoint equal the unbroken run's, bit for bit, {equal} of {len(rows)} times.",
        "",
        "| | killed in | its n-th time | after ms | resumed from | equal |",
        "|---|---|---|---|---|---|",
        *(
            f"| {n} | {what} | {k} | {ms} | {begins} | {'yes' if same else 'NO'} |"
            for n, what, k, ms, begins, same in rows
        ),
        "",
    ]
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text("\n".join(lines))
