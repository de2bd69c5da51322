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
    """Read JSON, a list of rows or columns, or JSON lines, which some files named .json hold.

    Raises:
        UserValueError: if no row can be read; it names the line.
    """
    if suffix_of(path) == ".json" and (rows := _json_rows(path, text)) is not None:
        return [_line(f"entry {number}", cells) for number, cells in enumerate(rows)]
    lines = list(_json_lines(text))
    if lines and all(line.fault for line in lines):
        raise UserValueError(f"table: {path}, {lines[0].place}: {lines[0].fault}. No line of it can be read.")
    return lines


def _json_rows(path: str, text: str) -> list[Any] | None:
    """Rows of one JSON value; None for JSON lines."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        first = text.lstrip().split("\n", 1)[0]
        if first.startswith("{") and first.rstrip().rstrip(",").endswith("}"):
            return None
        raise UserValueError(f"table: {path}: {_json_fault(text, error)}.") from error
    if isinstance(value, list):
        return value
    named = [value[name] for name in ("rows", "data") if name in value] if isinstance(value, dict) else []
    lists = [one for one in named or value.values() if isinstance(one, list)] if isinstance(value, dict) else []
    if len(lists) == 1 and lists[0] and all(isinstance(one, dict) and "role" not in one for one in lists[0]):
        return lists[0]  # {"data": [...]}
    if isinstance(value, dict) and any(isinstance(one, str | int | float) for one in value.values()):
        return [value]
    raise UserValueError(
        f"table: {path} must hold a list of rows, [{{...}}, {{...}}], or a row in each line; it holds one object of "
        f"columns{': ' if isinstance(value, dict) else ''}{', '.join(value) if isinstance(value, dict) else ''}"[:400]
        + ". With pandas: to_json(path, orient='records')."
    )


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
