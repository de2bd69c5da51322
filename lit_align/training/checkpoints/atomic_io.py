"""Checkpoint files that are written completely or not at all."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_align.common.files import atomic_path
from lit_align.training.checkpoints.last_link import follow
from lit_align.user_errors import UserFileNotFoundError, UserOSError, UserValueError

UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError)  # raised by torch.load


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in its folder, and renames it once it is on the disk.

    Lightning's own writes to the system's temporary folder; from there a move to another disk is a copy, which a kill
    cuts short. It also holds the file in memory twice.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; raises UserOSError if it cannot be written, and leaves an existing file as it was."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            for leftover in path.parent.glob(".*.ckpt.*.part"):  # of a killed run
                leftover.unlink()
            with atomic_path(path) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
            follow(path, checkpoint)
        except (OSError, RuntimeError) as error:  # torch's writer turns the former into the latter
            raise UserOSError(_why_not_written(path, checkpoint, error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; raises UserValueError if the file is damaged or no checkpoint."""
        if Path(path).is_dir():
            raise UserValueError(
                f"ckpt_path {path} is a folder with one part for each device of a sharded run. Resume with the "
                "trainer.strategy that the run began with (lit_align.training.strategies.FSDP2 or ZeRO2)."
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
                "Resume with --ckpt_path last, which takes the last complete one of the run."
            ) from error


def _why_not_written(path: Path, checkpoint: dict[str, Any], error: Exception) -> str:
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free / 1e9
    return (
        f"The checkpoint of step {checkpoint.get('global_step', 0):,} cannot be written to {path}: {error}. It takes "
        f"about {_size(checkpoint) / 1e9:.2f} GB, and {free:.2f} GB are free there. Earlier checkpoints are unchanged. "
        "Free some space, or make the folder writable, and resume with --ckpt_path last."
    )


def _size(value: Any) -> int:
    """Sum the bytes of all tensors inside."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(_size(part) for part in value)


def check_writable(folder: Path) -> None:
    """Write and delete a file in a folder, before hours of training that could not be saved there.

    Raises:
        UserOSError: if no checkpoint could be written to the folder.
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
