"""The checkpoints of a run: their folders, and the last complete one."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.backbones.loading.sharded import META, check_whole, is_resumable
from lit_align.training.checkpoints.atomic_io import UNREADABLE
from lit_align.training.checkpoints.run_folder import CHECKPOINTS, experiment_folder, known_folder
from lit_align.user_errors import UserValueError

log = logging.getLogger(__name__)
UNREADABLE_STATE = (*UNREADABLE, KeyError, TypeError)  # raised by `load_state`
PATTERNS = ("*.ckpt", ".*.ckpt.old")  # the latter while a folder replaces another, see `replace_folder`
VERSION = re.compile(r"version_(\d+)")  # a run's folder, as Lightning's loggers number it


class FoundCheckpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    step: int


def last_checkpoint(folders: Iterable[Path]) -> FoundCheckpoint | None:
    """Find the complete checkpoint of the greatest step. Logs the names of damaged ones and skips them."""
    steps = {path: resumable_step(path) for path in checkpoint_files(folders)}
    found = [FoundCheckpoint(path, step) for path, step in steps.items() if step is not None]
    return max(found, key=lambda one: (one.step, one.path.stat().st_mtime_ns), default=None)


def checkpoint_to_resume(folders: Iterable[Path]) -> FoundCheckpoint | None:
    """Find the checkpoint that `last` means; None where no checkpoint was ever written.

    Raises:
        UserValueError: if there are checkpoints, and a run can resume from none of them.
    """
    folders = list(folders)
    found, files = last_checkpoint(folders), checkpoint_files(folders)
    if found is None and files:
        raise UserValueError(
            f"ckpt_path last: a run can resume from none of the {len(files)} checkpoints in {files[0].parent}, such "
            f"as {files[0].name}: they are damaged, or hold weights alone. Name another checkpoint; or, to begin again "
            "from step 0, leave ckpt_path out and give the run another folder."
        )
    return found


def checkpoint_files(folders: Iterable[Path]) -> list[Path]:
    """List checkpoints, whole or not, by name; links are followed."""
    files = {file.resolve() for folder in folders for pattern in PATTERNS for file in folder.glob(pattern)}
    return [path for path in sorted(files) if path.exists()]


def newer_beside(path: Path) -> tuple[int | None, FoundCheckpoint | None]:
    """Read the step of a checkpoint, None if it is damaged, and find the one of the greatest later step beside it."""
    state, own = read_state(path), path.resolve()
    if state is None:
        return None, None
    step = int(state["global_step"])
    others = {file: read_state(file) for file in checkpoint_files([path.parent]) if file != own}
    found = [FoundCheckpoint(file, int(other["global_step"])) for file, other in others.items() if other is not None]
    newest = max(found, key=lambda one: one.step, default=None)
    return step, newest if newest is not None and newest.step > step else None


def resumable_step(path: Path) -> int | None:
    """Read the optimizer step of a checkpoint, without its tensors; None if a run cannot resume from it."""
    state = read_state(path)
    return int(state["global_step"]) if state is not None and has_optimizer(state) else None


def has_optimizer(state: dict[str, Any]) -> bool:
    """Whether a checkpoint holds more than weights."""
    return "optimizer_states" in state or is_resumable(state)


def read_state(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint as `load_state`; None, and a warning, if it is damaged."""
    try:
        return load_state(path)
    except UNREADABLE_STATE as error:
        log.warning("%s is damaged (%s), and is skipped.", path, str(error).splitlines()[0])
        return None


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint with its tensors mapped, of a folder all but tensors.

    Raises:
        UNREADABLE_STATE: any of these, if it is damaged.
    """
    file = path / META if path.is_dir() else path  # sharded: one file a process, and this one last
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if path.is_dir():
        check_whole(path)
    int(state["global_step"])
    return state


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """List the folders of this Trainer's checkpoints, as ModelCheckpoint chooses them; none at addresses."""
    local = [path for path in _chosen_folders(trainer) if path is not None and "://" not in path]
    return [*map(Path, local), (known_folder(trainer) or experiment_folder(trainer)) / CHECKPOINTS]


def refuse_last_at_addresses(trainer: L.Trainer) -> None:
    """Refuse `last` where all checkpoints go to addresses: nothing looks there, and the run would begin again.

    Raises:
        UserValueError: naming an address.
    """
    addresses = [path if path is not None and "://" in path else None for path in _chosen_folders(trainer)]
    if addresses and None not in addresses:
        raise UserValueError(
            f"ckpt_path last looks on disks alone, and ModelCheckpoint's dirpath is {addresses[0]}. Name a checkpoint, "
            f"such as --ckpt_path {addresses[0]}/last.ckpt, or leave ckpt_path out to begin."
        )


def _chosen_folders(trainer: L.Trainer) -> list[str | None]:
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [None if callback.dirpath is None else str(callback.dirpath) for callback in callbacks]


def last_version(folder: Path) -> int | None:
    """Find the greatest number N of `version_N` in a logger's folder that has checkpoints.

    Raises:
        UserValueError: if a run can resume from none of them: an earlier version is another run.
    """
    numbers = sorted(int(match[1]) for path in folder.glob("version_*") if (match := VERSION.fullmatch(path.name)))
    found = (n for n in reversed(numbers) if checkpoint_to_resume([folder / f"version_{n}" / CHECKPOINTS]) is not None)
    return next(found, None)
