"""The parts of a training run, each made on its own from a parsed config, so that a broken one hides no other."""

from collections.abc import Callable
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, Namespace

from lit_align.backbones import Backbone
from lit_align.backbones.shapes import shapes_only
from lit_align.data import PreferenceDataModule
from lit_align.module import AlignmentModule
from lit_align.objectives import Objective

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
        """The Trainer; `on_one_cpu` where the devices that the config asks for are elsewhere."""
        changes = ONE_CPU if on_one_cpu else {}
        return self.make_trainer({**self._instantiate("trainer", self.config.trainer), **changes}, [])

    def data(self) -> PreferenceDataModule:
        """The data module; scorers of the training loop are left out, for they would load their weights."""
        config = self.config.data.clone()
        if config.scorers is not None:
            config.scorers = config.vote = None
        return PreferenceDataModule(**self._instantiate("data", config))

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
