"""Which checkpoint a command takes, and what it says of it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch.utilities import rank_zero_info

from lit_align.training.checkpoints.last_checkpoint import checkpoint_to_resume, newer_beside
from lit_align.user_errors import UserValueError


def choose_checkpoint(folders: Sequence[Path], ckpt_path: str | None, or_begin: bool) -> str | None:
    """Replace `last` by the path of the last complete checkpoint, and say which checkpoint is taken, of which step.

    Args:
        folders: of the run's checkpoints.
        ckpt_path: a path, `last` or none.
        or_begin: whether `last` is none where there is no checkpoint; Lightning would validate the untrained model.

    Raises:
        UserValueError: if there is no such checkpoint, or the path is a word that means one in a single process alone.
    """
    if ckpt_path in ("best", "hpc"):
        raise UserValueError(f"ckpt_path is {ckpt_path}; name a checkpoint's file or folder, or last.")
    if ckpt_path != "last":
        if ckpt_path is not None and Path(ckpt_path).exists():
            announce_checkpoint(Path(ckpt_path))
        return ckpt_path
    found, where = checkpoint_to_resume(folders), ", ".join(map(str, folders))
    if found is None and not or_begin:
        raise UserValueError(f"ckpt_path last: no checkpoint in {where}. Name a checkpoint's file.")
    rank_zero_info(
        f"ckpt_path last: no checkpoint in {where}; the run starts from step 0."
        if found is None
        else f"ckpt_path last: {found.path}, of step {found.step:,}"
    )
    return None if found is None else str(found.path)


def checkpoint_lines(path: Path) -> tuple[list[str], list[str]]:
    """Say of which step a checkpoint is, and warn of a newer one beside it; nothing if it cannot be read."""
    step, newer = newer_beside(path)
    if step is None:
        return [], []
    name = f"{path} -> {path.resolve().name}" if path.is_symlink() else str(path)
    newest = "" if newer is None else f"a newer one lies beside {path}: {newer.path.name} of step {newer.step:,}"
    return [f"{name}: checkpoint of step {step:,}"], [newest] * bool(newest)


@rank_zero_only
def announce_checkpoint(path: Path) -> None:
    """Print the step of a checkpoint, and on stderr a warning if it is not the newest in its folder."""
    lines, warnings = checkpoint_lines(path)
    print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
