"""Command lines of the commands whose options are the parameters of a function or the fields of a dataclass."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

from jsonargparse import auto_cli

Command = Callable[..., Any] | dict[str, Callable[..., Any]]  # or commands by the name of the subcommand


def run_command(command: Command, words: list[str], prog: str) -> None:
    """Parse the options of a command and run it.

    Args:
        command: function, called with the options; or dataclass, made from them and then run by its method `run`; or
            several of these, of which the first word names one.
        words: of the command line, after the command's name.
        prog: how the command is called.
    """
    if isinstance(command, dict):
        if words and words[0] in command:
            return run_command(command[words[0]], words[1:], f"{prog} {words[0]}")
    else:
        words = spell_flags(command, words)
    made = auto_cli(command, args=words, as_positional=False, return_instance=True, prog=prog)
    if dataclasses.is_dataclass(made):
        made.run()  # type: ignore[union-attr]


def spell_flags(command: Callable[..., Any], words: list[str]) -> list[str]:
    """`--flag` alone as `--flag=true`, for the command's boolean options."""
    flags = {f"--{name}" for name, kind in get_type_hints(command).items() if kind is bool}
    following = [*words[1:], ""]
    bare = [
        word in flags and after.lower() not in ("true", "false") for word, after in zip(words, following, strict=True)
    ]
    return [f"{word}=true" if alone else word for word, alone in zip(words, bare, strict=True)]
