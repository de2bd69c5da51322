"""A manifest: a JSON file that says what a folder was begun with, so that a later command resumes with nothing else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from lit_align.common.files import write_text
from lit_align.user_errors import UserValueError

LISTED = 5  # differences in a message
LENGTH = 120  # characters of a value in a message


class Change(NamedTuple):
    """A value that differs."""

    name: str
    was: Any
    now: Any


def check_manifest(path: Path, manifest: Mapping[str, Any], made: Sequence[str]) -> None:
    """Write the manifest of a new folder, or compare it with the manifest that the folder was begun with.

    Several processes of one command may call this at once: all write equal bytes.

    Args:
        path: of the manifest, in the folder that it describes.
        manifest: values that JSON can hold.
        made: patterns of the files that the command makes; a folder without a manifest must hold none of them.

    Raises:
        UserValueError: if the folder was begun with other values, or holds files that no manifest describes.
    """
    folder = path.parent
    if path.is_file():
        refuse_differences(folder, read_manifest(path), json.loads(json.dumps(manifest)))
        return
    if foreign := next((file for pattern in made for file in sorted(folder.glob(pattern))), None):
        raise UserValueError(
            f"output: {folder} holds {foreign.relative_to(folder)}, but no {path.name} that says how it was made. "
            "Choose another folder."
        )
    write_manifest(path, manifest)


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest atomically."""
    write_text(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        UserValueError: if it is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
    except ValueError as error:
        raise UserValueError(
            f"output: {path} cannot be read: {error}. Choose another folder, or delete this one."
        ) from error
    return found


def refuse_differences(folder: Path, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume in a folder that was begun with other values.

    Raises:
        UserValueError: naming the first few differences.
    """
    if found := differences(began, now):
        raise UserValueError(
            f"output: {folder} was begun with other values: {in_words(found)}. Resume with the old values, choose "
            "another folder, or delete this one."
        )


def in_words(found: Sequence[str]) -> str:
    """Join differences for a message, which lists the first few."""
    more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return "; ".join([*found[:LISTED], *more])


def changes(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """List the values that differ; a missing one is None."""
    both = [Change(key, began.get(key), now.get(key)) for key in {**began, **now}]
    return [one for one in both if one.was != one.now]


def differences(began: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Describe where nested values differ, each as `name was OLD, is NEW`.

    Lists of objects that have a `name`, such as files, are compared by name.
    """
    found = []
    for key, old, new in changes(began, now):
        name = f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif _are_named(old) and _are_named(new):
            found += _differences_by_name(old, new, name)
        else:
            found.append(f"{name} was {_short(old)}, is {_short(new)}")
    return found


def _are_named(values: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(values, list) and all(isinstance(value, Mapping) and "name" in value for value in values)


def _differences_by_name(began: list[dict[str, Any]], now: list[dict[str, Any]], title: str) -> list[str]:
    old, new = ({value["name"]: value for value in values} for values in (began, now))
    found = [f"{title}: {name} is gone" for name in old if name not in new]
    found += [f"{title}: {name} is new" for name in new if name not in old]
    for name in old:
        found += differences(old[name], new[name], f"{title}: {name}: ") if name in new else []
    return found or [f"{title} are in another order"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= LENGTH:
        return text
    if isinstance(value, list):
        return f"{len(value)} with digest {hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    return f"{text[: LENGTH - 3]}..."
