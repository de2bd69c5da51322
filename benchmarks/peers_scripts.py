"""The released training scripts: where they lie, how they are called, and what asks lit-align for the same training."""

import os
import shutil
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.accelerator_record import ROOT
from benchmarks.accelerator_runs import BATCH, CACHE, CHECKPOINTING, OBJECTIVE, PRECISION
from lit_align.data.shards.layout import parse_sample, read_samples

MAPO = "train.py"
DPO = "examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py"
MIXED = {"32-true": "no", "bf16-mixed": "bf16"}  # the Trainer's precisions in accelerate's words
VAE = {"model.backbone.init_args.vae_precision": "fp32", "model.backbone.init_args.vae_slicing": False}  # as in theirs
# With these, accelerate would not make one process of a script, or not with the script's own options.
LAUNCHERS = ("ACCELERATE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_RANK", "SLURM_", "OMPI_", "PMI_", "MPI_")


@dataclass(frozen=True)
class Setting:
    """What the trainings of a comparison have in common: gradient checkpointing, no flips, and these.

    Args:
        pipeline: folder of SDXL.
        work: folder for what the released scripts read and write.
        side: of the images in pixels.
        pairs: a step.
        steps: of a training.
        precision: of the Trainer, a key of `MIXED`.
        workers: processes of a training's loader.
    """

    pipeline: Path
    work: Path
    side: int
    pairs: int
    steps: int
    precision: str
    workers: int = 0

    @property
    def table(self) -> Path:
        """Folder of the pairs as the released scripts read them."""
        return self.work / "peers-pairs"

    def write_table(self, shard: str) -> None:
        """Write a shard's pairs as the table that the released scripts read."""
        pairs = [parse_sample(sample) for sample in read_samples(shard)]
        columns = {
            "jpg_0": [pair.image_0 for pair in pairs],
            "jpg_1": [pair.image_1 for pair in pairs],
            "label_0": [pair.label_0 for pair in pairs],
            "label_1": [1 - pair.label_0 for pair in pairs],
            "caption": [pair.prompt for pair in pairs],
        }
        self.table.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), self.table / "train-00000-of-00001.parquet")

    def released(self, script: Path, *more: str) -> list[str]:
        """A released script and its own options, for an interpreter in the script's folder."""
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": self.pipeline,
            "dataset_name": self.table,
            "dataset_split_name": "train",
            "cache_dir": self.work / "peers-cache",
            "output_dir": self.work / "peers-output",
            "resolution": self.side,
            "train_batch_size": self.pairs,
            "max_train_steps": self.steps,
            "dataloader_num_workers": self.workers,
            "learning_rate": 1e-6,
            "lr_scheduler": "constant",
            "mixed_precision": MIXED[self.precision],
            "seed": 1,
        }
        line = [f"--{key}={value}" for key, value in values.items()]
        return [script.name, *line, "--gradient_checkpointing", "--no_hflip", *more]

    def ours(self, cache: str | None, lora: bool) -> dict[str, Any]:
        """What lit-align's configs are overridden with, so that they ask for what the released scripts do.

        Args:
            cache: folder of encoded pairs; None encodes on the fly.
            lora: whether to train a LoRA by DiffusionDPO, as diffusers' script does; else all weights by MaPO.
        """
        values: dict[str, Any] = {BATCH: self.pairs, CACHE: cache, CHECKPOINTING: True, PRECISION: self.precision}
        values |= {"trainer.max_steps": self.steps, "trainer.enable_progress_bar": False}
        if lora:
            values[OBJECTIVE] = {"class_path": "lit_align.objectives.DiffusionDPO"}
        return values


def offline(work: Path) -> dict[str, str]:
    """Environment of a released script: one process, no network, no files in its checkout.

    Args:
        work: folder for what it keeps of its data.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    own = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "WANDB_MODE": "disabled"}
    return {**kept, **own, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "datasets")}


def find(peers: list[Path], script: str) -> Path | None:
    """Find a peer's script in the folders, or in the folders in them."""
    for folder in peers:
        for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            if (place / script).is_file() and (script != MAPO or (place / "args.py").is_file()):
                return (place / script).resolve()
    return None


def add_peer_options(parser: ArgumentParser) -> None:
    """Add the options that name the released scripts and their interpreter."""
    parser.add_argument("--peer", type=Path, action="append", default=[], help="checkout, or a folder that holds some")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' scripts")


def check_peer_options(parser: ArgumentParser, arguments: Namespace) -> None:
    """End the program where these options name what is not there; make the interpreter's path absolute."""
    if missing := [str(folder) for folder in arguments.peer if not folder.is_dir()]:
        parser.error(f"--peer: {', '.join(missing)} is no folder")
    python = shutil.which(arguments.peer_python)
    if python is None:
        parser.error(f"--peer-python: {arguments.peer_python} is no program")
    arguments.peer_python = os.path.abspath(python)  # not resolved: a virtual environment's is a link
