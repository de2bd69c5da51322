"""`lit-align completion SHELL`: a script that completes commands and options, by jsonargparse's support of shtab."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from jsonargparse import ArgumentParser

from lit_align.commands.shared.command_line import Command, add_command
from lit_align.user_errors import MissingPackageError, UserValueError

SHELLS = ("bash", "zsh", "tcsh")


def completion_script(commands: Mapping[str, tuple[str, Command | None]], shell: str) -> str:
    """Write a completion script.

    Args:
        commands: by name, the line that describes it, and what has its options; None completes `--config` alone.
        shell: bash, zsh or tcsh.

    Raises:
        ValueError: if the shell is another one.
        ModuleNotFoundError: if shtab is not installed.
    """
    if shell not in SHELLS:
        raise UserValueError(f"completion: the shell is {shell!r}; choose from {', '.join(SHELLS)}.")
    if find_spec("shtab") is None:
        raise MissingPackageError(
            "completion needs shtab, lit-align's extra completion: pip install -e '.[completion]' in its checkout"
        )
    parser = ArgumentParser(prog="lit-align")
    subcommands = parser.add_subcommands(required=False)
    for name, (line, command) in commands.items():
        added = ArgumentParser()
        subcommands.add_subcommand(name, added, help=line)  # before its own subcommands
        _add_options(added, command)
    script: str = parser.get_completion_script(f"shtab-{shell}")
    return script


def _add_options(parser: ArgumentParser, command: Command | None) -> None:
    if command is None:
        parser.add_argument("--config", help="YAML file; several are merged in order")
    elif not isinstance(command, Mapping):
        add_command(parser, command)
    else:
        subcommands: Any = parser.add_subcommands(required=False)
        for name, one in command.items():
            added = ArgumentParser()
            subcommands.add_subcommand(name, added)
            add_command(added, one)
