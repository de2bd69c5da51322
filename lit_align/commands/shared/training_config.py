"""Commands that read the config of a training run, for what a run would use too: its backbone and its data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from lit_align.backbones import Backbone
from lit_align.commands.shared.command_line import ShortErrors
from lit_align.data import PreferenceDataModule


def run_with_config(command: Callable[..., None], words: list[str], prog: str) -> None:
    """Parse a command line and run the command.

    Args:
        command: its `backbone` and `data` are what the configs and the options `--model.backbone` and `--data` say,
            as `fit` would understand them; nothing of these is instantiated. Its other parameters are options.
        words: of the command line.
        prog: how the command is called.
    """
    parser = ShortErrors(prog=prog, description=(command.__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="config of the training run, as for lit-align fit; only model.backbone and data are read",
    )
    parser.add_function_arguments(command, skip={"backbone", "data"}, as_positional=False)
    parser.add_subclass_arguments(Backbone, "model.backbone", required=True)
    parser.add_class_arguments(PreferenceDataModule, "data")
    config = parser.parse_args(_trim(words))
    options = {name: value for name, value in config.as_dict().items() if name not in ("config", "model", "data")}
    command(backbone=config.model.backbone, data=config.data, **options)


def _trim(words: list[str]) -> list[str]:
    """The words, with the parts of each config that are read in place of its name."""
    trimmed = list(words)
    for place, word in enumerate(words):
        if word.startswith("--config="):
            trimmed[place] = f"--config={_parts(word.removeprefix('--config='))}"
        elif place and words[place - 1] == "--config":
            trimmed[place] = _parts(word)
    return trimmed


def _parts(path: str) -> str:
    if not Path(path).is_file():
        return path  # the parser says what is wrong
    config: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        return path
    parts: dict[str, Any] = {}
    if "backbone" in (config.get("model") or {}):
        parts["model"] = {"backbone": config["model"]["backbone"]}
    if config.get("data"):
        parts["data"] = {name: value for name, value in config["data"].items() if name != "seed"}
    return json.dumps(parts)
