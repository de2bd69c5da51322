"""Prompts from a file: text, CSV, TSV or JSON lines."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, NamedTuple

from lit_align.data.storage import open_binary

DELIMITERS = {".csv": ",", ".tsv": "\t"}
COLUMN = "prompt"


class Prompts(NamedTuple):
    """The prompts of a file, each once, in the file's order."""

    unique: list[str]
    repeated: int  # rows left out because their prompt was there before
    blank: int  # rows left out because there is no prompt in them

    def digest(self) -> str:
        """16 hexadecimal digits of the prompts and their order, whatever kind of file they were in."""
        return hashlib.blake2b(json.dumps(self.unique).encode(), digest_size=8).hexdigest()


def read_prompts(path: str, column: str | None = None) -> Prompts:
    """The prompts of a file, without the spaces around them.

    Args:
        path: `.csv` and `.tsv` with a header, `.jsonl` with an object a line; any other is text, a prompt a line.
        column: name of the prompts in a table or in the objects, `prompt` if not given; text has none.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, has no such column, or holds no prompt.
    """
    kind = PurePosixPath(path.lower()).suffix
    if column is not None and kind not in (*DELIMITERS, ".jsonl"):
        raise ValueError(f"prompt_column is {column!r}, but {path} is text, a prompt a line: leave the option out.")
    with open_binary(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            found = [prompt.strip() for prompt in _rows(text, kind, column or COLUMN)]
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts: {path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"prompts: {path}, {error}") from error
    filled = [prompt for prompt in found if prompt]
    unique = list(dict.fromkeys(filled))
    if not unique:
        raise ValueError(f"prompts: there is no prompt in {path}, which has {len(found)} rows.")
    return Prompts(unique, len(filled) - len(unique), len(found) - len(filled))


def _rows(text: IO[str], kind: str, column: str) -> Iterator[str]:
    if kind in DELIMITERS:
        yield from _table(text, DELIMITERS[kind], column)
    elif kind == ".jsonl":
        yield from _objects(text, column)
    else:
        yield from text  # not `splitlines`, which also splits at characters that may be in a prompt


def _table(text: IO[str], delimiter: str, column: str) -> Iterator[str]:
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    if column not in (rows.fieldnames or ()):
        raise ValueError(f"header: no column {column!r}, only {_names(rows.fieldnames)}. Name it with --prompt_column.")
    for row in rows:
        if None in row:  # where the csv module puts what is left over
            raise ValueError(f"line {rows.line_num}: more fields than the header names. Quote prompts with commas.")
        yield row[column] or ""


def _objects(text: IO[str], column: str) -> Iterator[str]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            yield ""
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: no JSON: {error}.") from error
        if not isinstance(row, dict) or column not in row:
            found = _names(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"line {number}: no {column!r}, only {found}. Name it with --prompt_column.")
        value = row[column]
        if value is not None and not isinstance(value, str):
            raise ValueError(f"line {number}: {column!r} is {value!r}; it must be text.")
        yield value or ""


def _names(names: object) -> str:
    return ", ".join(map(repr, names or ())) or "nothing"  # type: ignore[call-overload]
