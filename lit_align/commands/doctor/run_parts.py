"""The parts of a training run, each made on its own from a parsed config, so that a broken one hides no other."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from lit_align.backbones import Backbone
from lit_align.backbones.loading.meta import shapes_only
from lit_align.data import PreferenceDataModule
from lit_align.data.labels.live_vote import LiveVote
from lit_align.objectives import Objective
from lit_align.scoring.base import Scorer
from lit_align.training.module import AlignmentModule

ONE_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}


class RunParts:
    """What `fit` would instantiate; models have shapes and no weights.

    Args:
        parser: that of `fit`.
        config: what it has parsed.
        make_trainer: as LightningCLI makes it, of its arguments and further callbacks.
    """

    def __init__(
        self, parser: ArgumentParser, config: Namespace, make_trainer: Callable[[dict[str, Any], list[Any]], L.Trainer]
    ) -> None:
        self.parser, self.config, self.make_trainer = parser, config, make_trainer

    def _instantiate(self, part: str, config: Namespace) -> dict[str, Any]:
        """The arguments of a part's constructor."""
        made = self.parser.instantiate_classes(Namespace({part: config.clone()}), instantiate_groups=False)
        return dict(vars(made[part]))

    def trainer(self, on_one_cpu: bool = False) -> L.Trainer:
        """The Trainer, without the callbacks that would load scorers.

        Args:
            on_one_cpu: where the devices that the config asks for are elsewhere.
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
        """Callbacks whose scorers read their weights, or get them, as soon as they are made."""
        return [callback.class_path.split(".")[-1] for callback in self._callbacks() if _holds_scorers(callback)]

    def data(self, scorers: bool = True) -> PreferenceDataModule:
        """The data module; others stand in for the scorers of the training loop, which would load their weights.

        Args:
            scorers: whether there are any; else pairs are those of the human label, as a look at the shards has them.
        """
        arguments = self._data_arguments()
        if not scorers and arguments["scorers"] is not None:
            arguments |= {"scorers": None, "vote": None}
        return PreferenceDataModule(**arguments)

    def live_vote(self) -> LiveVote | None:
        """The vote in the training loop, if there is one, by the rules that the data module has for it."""
        arguments = self._data_arguments()
        return None if arguments["scorers"] is None else LiveVote(arguments["vote"], arguments["scorers"])

    def _data_arguments(self) -> dict[str, Any]:
        config = self.config.data.clone()
        names, config.scorers = config.scorers, None
        arguments = self._instantiate("data", config)
        arguments["scorers"] = None if names is None else {name: UnreadScorer() for name in dict(names)}
        return arguments

    def optimizer(self) -> str | None:
        """Import path of the optimizer's class, where it is defined; None for a function that makes one."""
        path: str = self.config.model.optimizer.class_path
        module, _, name = path.rpartition(".")
        found = getattr(import_module(module), name, None)
        return f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else None

    def objective(self) -> Objective:
        """The objective."""
        made: Objective = self._instantiate("model", Namespace(objective=self.config.model.objective))["objective"]
        return made

    def backbone(self) -> Backbone:
        """The backbone's shapes."""
        with shapes_only():
            made: Backbone = self._instantiate("model", Namespace(backbone=self.config.model.backbone))["backbone"]
        return made

    def module(self, **changes: Any) -> AlignmentModule:
        """The module's shapes.

        Args:
            changes: arguments of the backbone in place of the config's.
        """
        config = self.config.model.clone()
        for name, value in changes.items():
            config.backbone.init_args[name] = value
        with shapes_only():
            return AlignmentModule(**self._instantiate("model", config))


class UnreadScorer(Scorer):
    """Stands in for a scorer in rules that do not look at scores."""

    version = 0

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        raise AssertionError("a stand-in scores nothing")

    def fingerprint(self) -> str:
        return "weights not read"


def _holds_scorers(callback: Namespace) -> bool:
    return "scorers" in (callback.get("init_args") or {})
