"""The front door: a table of commands, each imported only when it is called."""

import difflib
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

import lit_align
from lit_align.user_errors import UserValueError


class Command(NamedTuple):
    """A line of the table."""

    line: str  # what it does
    path: str  # module:name of a function or dataclass
    # How the words of the command line reach it: parsed as its parameters or fields, or as they are.
    takes: Literal["options", "words"] = "options"


GROUPS: dict[str, dict[str, Command]] = {
    "train": {
        "fit": Command("train a model on preference pairs", "lit_align.commands.fit:fit", "words"),
        "validate": Command("validate a checkpoint on held-out pairs", "lit_align.commands.fit:validate", "words"),
        "export": Command("write a checkpoint's weights for diffusers", "lit_align.commands.export:export"),
    },
    "data": {
        "import": Command(
            "make shards of pairs from tables, published sets or your own images",
            "lit_align.commands.importing.command:IMPORTERS",
        ),
        "inspect": Command(
            "report what is in shards, and what is broken", "lit_align.commands.inspect.command:inspect"
        ),
        "generate": Command("make pairs from a model's own images", "lit_align.commands.generate.command:Generate"),
        "score": Command("score the images of pairs, for votes", "lit_align.commands.score.command:score"),
        "encode": Command(
            "cache latents and prompt embeddings, for faster training",
            "lit_align.commands.encode.encode_cli:run_encode",
            "words",
        ),
        "reference-errors": Command(
            "errors of a static reference, for DPO at MaPO's cost",
            "lit_align.commands.static_reference:run_reference_errors",
            "words",
        ),
    },
    "judge": {
        "test": Command(
            "win rates of models against their base, with a report", "lit_align.commands.evaluate.test:WinRateTest"
        ),
        "predict": Command("images of prompts, by any model", "lit_align.commands.evaluate.predict:Predict"),
    },
    "before a run": {
        "doctor": Command(
            "whether a training run would start and fit into memory",
            "lit_align.commands.doctor.doctor_cli:run_doctor",
            "words",
        ),
    },
    "for the shell": {
        "completion": Command(
            'names and options completed, by eval "$(lit-align completion bash)"',
            "lit_align.cli:print_completion",
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
    if words[0] == "--version":
        print(f"lit-align {lit_align.__version__}")
        return
    name, *rest = words
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        question = f" Do you mean {nearest[0]}?" if nearest else ""
        raise UserValueError(f"there is no command {name!r}.{question} lit-align --help lists all commands.")
    rest = [expand_home(word) for word in rest]
    check_configs(rest)
    run(name, rest)


def expand_home(word: str) -> str:
    """Replace `~/` by the home folder in `~/x` and `--option=~/x`, where shells leave it as it is."""
    option, home, path = re.match(r"(--[\w.+-]+=)?(~/)?(.*)", word, re.DOTALL).groups("")  # type: ignore[union-attr]
    return f"{option}{Path.home()}/{path}" if home and not Path("~").exists() else word


def run(name: str, words: list[str]) -> None:
    """Import a command and run it."""
    command = load(name)
    if COMMANDS[name].takes == "words":
        command(words)
    else:
        from lit_align.commands.shared.command_line import run_command

        run_command(command, words, prog=f"lit-align {name}")


def print_completion(words: list[str]) -> None:
    """Print a completion script for the shell that `words` names."""
    from lit_align.commands.completion import completion_script

    if len(words) != 1:
        raise UserValueError('name one shell, bash, zsh or tcsh. In bash: eval "$(lit-align completion bash)"')
    options = {
        name: (command.line, load(name) if command.takes == "options" else None) for name, command in COMMANDS.items()
    }
    print(completion_script(options, words[0]))


def load(name: str) -> Any:
    """Import a command."""
    module, _, attribute = COMMANDS[name].path.partition(":")
    with uncollected():
        return getattr(import_module(module), attribute)


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without Python's searches for garbage, which find none, and keep what was imported out of later ones.

    Only in a process that has just begun: in another one there may be garbage already, which would stay for good.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def check_configs(words: list[str]) -> None:
    """Refuse a config file that is no YAML mapping; parsers do not name it.

    Raises:
        UserValueError: it names the file and the line.
    """
    named = [after for word, after in pairwise(words) if word == "--config"]
    named += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    for path in map(Path, named):
        if "\n" in str(path) or len(path.name) > 255 or not path.is_file():  # a config may stand on the command line
            continue
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserValueError(f"config: {path} is no valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict | None):
            raise UserValueError(
                f"config: {path} must be a mapping of keys such as model and data; it is {config!r:.60}"
            )


def overview() -> str:
    """All commands in their groups, a line each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: lit-align COMMAND ...", "", "Align text-to-image diffusion models with preference pairs."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {command.line}" for name, command in commands.items())]
    return "\n".join([*lines, "", "lit-align COMMAND --help lists a command's options."])
