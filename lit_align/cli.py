"""The front door: a table of commands, each imported only when it is called."""

import os
import sys
from importlib import import_module
from typing import Literal, NamedTuple


class Command(NamedTuple):
    """A line of the table."""

    line: str  # what it does
    path: str  # module:name of a function or dataclass
    # How the words of the command line reach it: parsed as its parameters or fields, parsed together with the
    # config of a training run, or as they are.
    takes: Literal["options", "config", "words"] = "options"


GROUPS: dict[str, dict[str, Command]] = {
    "train": {
        "fit": Command("train a model on preference pairs", "lit_align.commands.fit:fit", "words"),
        "validate": Command("validate a checkpoint on held-out pairs", "lit_align.commands.fit:validate", "words"),
        "export": Command("write a checkpoint's weights for diffusers", "lit_align.commands.export:export"),
    },
    "data": {
        "import": Command(
            "make shards of pairs from Pick-a-Pic, HPDv2, WebDataset or your own images",
            "lit_align.commands.importing.command:IMPORTERS",
        ),
        "inspect": Command(
            "report what is in shards, and what is broken", "lit_align.commands.inspect.command:inspect"
        ),
        "generate": Command("make pairs from a model's own images", "lit_align.commands.generate.command:generate"),
        "score": Command("score the images of pairs, for votes", "lit_align.commands.score.command:score"),
        "encode": Command(
            "cache latents and prompt embeddings, for faster training",
            "lit_align.commands.encode.command:encode",
            "config",
        ),
    },
    "judge": {
        "test": Command(
            "win rates of models against their base, with a report", "lit_align.commands.evaluate.test:test"
        ),
        "predict": Command("images of prompts, by any model", "lit_align.commands.evaluate.predict:predict"),
    },
    "before a run": {
        "doctor": Command(
            "whether a training run would start and fit into memory",
            "lit_align.commands.doctor.doctor_cli:run_doctor",
            "words",
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `lit-align`."""
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # nothing is unpickled
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    name, *rest = words
    if name not in COMMANDS:
        sys.exit(f"lit-align: there is no command {name!r}")
    run(name, rest)


def run(name: str, words: list[str]) -> None:
    """Import a command and run it."""
    module, _, attribute = COMMANDS[name].path.partition(":")
    command = getattr(import_module(module), attribute)
    if COMMANDS[name].takes == "words":
        command(words)
    elif COMMANDS[name].takes == "config":
        from lit_align.commands.shared.command_line import spell_flags
        from lit_align.commands.shared.training_config import run_with_config

        run_with_config(command, spell_flags(command, words), prog=f"lit-align {name}")
    else:
        from lit_align.commands.shared.command_line import run_command

        run_command(command, words, prog=f"lit-align {name}")


def overview() -> str:
    """All commands in their groups, a line each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: lit-align COMMAND ...", "", "Align text-to-image diffusion models with preference pairs."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {command.line}" for name, command in commands.items())]
    return "\n".join([*lines, "", "lit-align COMMAND --help lists a command's options."])
