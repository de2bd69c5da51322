"""Modules that have moved: the old path imports the new module for one release, with a warning."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "lit_align.fsdp2": "lit_align.training.strategies",
    "lit_align.module": "lit_align.training.module",
    "lit_align.scoring.aesthetic": "lit_align.scoring.scorers.aesthetic",
    "lit_align.scoring.analytic": "lit_align.scoring.scorers.analytic",
    "lit_align.scoring.clip": "lit_align.scoring.scorers.clip",
    "lit_align.scoring.hps": "lit_align.scoring.scorers.hps",
    "lit_align.scoring.image_reward": "lit_align.scoring.scorers.image_reward",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module by its old path, and forwards its attributes from the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} has moved to {new}; the old path goes in the next release.", FutureWarning, stacklevel=2)
        found = import_module(new)
        module.__getattr__ = lambda name: getattr(found, name)  # type: ignore[method-assign]


def install() -> None:
    """Make the old paths importable."""
    sys.meta_path.append(MovedModules())
