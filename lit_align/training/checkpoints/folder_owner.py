"""Refuses to write a run into the folder of another one, or behind later checkpoints of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_align.training.checkpoints.last_checkpoint import UNREADABLE_STATE, has_optimizer, load_state
from lit_align.user_errors import UserValueError

ANOTHER = (
    "Give the run a folder of its own: another name or version of trainer.logger, another trainer.default_root_dir, or "
    "another dirpath of ModelCheckpoint."
)


class Owner(NamedTuple):
    """The run that wrote a checkpoint."""

    name: str | None  # None in checkpoints without a record
    step: int


def check_folder_is_own(folders: Sequence[Path], ckpt_path: str | None) -> bool:
    """Refuse folders that hold checkpoints of another run than the one that is to write there.

    Returns whether they hold any.

    Args:
        folders: of the run's checkpoints.
        ckpt_path: checkpoint from which the run resumes; None for a new run.

    Raises:
        UserValueError: naming a checkpoint of the other run, or one of this run that is newer than `ckpt_path`.
    """
    files = sorted({file.resolve() for folder in folders for file in folder.glob("*.ckpt") if file.exists()})
    if ckpt_path is None:
        if files:
            raise UserValueError(
                f"{files[0].parent} holds checkpoints of a run, such as {files[0].name}, and a new run would mix with "
                f"it. Go on with that run by --ckpt_path last. {ANOTHER}"
            )
        return False
    own = read_owner(Path(ckpt_path)) if files else None
    if own is None:
        return bool(files)
    for file in files:
        other = read_owner(file)
        if other is None:
            continue
        if None not in (own.name, other.name) and own.name != other.name:
            raise UserValueError(
                f"{file} is of another run than ckpt_path {ckpt_path}, and both would write there. {ANOTHER}"
            )
        if other.step > own.step:
            raise UserValueError(
                f"ckpt_path {ckpt_path} is of step {own.step:,}, and {file} of step {other.step:,}: a run that goes on "
                "from the earlier one would be taken for the later one by --ckpt_path last. Move the later checkpoints "
                f"away. {ANOTHER}"
            )
    return True


def read_owner(path: Path) -> Owner | None:
    """Read which run wrote a checkpoint, without its tensors; None if it cannot be read or holds weights alone."""
    try:
        state = load_state(path)
    except UNREADABLE_STATE:
        return None
    name = state.get("lit_align", {}).get("run", {}).get("name")
    return Owner(name, int(state["global_step"])) if has_optimizer(state) else None
