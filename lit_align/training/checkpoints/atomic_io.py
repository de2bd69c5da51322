"""Checkpoint files: written whole or not at all, and the last one of a run found again."""

import logging
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.backbones.loading.sharded import META, check_whole, is_resumable
from lit_align.common.files import atomic_path
from lit_align.user_errors import UserFileNotFoundError, UserOSError, UserValueError

log = logging.getLogger(__name__)
UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError)  # what torch.load says of such files
VERSION = re.compile(r"version_(\d+)")  # how Lightning's loggers number a run's folders


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the place it will have, and moves it there once it is on the disk.

    Lightning's own writes to the folder of temporary files, and from there a move to another disk is a copy, which a
    kill cuts short; and it holds the file in memory twice before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises OSError, with what to do, where the file cannot be written; what was there stays as it was."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            for left_over in path.parent.glob(".*.ckpt.*.part"):  # by a killed run
                left_over.unlink()
            with atomic_path(path) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer turns the former into the latter
            raise UserOSError(_why_not_written(path, checkpoint, error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises ValueError where the file is no checkpoint or a damaged one."""
        if Path(path).is_dir():
            raise UserValueError(
                f"ckpt_path {path} is a folder to which each device of a sharded run has written its part. Go on with "
                "the trainer.strategy that the run began with (lit_align.training.strategies.FSDP2 or ZeRO2)."
            )
        if not Path(path).exists() and "://" not in str(path):
            raise UserFileNotFoundError(
                f"ckpt_path {path}: there is no such file. --ckpt_path last finds the run's last checkpoint."
            )
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except UNREADABLE as error:
            raise UserValueError(
                f"ckpt_path {path} is not a checkpoint, or is damaged ({str(error).splitlines()[0]}). "
                "Resume with --ckpt_path last, which takes the last whole one of the run."
            ) from error


def _why_not_written(path: Path, checkpoint: dict[str, Any], error: Exception) -> str:
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free / 1e9
    return (
        f"The checkpoint of step {checkpoint.get('global_step', 0):,} cannot be written to {path}: {error}. It takes "
        f"about {_size(checkpoint) / 1e9:.2f} GB, and {free:.2f} GB are free there. Earlier checkpoints are as they "
        "were: make room, or make the folder writable, and go on with --ckpt_path last."
    )


def _size(value: Any) -> int:
    """Bytes of the tensors inside."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(_size(part) for part in value)


class Found(NamedTuple):
    """A whole checkpoint."""

    path: Path
    step: int


def last_checkpoint(folders: Iterable[Path]) -> Found | None:
    """The whole checkpoint of the greatest step in these folders; damaged ones are named in the log and passed over."""
    found = []
    patterns = ("*.ckpt", ".*.ckpt.old")  # the latter while a folder takes the place of another, see `replace_folder`
    files = {file.resolve() for folder in folders for pattern in patterns for file in folder.glob(pattern)}
    for path in sorted(file for file in files if file.exists()):
        step = _step(path)
        if step is not None:
            found.append(Found(path, step))
    return max(found, key=lambda one: (one.step, one.path.stat().st_mtime_ns), default=None)


def _step(path: Path) -> int | None:
    """The optimizer step of a checkpoint that a run can go on from; only its index is read, not its tensors."""
    try:
        if path.is_dir():  # sharded: one file a process, and this one last
            meta = torch.load(path / META, weights_only=True, mmap=True)
            check_whole(path)
            return int(meta["global_step"]) if is_resumable(meta) else None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(checkpoint["global_step"]) if "optimizer_states" in checkpoint else None
    except (*UNREADABLE, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s), and is passed over.", path, str(error).splitlines()[0])
        return None


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Where this Trainer's checkpoints lie; see Lightning's ModelCheckpoint, which has no public name for it."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders = [Path(callback.dirpath) for callback in callbacks if callback.dirpath is not None]
    root = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        root = Path(logger.save_dir or root, str(logger.name), version)
    return [*folders, root / "checkpoints"]


def check_writable(folder: Path) -> None:
    """Refuse to train where no checkpoint could be written.

    Raises:
        OSError: that says what to do.
    """
    try:
        with atomic_path(folder / "probe") as part:
            part.touch()
        (folder / "probe").unlink(missing_ok=True)
    except OSError as error:
        raise UserOSError(
            f"Checkpoints cannot be written to {folder}: {error}. Make it writable, or choose another folder with "
            "trainer.logger.init_args.save_dir or ModelCheckpoint's dirpath."
        ) from error


def last_version(folder: Path) -> int | None:
    """The greatest number N of `version_N` in a logger's folder that holds a whole checkpoint."""
    numbers = sorted(int(match[1]) for path in folder.glob("version_*") if (match := VERSION.fullmatch(path.name)))
    for number in reversed(numbers):
        if last_checkpoint([folder / f"version_{number}" / "checkpoints"]) is not None:
            return number
    return None
