"""Each option of a config file or a command is used by a test or a config."""

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module

from lit_align import backbones, callbacks, objectives, scoring
from lit_align.cli import COMMANDS
from lit_align.commands.encode.command import encode
from lit_align.data import PreferenceDataModule
from lit_align.training.module import AlignmentModule
from tests.support.paths import ROOT


def configured() -> Iterator[Callable]:
    """What a config file of a run names: the data module, the module, and the classes of four rooms."""
    yield PreferenceDataModule
    yield AlignmentModule
    for room in (backbones, callbacks, objectives, scoring):
        yield from (value for name, value in vars(room).items() if inspect.isclass(value) and name in room.__all__)


def commands() -> Iterator[Callable]:
    """Functions and dataclasses whose parameters are the options of a command."""
    for command in COMMANDS.values():
        module, _, name = command.path.partition(":")
        found = getattr(import_module(module), name)
        yield from found.values() if isinstance(found, dict) else [found]
    yield encode


def options(owner: Callable) -> list[str]:
    parameters = inspect.signature(owner).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def test_each_option_is_used_somewhere():
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    words = {word for path in files for word in re.findall(r"\w+", path.read_text())}
    owners = [*configured(), *commands()]
    names = {f"{owner.__name__}.{name}": name for owner in owners for name in options(owner)}
    assert len(names) > 150, "the walk has missed options"
    assert [full for full, name in names.items() if name not in words] == []
