"""The command line: `lit-align fit | validate` through LightningCLI, and our own commands beside them."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

import lit_align.backbones
import lit_align.objectives  # noqa: F401  # imported so that short class names resolve
from lit_align.callbacks import StartBanner, StepProgress, Throughput
from lit_align.commands.encode import encode
from lit_align.commands.export import export
from lit_align.commands.generate import generate
from lit_align.commands.import_pairs import IMPORTERS
from lit_align.commands.inspect import inspect
from lit_align.commands.score import score
from lit_align.commands.training_config import run_with_config
from lit_align.data import PreferenceDataModule
from lit_align.module import AlignmentModule

Command = Callable[..., None] | dict[str, Any]  # one function, or functions by the name of the subcommand
COMMANDS: dict[str, Command] = {
    "export": export,
    "generate": generate,
    "import": IMPORTERS,
    "inspect": inspect,
    "score": score,
}
COMMANDS_WITH_CONFIG: dict[str, Callable[..., None]] = {"encode": encode}  # they read a training config
EXTRAS = {"bitsandbytes": "8bit"}  # packages that only some configs need


class Parser(LightningArgumentParser):
    """Names the extra that brings a missing package."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for package, extra in EXTRAS.items():
            if f"No module named '{package}'" in message:
                message += f"\n  Install it with: pip install 'lit-align[{extra}]'"
        super().error(message, ex)


class AlignmentCLI(LightningCLI):
    """LightningCLI for our module and data, with one seed for everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "model.seed", compute_fn=integer_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=integer_seed)

    def before_instantiate_classes(self) -> None:
        for kept in kept_numbers(self.config[self.subcommand]):
            rank_zero_info(kept)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {"fit": skipped, "validate": skipped}


def kept_numbers(config: Any) -> list[str]:
    """What an objective has kept of another one of its family, which the config files name: parsing does not say so."""
    files = [yaml.safe_load(path.get_content()) or {} for path in config.config or []]
    named = [file["model"]["objective"] for file in files if "objective" in (file.get("model") or {})]
    if not named or not isinstance(named[-1], dict):
        return []
    old, new = (str(objective["class_path"]).split(".")[-1] for objective in (named[-1], config.model.objective))
    before, now = named[-1].get("init_args") or {}, config.model.objective.get("init_args") or {}
    kept = [f"{name} {now[name]}" for name, value in before.items() if old != new and now.get(name) == value]
    return [f"model.objective: {new} keeps {', '.join(kept)} of {old}, which the config file names."] if kept else []


def integer_seed(seed: bool | int) -> int:
    """The seed as it is.

    Raises:
        ValueError: for true and false, which would make a run that cannot be repeated.
    """
    if isinstance(seed, bool):
        raise ValueError(f"seed_everything is {seed}; it must be an integer. 0 is a seed like any other.")
    return seed


def spell_flags(command: Callable[..., None], words: list[str]) -> list[str]:
    """`--flag` alone as `--flag true`, for the command's boolean parameters."""
    flags = {f"--{name}" for name, kind in get_type_hints(command).items() if kind is bool}
    following = [*words[1:], ""]
    bare = [
        word in flags and after.lower() not in ("true", "false") for word, after in zip(words, following, strict=True)
    ]
    return [f"{word}=true" if alone else word for word, alone in zip(words, bare, strict=True)]


def run_command(command: Command, name: str, words: list[str]) -> None:
    """Parse a command's options and run it, or the subcommand that the first word names."""
    if isinstance(command, dict):
        if words and words[0] in command:
            return run_command(command[words[0]], f"{name} {words[0]}", words[1:])
    else:
        words = spell_flags(command, words)
    auto_cli(command, args=words, as_positional=False, prog=f"lit-align {name}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `lit-align`."""
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # nothing is unpickled
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in COMMANDS:
        run_command(COMMANDS[words[0]], words[0], words[1:])
        return
    if words and words[0] in COMMANDS_WITH_CONFIG:
        command = COMMANDS_WITH_CONFIG[words[0]]
        run_with_config(command, spell_flags(command, words[1:]), prog=f"lit-align {words[0]}")
        return
    AlignmentCLI(
        AlignmentModule,
        PreferenceDataModule,
        args=arguments,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={
            "callbacks": [StartBanner(), Throughput(), StepProgress()],
            "enable_model_summary": False,  # the banner says it
        },
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        parser_kwargs={
            "prog": "lit-align",
            "description": "Align text-to-image diffusion models with preference pairs.",
            "epilog": f"Also: {', '.join(f'lit-align {name} --help' for name in [*COMMANDS, *COMMANDS_WITH_CONFIG])}",
        },
    )
