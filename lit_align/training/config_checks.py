"""Checks and completions of a parsed config, before anything is instantiated."""

from pathlib import Path
from typing import Any

import yaml

from lit_align.training.checkpoints.last_checkpoint import last_version
from lit_align.user_errors import UserValueError


def inherited_init_args(config: Any) -> list[str]:
    """Warn when a new `--model.objective` inherits init_args from the objective in the config file.

    jsonargparse keeps init_args of equal names when a class path changes, and does not say so.
    """
    files = [yaml.safe_load(path.get_content()) or {} for path in config.config or []]
    objectives = [file["model"]["objective"] for file in files if "objective" in (file.get("model") or {})]
    if not objectives or not isinstance(objectives[-1], dict):
        return []
    old, new = (str(objective["class_path"]).split(".")[-1] for objective in (objectives[-1], config.model.objective))
    before, now = objectives[-1].get("init_args") or {}, config.model.objective.get("init_args") or {}
    kept = [f"{name} {now[name]}" for name, value in before.items() if old != new and now.get(name) == value]
    return [f"model.objective: {new} keeps {', '.join(kept)} of {old}, which the config file names."] if kept else []


def choose_version(logger: Any) -> None:
    """Let a logger that numbers its runs resume in the last one with a checkpoint, instead of a new folder."""
    init_args = getattr(logger, "init_args", None)
    if init_args and all(name in init_args for name in ("save_dir", "name", "version")) and init_args.version is None:
        init_args.version = last_version(Path(init_args.save_dir, init_args.name or ""))


def integer_seed(seed: bool | int) -> int:
    """Return the seed unchanged.

    Raises:
        UserValueError: if it is true or false, for which Lightning would choose a seed that cannot be repeated.
    """
    if isinstance(seed, bool):
        raise UserValueError(f"seed_everything is {seed}; it must be an integer. 0 is a seed like any other.")
    return seed
