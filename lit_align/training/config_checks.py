"""Checks and completions of a parsed config, before anything is instantiated."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lit_align.training.checkpoints.last_checkpoint import last_version
from lit_align.user_errors import UserValueError


def inherited_init_args(config: Any) -> list[str]:
    """Warn when a new `--model.objective` inherits init_args from the objective in the config file.

    jsonargparse keeps init_args of equal names when a class path changes, and does not say so.
    """
    files = [yaml.safe_load(path.get_content()) or {} for path in config.config or []]
    objectives = [file["model"]["objective"] for file in files if "objective" in (file.get("model") or {})]
    named = [one["class_path"] for one in objectives if isinstance(one, dict) and "class_path" in one]
    if not named or not isinstance(objectives[-1], dict):
        return []
    old, new = (str(path).split(".")[-1] for path in (named[-1], config.model.objective.class_path))
    before, now = dict[str, Any](), config.model.objective.get("init_args") or {}
    for objective in filter(lambda one: isinstance(one, dict), objectives):  # an overlay may hold arguments alone
        before |= objective.get("init_args") or {}
    kept = [f"{name} {now[name]}" for name, value in before.items() if old != new and now.get(name) == value]
    return [f"model.objective: {new} keeps {', '.join(kept)} of {old}, which the config file names."] if kept else []


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
