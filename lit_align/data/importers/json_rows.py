"""Rows of JSON and of JSON lines; a message about a fault names its line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.data.shards.filesystems import is_url
from lit_align.user_errors import UserValueError

JSON = (".json", ".jsonl", ".ndjson")


class Line(NamedTuple):
    """A row of a table."""

    place: str  # `line 3` or, in a JSON file, `entry 2`
    cells: dict[str, Any]
    fault: str  # why the row cannot be read; empty if it can


def suffix_of(path: str) -> str:
    """Suffix that says how to read a table, in small letters; `.gz` is passed over."""
    name = path.split("?")[0] if is_url(path) else path
    return Path(name.lower().removesuffix(".gz")).suffix


def read_json_rows(path: str, text: str) -> list[Line]:
    """Read a JSON list of objects, or JSON lines, which some files named .json hold.

    Raises:
        UserValueError: if no row can be read; it names the line.
    """
    if text.lstrip()[:1] == "[" and suffix_of(path) == ".json":
        return _json_list(path, text)
    lines = list(_json_lines(text))
    if lines and all(line.fault for line in lines):
        if suffix_of(path) == ".json":
            return _json_list(path, text)
        raise UserValueError(f"table: {path}, {lines[0].place}: {lines[0].fault}. No line of it can be read.")
    return lines


def _json_list(path: str, text: str) -> list[Line]:
    try:
        entries = json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        raise UserValueError(f"table: {path}: {_json_fault(text, error)}.") from error
    if isinstance(entries, dict):
        lists = [value for value in entries.values() if isinstance(value, list)]
        entries = lists[0] if len(lists) == 1 and all(isinstance(one, dict) for one in lists[0]) else entries
    if not isinstance(entries, list):
        raise UserValueError(
            f"table: {path} must hold a list of rows, [{{...}}, {{...}}], or a row in each line; it holds an object "
            f"with {', '.join(map(str, entries))}"[:400]
            + "."
        )
    return [_line(f"entry {number}", cells) for number, cells in enumerate(entries)]


def _json_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _line(f"line {number}", json.loads(line, object_pairs_hook=_object))
            except ValueError as error:
                yield Line(f"line {number}", {}, _json_fault(line, error))


def _line(place: str, cells: Any) -> Line:
    if not isinstance(cells, dict):
        return Line(place, {}, "it is no JSON object")
    if set(cells) == {"row_idx", "row", "truncated_cells"} and isinstance(cells["row"], dict):  # of the hub's viewer
        cells = cells["row"]
    return Line(place, cells, "")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the object {json.dumps(found)[:80]} has {twice} {names.count(twice)} times")
    return found


def _json_fault(text: str, error: ValueError) -> str:
    """Say what is wrong with JSON, where the parser says only what it expected."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    line = f"line {error.lineno}, " if "\n" in text.strip() else ""
    where = f"{line}character {error.colno}"
    if error.msg == "Extra data" and after.startswith(","):
        return f"{where}: a comma follows the object; JSON lines have none between them"
    if (before.endswith(",") and after[:1] in ("}", "]", "")) or (
        after[:1] == "," and after[1:].lstrip()[:1] in ("}", "]")
    ):
        return f"{where}: a comma stands before {after.lstrip(',').strip()[:1] or 'the end'}, where JSON allows none"
    if after.startswith("'"):
        return f"{where}: JSON needs double quotes"
    return f"{where}: {error.msg}"
