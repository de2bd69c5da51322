"""Instantiate each part of a training run separately, so that an error in one hides no other."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from lit_align.backbones import Backbone
from lit_align.backbones.loading.meta import shapes_only
from lit_align.commands.shared.config_parts import arguments_of
from lit_align.data import PreferenceDataModule
from lit_align.data.labels.live_vote import LiveVote
from lit_align.objectives import Objective
from lit_align.scoring.base import Scorer
from lit_align.training.module import AlignmentModule

ONE_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}


class RunParts:
    """The parts that `fit` would instantiate; models have shapes and no weights.

    Args:
        parser: parser of `fit`.
        config: parsed config.
        make_trainer: builds a Trainer from its arguments and further callbacks, as LightningCLI does.
    """

    def __init__(
        self, parser: ArgumentParser, config: Namespace, make_trainer: Callable[[dict[str, Any], list[Any]], L.Trainer]
    ) -> None:
        self.parser, self.config, self.make_trainer = parser, config, make_trainer

    def _instantiate(self, part: str, config: Namespace) -> dict[str, Any]:
        return arguments_of(self.parser, part, config)

    def trainer(self, on_one_cpu: bool = False) -> L.Trainer:
        """Build the Trainer, without the callbacks that would load scorers.

        Args:
            on_one_cpu: build it for one CPU instead, because the config's devices are on another machine.
        """
        config = self.config.trainer.clone()
        if self.judges():
            config.callbacks = [callback for callback in self._callbacks() if not _holds_scorers(callback)]
        changes = ONE_CPU if on_one_cpu else {}
        return self.make_trainer({**self._instantiate("trainer", config), **changes}, [])

    def _callbacks(self) -> list[Namespace]:
        named = self.config.trainer.callbacks or []
        return named if isinstance(named, list) else [named]

    def judges(self) -> list[str]:
        """Name the callbacks whose scorers would load or download weights when instantiated."""
        return [callback.class_path.split(".")[-1] for callback in self._callbacks() if _holds_scorers(callback)]

    def data(self, scorers: bool = True) -> PreferenceDataModule:
        """Build the data module, with stub scorers so that no scorer weights are loaded.

        Args:
            scorers: whether to keep `data.scorers`; without them, pairs are ordered by the human label.
        """
        arguments = self._data_arguments()
        if not scorers and arguments["scorers"] is not None:
            arguments |= {"scorers": None, "vote": None}
        return PreferenceDataModule(**arguments)

    def live_vote(self) -> LiveVote | None:
        """Build the vote in the training loop, if there is one, by the data module's rules."""
        arguments = self._data_arguments()
        return None if arguments["scorers"] is None else LiveVote(arguments["vote"], arguments["scorers"])

    def _data_arguments(self) -> dict[str, Any]:
        config = self.config.data.clone()
        names, config.scorers = config.scorers, None
        arguments = self._instantiate("data", config)
        arguments["scorers"] = None if names is None else {name: StubScorer() for name in dict(names)}
        return arguments

    def optimizer(self) -> str | None:
        """Return the path of the module and class that define the optimizer; None if it is built by a function."""
        path: str = self.config.model.optimizer.class_path
        module, _, name = path.rpartition(".")
        found = getattr(import_module(module), name, None)
        return f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else None

    def objective(self) -> Objective:
        """Build the objective."""
        made: Objective = self._instantiate("model", Namespace(objective=self.config.model.objective))["objective"]
        return made

    def backbone(self) -> Backbone:
        """Build the backbone on the meta device."""
        with shapes_only():
            made: Backbone = self._instantiate("model", Namespace(backbone=self.config.model.backbone))["backbone"]
        return made

    def module(self, backbone: Mapping[str, Any] | None = None, **changes: Any) -> AlignmentModule:
        """Build the module on the meta device.

        Args:
            backbone: arguments of the backbone that replace the config's.
            changes: arguments of the module that replace the config's.
        """
        config = self.config.model.clone()
        for name, value in (backbone or {}).items():
            config.backbone.init_args[name] = value
        for name, value in changes.items():
            config[name] = value
        with shapes_only():
            return AlignmentModule(**self._instantiate("model", config))


class StubScorer(Scorer):
    """Stands in for a scorer in checks that need no scores."""

    version = 0

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        raise AssertionError("a stub has no scores")

    def fingerprint(self) -> str:
        return "weights not read"


def _holds_scorers(callback: Namespace) -> bool:
    return "scorers" in (callback.get("init_args") or {})
