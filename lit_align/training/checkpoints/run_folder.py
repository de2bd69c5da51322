"""The folder of a run, whatever its logger: of its config, samples, best weights and checkpoints."""

import itertools
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_align.training.checkpoints.settings import flat

CHECKPOINTS, CONFIG, METRICS = "checkpoints", "config.yaml", "metrics.csv"
LOGGER = "trainer.logger"
NAMING = (  # a logger's options by which people tell runs apart; ids are made by the service
    *(".name", ".save_dir", ".dir", ".project", ".project_name", ".entity", ".group", ".workspace"),
    *(".experiment_name", ".run_name", ".tracking_uri"),
)


class RunFolder(L.Callback):
    """Keeps all files of a run in one folder, which no other run has.

    A logger that names or numbers its runs decides the folder, as Lightning does for checkpoints: its `save_dir`,
    `name` and `version`. Without a logger, and where the logger's folder holds another run, runs are numbered.
    """

    def __init__(self) -> None:
        self.path: Path | None = None  # decided before the run, or in `setup`

    def decide(self, trainer: L.Trainer, last: bool, config: Mapping[str, Any]) -> None:
        """Decide the folder before the run, unless its logger makes the version of a new run only when it begins.

        Args:
            trainer: of the run.
            last: whether to go on in the folder of the experiment's last run, if there is one.
            config: settings of this run by option.
        """
        self.find(trainer, last, config)
        if self.path is None and not trainer.loggers:
            self.path = next_folder(trainer)

    def find(self, trainer: L.Trainer, last: bool, config: Mapping[str, Any]) -> None:
        """Find the folder of a run that is there, see `decide`; makes none."""
        self.path = logger_folder(trainer) if trainer.loggers else None
        if self.path is None and last:
            self.path = last_run(experiment_folder(trainer), config)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        path = self.path or logger_folder(trainer)  # loggers know their version here
        if self.path is None and (path is None or holds_run(path)):
            path = next_folder(trainer)
        self.path = Path(trainer.strategy.broadcast(str(path)))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.path / CHECKPOINTS)


def run_folder(trainer: L.Trainer) -> Path:
    """Return the folder of a run; to be asked of all ranks."""
    return Path(trainer.strategy.broadcast(str(known_folder(trainer) or experiment_folder(trainer))))


def known_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of a run as far as this rank knows it; None before it is decided."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set in Trainer's constructor
    decided = next((one.path for one in callbacks if isinstance(one, RunFolder) and one.path is not None), None)
    return decided or logger_folder(trainer)


def logger_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder that the first logger gives to the run; None before the logger has a version."""
    if not trainer.loggers:
        return experiment_folder(trainer)
    version = trainer.loggers[0].version
    if version is None:
        return None
    return experiment_folder(trainer) / (version if isinstance(version, str) else f"version_{version}")


def experiment_folder(trainer: L.Trainer) -> Path:
    """Return the folder in which a logger has a folder for each run."""
    root = trainer.default_root_dir
    if trainer.loggers:
        logger = trainer.loggers[0]
        root = os.path.join(logger.save_dir or root, str(logger.name or ""))
    return Path(os.path.expandvars(root)).expanduser()


def keep_metrics(trainer: L.Trainer) -> None:
    """Rename the metrics.csv of a run that goes on: Lightning's CSVLogger would delete it."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        file = Path(logger.log_dir, METRICS) if isinstance(logger, CSVLogger) else None
        if file is not None and file.is_file():
            kept = next(path for n in itertools.count(1) if not (path := file.with_stem(f"{file.stem}-{n}")).exists())
            file.rename(kept)
            rank_zero_info(f"The metrics logged so far are in {kept}.")


def holds_run(folder: Path) -> bool:
    """Whether a folder holds checkpoints."""
    return next((folder / CHECKPOINTS).glob("*.ckpt"), None) is not None


def next_folder(trainer: L.Trainer) -> Path:
    """Make the first `version_N` that is not there, as Lightning's loggers number their runs."""
    for number in itertools.count():
        folder = experiment_folder(trainer) / f"version_{number}"
        if not folder.exists():
            with suppress(FileExistsError):  # another run was faster
                if trainer.is_global_zero:
                    folder.mkdir(parents=True)
                return folder
    raise AssertionError


def last_run(experiment: Path, config: Mapping[str, Any]) -> Path | None:
    """Find the run in an experiment's folder that was written to last and that a config's logger describes.

    Args:
        experiment: folder.
        config: settings of this run by option.
    """
    runs = [folder for folder in [experiment, *_folders(experiment)] if holds_run(folder)]
    same = [folder for folder in runs if _logger_settings(folder) in (None, _naming(config))]
    return max(same, key=_written, default=None)


def _folders(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()


def _written(run: Path) -> int:
    return max(file.stat().st_mtime_ns for file in (run / CHECKPOINTS).glob("*.ckpt") if file.exists())


def _logger_settings(run: Path) -> dict[str, Any] | None:
    """Read the logger of a run from its config; None where it cannot be told."""
    try:
        return _naming(flat(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None


def _naming(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the logger's class and its options that name a run; others, such as `offline`, may change."""
    logger = {name: value for name, value in settings.items() if name.startswith(f"{LOGGER}.")}
    return {LOGGER: settings.get(LOGGER)} | {name: value for name, value in logger.items() if name.endswith(NAMING)}
