"""Expand paths and URLs that may hold braces, wildcards and `~`; what exists under its literal name is no pattern."""

import glob
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from braceexpand import braceexpand

from lit_align.common.paths import expand_home
from lit_align.data.shards.filesystems import PIPE, filesystem_of, is_url
from lit_align.data.shards.spooled import trust
from lit_align.data.shards.storage import ask, exists
from lit_align.user_errors import UserFileNotFoundError, UserValueError


def expand(patterns: str | Sequence[str], allow_pipe: bool = False, must_exist: bool = True) -> list[str]:
    """Expand braces (`{000..127}.tar`) and wildcards (`*.tar`) in paths and URLs; each pattern's matches are sorted.

    A path that exists is a path, whatever characters its name has, and so is a folder at the front of a pattern.

    Args:
        patterns: one or several; in `pipe:` commands only braces are expanded.
        allow_pipe: whether `pipe:` may run shell commands.
        must_exist: refuse missing local files; otherwise they are found missing when they are read.

    Raises:
        FileNotFoundError: if a wildcard matches nothing, or a local file must exist and does not.
        ValueError: for a `pipe:` that is not allowed, or a wildcard in a web address.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.startswith(PIPE):
            if not allow_pipe:
                raise UserValueError(
                    f"{pattern!r} would run a shell command. If you trust it, turn it on with data.allow_pipe true; "
                    "commands without that option read no pipes."
                )
            found += [trust(command) for command in _braces(pattern)]
        elif is_url(pattern) and not pattern.startswith("file:"):
            found += [path for url in _braces(pattern) for path in _match_url(url)]
        else:
            local = pattern.removeprefix("file://") if "://" in pattern else pattern.removeprefix("file:")
            found += _match_local(local, pattern, must_exist)
    return found


def _match_local(local: str, pattern: str, must_exist: bool) -> list[str]:
    path = expand_home(local)
    if Path(path).exists():
        return [path]
    front = _known_front(path)
    return [found for rest in _braces(path.removeprefix(front)) for found in _match(front, rest, pattern, must_exist)]


def _known_front(path: str) -> str:
    """The longest front of a path that is a folder, with its slash; empty if there is none."""
    folders = path.split("/")
    fronts = ("/".join(folders[:count]) + "/" for count in range(len(folders) - 1, 0, -1))
    return next((front for front in fronts if Path(front).is_dir()), "")


def _match(front: str, rest: str, pattern: str, must_exist: bool) -> list[str]:
    path = front + rest
    found = [path] if Path(path).exists() or not (must_exist or glob.has_magic(rest)) else []
    found = found or sorted(glob.glob(glob.escape(front) + rest) if glob.has_magic(rest) else [])
    if not found:
        raise UserFileNotFoundError(
            f"{pattern!r}: there is no file {path!r} (working directory {Path.cwd()}). "
            "Braces {000..127} and wildcards * are expanded."
        )
    return found


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError:  # unbalanced: a brace of a name
        return [pattern]


def _match_url(url: str) -> list[str]:
    web = url.startswith(("http:", "https:"))  # their `?` begins a query
    if not (("*" in url) if web else glob.has_magic(url)):
        return [url]
    if web:
        raise UserValueError(
            f"{url!r}: a web server cannot be asked for wildcards. Use braces {{000..127}}, or an index."
        )
    filesystem, path = filesystem_of(url)
    if exists(url):
        return [url]
    found = [filesystem.unstrip_protocol(match) for match in sorted(ask(url, partial(filesystem.glob, path)))]
    if not found:
        raise UserFileNotFoundError(f"{url!r} matches no file.")
    return found
