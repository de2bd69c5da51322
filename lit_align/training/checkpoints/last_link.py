"""`last.ckpt`: a link to the checkpoint that was written last."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_align.backbones.loading.sharded import is_resumable, replace_folder
from lit_align.common.files import atomic_path

LAST = "last.ckpt"


def follow(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Let the `last.ckpt` beside a new checkpoint, if there is one, link to it; not to weights alone."""
    last = path.with_name(LAST)
    if path != last and os.path.lexists(last) and ("optimizer_states" in checkpoint or is_resumable(checkpoint)):
        link(path, last)


def link(path: Path, last: Path) -> None:
    """Let `last` link to the checkpoint `path`, in one step; a copy where the disk has no links."""
    part = last.with_name(f".{last.name}.{uuid.uuid4().hex[:8]}.part")
    if last.is_dir() and not last.is_symlink():
        shutil.rmtree(last)  # a sharded checkpoint; no call replaces a folder
    try:
        part.symlink_to(os.path.relpath(path, last.parent))
        part.replace(last)
    except OSError:
        part.unlink(missing_ok=True)
        _copy(path, last)


def _copy(path: Path, last: Path) -> None:
    if path.is_dir():
        part = last.with_name(f".{last.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # left by a killed run
        replace_folder(last, Path(shutil.copytree(path, part)))
        return
    with atomic_path(last) as copy:
        shutil.copyfile(path, copy)
