"""What a parsed config is told, refused or completed before anything is made of it."""

from pathlib import Path
from typing import Any

import yaml

from lit_align.training.checkpoints.atomic_io import last_version
from lit_align.user_errors import UserValueError


def kept_numbers(config: Any) -> list[str]:
    """What an objective has kept of another one of its family, which the config files name: parsing does not say so."""
    files = [yaml.safe_load(path.get_content()) or {} for path in config.config or []]
    named = [file["model"]["objective"] for file in files if "objective" in (file.get("model") or {})]
    if not named or not isinstance(named[-1], dict):
        return []
    old, new = (str(objective["class_path"]).split(".")[-1] for objective in (named[-1], config.model.objective))
    before, now = named[-1].get("init_args") or {}, config.model.objective.get("init_args") or {}
    kept = [f"{name} {now[name]}" for name, value in before.items() if old != new and now.get(name) == value]
    return [f"model.objective: {new} keeps {', '.join(kept)} of {old}, which the config file names."] if kept else []


def choose_version(logger: Any) -> None:
    """Where a logger would number this run anew, let it go on with the last one that has a checkpoint."""
    init_args = getattr(logger, "init_args", None)
    if init_args and all(name in init_args for name in ("save_dir", "name", "version")) and init_args.version is None:
        init_args.version = last_version(Path(init_args.save_dir, init_args.name or ""))


def integer_seed(seed: bool | int) -> int:
    """The seed as it is.

    Raises:
        ValueError: for true and false, which would make a run that cannot be repeated.
    """
    if isinstance(seed, bool):
        raise UserValueError(f"seed_everything is {seed}; it must be an integer. 0 is a seed like any other.")
    return seed
