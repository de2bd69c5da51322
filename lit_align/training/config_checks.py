"""Checks and completions of a parsed config, before anything is instantiated."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lit_align.training.checkpoints.last_checkpoint import last_version
from lit_align.user_errors import UserValueError


def inherited_init_args(config: Any) -> list[str]:
    """Warn when a new `--model.objective` inherits arguments of the objective in the config files, or lacks them.

    jsonargparse keeps init_args of equal names when a class path changes, and does not say so. A wrapper around the
    files' objective has that objective with its defaults.
    """
    files = [yaml.safe_load(path.get_content()) or {} for path in config.config or []]
    old, before = _objective_of(files)
    now = config.model.objective
    new, arguments = str(now.class_path).split(".")[-1], now.get("init_args") or {}
    if old in ("", new):
        return []
    inner = arguments.get("objective")
    if inner is not None and str(inner.class_path).split(".")[-1] == old:
        given = inner.get("init_args") or {}
        lost = ", ".join(f"{name} {value}" for name, value in before.items() if given.get(name) != value)
        remedy = "Give them as --model.objective.objective.NAME."
        return [f"model.objective: {new}'s {old} lacks {lost} of the config files. {remedy}"] if lost else []
    kept = [f"{name} {arguments[name]}" for name, value in before.items() if arguments.get(name) == value]
    return [f"model.objective: {new} keeps {', '.join(kept)} of {old}, which the config file names."] if kept else []


def _objective_of(files: list[Any]) -> tuple[str, dict[str, Any]]:
    """Return class and arguments of the objective that config files name, a later one over those before it."""
    name, arguments = "", dict[str, Any]()
    for file in files:
        found = (file.get("model") or {}).get("objective")
        found = {"class_path": found} if isinstance(found, str) else found or {}
        given = str(found.get("class_path", name)).split(".")[-1]
        if given != name:
            name, arguments = given, {}
        flat = {key: value for key, value in found.items() if key not in ("class_path", "init_args")}
        arguments |= (found.get("init_args") or {}) | flat
    return name, arguments


def choose_versions(trainer: Any) -> None:
    """Let each logger of a Trainer's config that numbers its runs resume in the last one with a checkpoint."""
    if trainer.logger is None or trainer.logger is True:  # Lightning's own, which no config numbers
        own = _own_logger(trainer.default_root_dir or str(Path.cwd()))
        choose_version(own)
        trainer.logger = trainer.logger if own.init_args.version is None else own
    for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        choose_version(logger)


def _own_logger(save_dir: str) -> Namespace:
    kind = "TensorBoardLogger" if find_spec("tensorboard") or find_spec("tensorboardX") else "CSVLogger"
    init_args = Namespace(save_dir=save_dir, name="lightning_logs", version=None)
    return Namespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=init_args)


def choose_version(logger: Any) -> None:
    """Let a logger that numbers its runs resume in the last one with a checkpoint, instead of a new folder."""
    init_args = getattr(logger, "init_args", None)
    if not init_args or "project" in init_args:  # W&B has the three names below, but names its runs by an id
        return
    if all(name in init_args for name in ("save_dir", "name", "version")) and init_args.version is None:
        init_args.version = last_version(Path(init_args.save_dir, init_args.name or ""))


def integer_seed(seed: bool | int) -> int:
    """Return the seed unchanged.

    Raises:
        UserValueError: if it is true or false, for which Lightning would choose a seed that cannot be repeated.
    """
    if isinstance(seed, bool):
        raise UserValueError(f"seed_everything is {seed}; it must be an integer. 0 is a seed like any other.")
    return seed
