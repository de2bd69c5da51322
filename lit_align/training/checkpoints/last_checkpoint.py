"""The checkpoints of a run: their folders, and the last complete one."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.backbones.loading.sharded import META, check_whole, is_resumable
from lit_align.training.checkpoints.atomic_io import UNREADABLE
from lit_align.training.checkpoints.run_folder import CHECKPOINTS, experiment_folder, known_folder

log = logging.getLogger(__name__)
PATTERNS = ("*.ckpt", ".*.ckpt.old")  # the latter while a folder replaces another, see `replace_folder`
VERSION = re.compile(r"version_(\d+)")  # a run's folder, as Lightning's loggers number it


class FoundCheckpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    step: int


def last_checkpoint(folders: Iterable[Path]) -> FoundCheckpoint | None:
    """Find the complete checkpoint of the greatest step. Logs the names of damaged ones and skips them."""
    files = {file.resolve() for folder in folders for pattern in PATTERNS for file in folder.glob(pattern)}
    steps = {path: resumable_step(path) for path in sorted(files) if path.exists()}
    found = [FoundCheckpoint(path, step) for path, step in steps.items() if step is not None]
    return max(found, key=lambda one: (one.step, one.path.stat().st_mtime_ns), default=None)


def resumable_step(path: Path) -> int | None:
    """Read the optimizer step of a checkpoint, without its tensors; None if a run cannot resume from it."""
    try:
        if path.is_dir():  # sharded: one file a process, and this one last
            meta = torch.load(path / META, weights_only=True, mmap=True)
            check_whole(path)
            return int(meta["global_step"]) if is_resumable(meta) else None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(checkpoint["global_step"]) if "optimizer_states" in checkpoint else None
    except (*UNREADABLE, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s), and is skipped.", path, str(error).splitlines()[0])
        return None


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """List the folders of this Trainer's checkpoints, as Lightning's ModelCheckpoint chooses them."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders = [Path(callback.dirpath) for callback in callbacks if callback.dirpath is not None]
    return [*folders, (known_folder(trainer) or experiment_folder(trainer)) / CHECKPOINTS]


def last_version(folder: Path) -> int | None:
    """Find the greatest number N of `version_N` in a logger's folder that holds a complete checkpoint."""
    numbers = sorted(int(match[1]) for path in folder.glob("version_*") if (match := VERSION.fullmatch(path.name)))
    for number in reversed(numbers):
        if last_checkpoint([folder / f"version_{number}" / "checkpoints"]) is not None:
            return number
    return None
