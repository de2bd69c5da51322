"""A logger that names its runs as those of online services do, such as Weights & Biases."""

import uuid

from lightning.pytorch.loggers.logger import Logger


class OnlineLogger(Logger):
    """Has no folder of its own, and no version before its run begins; the version is then the run's id.

    Args:
        save_dir: folder of all projects.
        project: of several runs.
        name: shown name of a run.
    """

    def __init__(self, save_dir: str = ".", project: str = "lightning_logs", name: str | None = None) -> None:
        super().__init__()
        self._save_dir, self._project, self._id = save_dir, project, None

    @property
    def experiment(self) -> str:
        self._id = self._id or uuid.uuid4().hex[:8]
        return self._id

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str | None:
        return self._id

    def log_metrics(self, metrics, step=None) -> None: ...

    def log_hyperparams(self, params, *args, **kwargs) -> None: ...
