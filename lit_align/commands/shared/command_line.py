"""Command lines of the commands whose options are the parameters of a function or the fields of a dataclass."""

import dataclasses
import difflib
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, auto_cli

from lit_align.commands.shared.mistakes import explain_parsing, missing_extra

Command = Callable[..., Any] | dict[str, Callable[..., Any]]  # or commands by the name of the subcommand


class ShortErrors(ArgumentParser):
    """Answers a mistake in two lines, where jsonargparse prints the usage of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and how to get help, then exit with code 2."""
        if not self.exit_on_error or os.environ.get("LIT_ALIGN_DEBUG"):
            raise ArgumentError(None, message) from ex  # a parser inside another one leaves the exit to that one
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        help_line = f"{_nearest_option(parser, message)}\n{prog} --help lists the options."
        print(f"{prog}: {missing_extra(message) or explain_parsing(message) + help_line}", file=sys.stderr)
        sys.exit(2)


def _nearest_option(parser: ArgumentParser, message: str) -> str:
    unknown = re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message)
    options = [option.removeprefix("--") for option in parser._option_string_actions]
    nearest = difflib.get_close_matches(unknown[1], options, n=1) if unknown else []
    return f". Do you mean --{nearest[0]}?" if nearest else ""


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
    kind: Any = command  # jsonargparse types no dict of functions
    made = auto_cli(kind, args=words, as_positional=False, return_instance=True, parser_class=ShortErrors, prog=prog)
    if dataclasses.is_dataclass(made):
        made.run()  # type: ignore[union-attr]


def add_command(parser: ArgumentParser, command: Callable[..., Any]) -> None:
    """Add the parameters of a function, or the fields of a dataclass, as options."""
    if isinstance(command, type):
        parser.add_class_arguments(command, as_group=False, as_positional=False)
    else:
        parser.add_function_arguments(command, as_group=False, as_positional=False)


def spell_flags(command: Callable[..., Any], words: list[str]) -> list[str]:
    """`--flag` alone as `--flag=true`, for the command's boolean options."""
    flags = {f"--{name}" for name, kind in get_type_hints(command).items() if kind is bool}
    following = [*words[1:], ""]
    bare = [
        word in flags and after.lower() not in ("true", "false") for word, after in zip(words, following, strict=True)
    ]
    return [f"{word}=true" if alone else word for word, alone in zip(words, bare, strict=True)]
