"""Prompts of files (text, tables, JSON, published benchmarks) and of bundled sets, and the seed of a prompt's noise."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.storage import open_binary
from lit_align.user_errors import UserValueError

SETS = Path(__file__).with_name("prompt_sets")  # bundled, one text file each
TABLES = {".csv": ",", ".tsv": "\t"}
KINDS = (*TABLES, ".json", ".jsonl", ".parquet")  # files of any other kind are text
COLUMN = "prompt"
PARTI_PROMPTS = ["Prompt", "Category", "Challenge", "Note"]  # header of its PartiPrompts.tsv, which quotes nothing
PICK_A_PIC = "caption"  # its column in Parquet files


class Prompts(NamedTuple):
    """The prompts of a file without duplicates, in the order of the file."""

    unique: list[str]
    repeated: int  # rows left out because an earlier row has their prompt
    blank: int  # rows left out because they have no prompt

    def digest(self) -> str:
        """16 hexadecimal digits of the prompts in their order, independent of the kind of file."""
        return hashlib.blake2b(json.dumps(self.unique).encode(), digest_size=8).hexdigest()

    def spread(self, limit: int) -> "Prompts":
        """Keep at most `limit` prompts, evenly spread, because benchmarks are ordered by kind."""
        count = min(limit, len(self.unique))
        return self._replace(unique=[self.unique[row * len(self.unique) // count] for row in range(count)])

    def __str__(self) -> str:
        return f"{len(self.unique)} prompts; left out: {self.repeated} repeated, {self.blank} blank"


def set_names() -> list[str]:
    """Names of the bundled sets."""
    return sorted(path.stem for path in SETS.glob("*.txt"))


def read_prompts(path: str, column: str | None = None) -> Prompts:
    """Read the prompts of a file and strip the spaces around them.

    Args:
        path: `.csv` or `.tsv` with a header, `.jsonl` with one object per line, `.json` with a list of objects or
            strings, `.parquet`, or text with one prompt per line. Or the name of a set, see `set_names`. Or shards of
            pairs: tar files, a folder of them, or the `index.json` of an import.
        column: name of the prompts in tables and objects; none: `prompt`, `Prompt` in a file with PartiPrompts' header,
            or `caption` in a Parquet file without `prompt`, as in Pick-a-Pic. Text and shards have no columns.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, has no such column, or holds no prompt.
    """
    if path in set_names():
        path = str(SETS / f"{path}.txt")
    kind = PurePosixPath(path.lower()).suffix
    of_pairs = _are_shards(path, kind)
    if column is not None and (of_pairs or kind not in KINDS):
        what = "shards of pairs" if of_pairs else "text"
        raise UserValueError(f"prompt_column is {column!r}, but {path} is {what} without columns: omit the option.")
    found = [prompt.strip() for prompt in (_of_shards(path) if of_pairs else _of_file(path, kind, column))]
    filled = [prompt for prompt in found if prompt]
    unique = list(dict.fromkeys(filled))
    if not unique:
        raise UserValueError(f"prompts: there is no prompt in {path}, which has {len(found)} rows.")
    return Prompts(unique, len(filled) - len(unique), len(found) - len(filled))


def prompt_seed(prompt: str, seed: int) -> int:
    """Seed of the noise of a prompt's image, 32 bits, independent of model, batch, process and file.

    Args:
        prompt: text that the model reads.
        seed: of the evaluation.
    """
    return int.from_bytes(hashlib.blake2b(json.dumps([prompt, seed]).encode(), digest_size=4).digest(), "big")


def _are_shards(path: str, kind: str) -> bool:
    if kind == ".json":
        from lit_align.data.shards.index import is_index  # imported here, so that --help imports no torch

        with open_binary(path) as file:
            return is_index(file.read())
    return kind == ".tar" or (not is_url(path) and Path(path).is_dir())


def _of_shards(path: str) -> Iterator[str]:
    """Prompts of all samples; broken ones have none."""
    # Imported here, so that --help imports no torch.
    from lit_align.data.read_options import ReadOptions
    from lit_align.data.shards.index import read_rows
    from lit_align.data.shards.kept_scans import labels_of
    from lit_align.data.shards.listing import find_shards

    for file in find_shards(path, ReadOptions()):
        rows = labels_of(file.path, sizes=False) if file.rows is None else read_rows(file.rows, ["prompt"])
        yield from rows["prompt"].to_pylist()


def _of_file(path: str, kind: str, column: str | None) -> list[str]:
    with open_binary(path) as file:
        try:
            return list(_rows(file, kind, column))
        except UnicodeDecodeError as error:
            raise UserValueError(f"prompts: {path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
        except (ValueError, csv.Error, pa.ArrowException) as error:
            raise UserValueError(f"prompts: {path}, {error}") from error


def _rows(file: IO[bytes], kind: str, column: str | None) -> Iterator[str]:
    if kind == ".parquet":
        yield from _parquet(file, column)
        return
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        if kind in TABLES:
            yield from _table(text, TABLES[kind], column)
        elif kind == ".jsonl":
            yield from _lines(text, column or COLUMN)
        elif kind == ".json":
            yield from _list(json.load(text), column)
        else:
            yield from text  # not `splitlines`, which splits also at characters that a prompt may contain


def _table(text: IO[str], delimiter: str, column: str | None) -> Iterator[str]:
    first = text.readline()
    text.seek(0)
    parti = first.rstrip("\r\n").split("\t") == PARTI_PROMPTS
    rows = csv.DictReader(
        text, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE if parti else csv.QUOTE_MINIMAL
    )
    column = column or (PARTI_PROMPTS[0] if parti else COLUMN)
    if column not in (rows.fieldnames or ()):
        raise UserValueError(
            f"header: no column {column!r}, only {_names(rows.fieldnames)}. Name it with --prompt_column."
        )
    for row in rows:
        if None in row:  # key of the csv module for surplus fields
            raise UserValueError(f"line {rows.line_num}: more fields than the header names. Quote prompts with commas.")
        yield row[column] or ""


def _lines(text: IO[str], column: str) -> Iterator[str]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            yield ""
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserValueError(f"line {number}: not JSON: {error}.") from error
        yield _value(row, column, f"line {number}")


def _list(values: Any, column: str | None) -> Iterator[str]:
    """Prompts of a list of objects (the benchmark of HPDv2) or of strings (the one of HPSv2)."""
    if not isinstance(values, list):
        raise UserValueError(f"it holds a {type(values).__name__}; a list of objects or of strings is needed.")
    for number, row in enumerate(values, 1):
        plain = isinstance(row, str) and column is None
        yield row if plain else _value(row, column or COLUMN, f"entry {number}")


def _value(row: Any, column: str, location: str) -> str:
    if not isinstance(row, dict) or column not in row:
        found = _names(row) if isinstance(row, dict) else type(row).__name__
        raise UserValueError(f"{location}: no {column!r}, only {found}. Name it with --prompt_column.")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UserValueError(f"{location}: {column!r} is {value!r}; it must be text.")
    return value or ""


def _parquet(file: IO[bytes], column: str | None) -> Iterator[str]:
    table = pq.ParquetFile(file)
    names = table.schema_arrow.names
    if column is None:
        known = [name for name in (COLUMN, PICK_A_PIC) if name in names]
        if len(known) == 2:
            raise UserValueError(f"it has columns {COLUMN!r} and {PICK_A_PIC!r}. Say which with --prompt_column.")
        column = known[0] if known else COLUMN
    if column not in names:
        raise UserValueError(f"no column {column!r}, only {_names(names)}. Name it with --prompt_column.")
    rows = (row for batch in table.iter_batches(columns=[column]) for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        yield _value(row, column, f"row {number}")


def _names(names: object) -> str:
    return ", ".join(map(repr, names or ())) or "nothing"  # type: ignore[call-overload]
