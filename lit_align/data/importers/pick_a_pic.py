"""Pick-a-Pic and sets with its columns: Parquet files, local or on the hub."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.common.progress import BRIEF, track
from lit_align.data.importers.source import Reject, Rejected, checked_image, label_of, new_pair, outcome
from lit_align.data.shards.storage import expand, is_url, open_binary
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import UserValueError

IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
PROMPTS = ("caption", "original_prompt")  # the first that is there
BATCH = 32  # rows in memory at a time
BUFFER = 1 << 20  # bytes of a column that are read from a local file at a time


class Table(NamedTuple):
    """A Parquet file, as its footer describes it."""

    path: str  # or URL
    bytes: int
    groups: tuple[int, ...]  # rows of each row group
    prompt: str  # the column
    more: tuple[str, ...]  # columns that are kept as JSON

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def rows(self) -> int:
        return sum(self.groups)


class Slice(NamedTuple):
    """Rows of one row group."""

    table: Table
    group: int
    begin: int  # in the row group
    end: int
    row_in_file: int  # of the first of them
    row: int  # in the source


@dataclass(frozen=True)
class PickAPicPart:
    """Rows of one or several files."""

    slices: tuple[Slice, ...]

    @property
    def remote(self) -> bool:
        return any(is_url(piece.table.path) for piece in self.slices)

    def outcomes(self) -> Iterator[NewPair | Reject]:
        for table, slices in groupby(self.slices, key=lambda piece: piece.table):
            try:
                yield from _read(table, slices)
            except pa.ArrowException as error:
                raise _unreadable(table.path, error) from error


def _read(table: Table, slices: Iterator[Slice]) -> Iterator[NewPair | Reject]:
    """A local file is read page by page, one on the network in one request for each column and row group.

    Writers make pages of up to 1024 rows, so a page may be all of a row group; never more than that is in memory.
    """
    remote = is_url(table.path)
    columns = [*IMAGES, *LABELS, table.prompt, *table.more]
    with open_binary(table.path) as file:
        parquet = pq.ParquetFile(file, pre_buffer=remote, buffer_size=0 if remote else BUFFER)
        for piece in slices:
            at = 0
            for batch in parquet.iter_batches(BATCH, [piece.group], columns, use_threads=False):
                begin, end = max(piece.begin - at, 0), min(piece.end - at, len(batch))
                for offset, cells in enumerate(batch.slice(begin, max(end - begin, 0)).to_pylist(), at + begin):
                    ahead = offset - piece.begin
                    place = f"{table.name}, row {piece.row_in_file + ahead}"
                    yield outcome(piece.row + ahead, place, partial(_pair, table, cells))
                at += len(batch)
                if at >= piece.end:
                    break


def _pair(table: Table, cells: dict[str, Any], key: str) -> NewPair:
    if cells.get("has_label") is False:
        raise Rejected("no label", "has_label is false")
    label_0 = label_of(*(cells[name] for name in LABELS))
    data = [cells[name]["bytes"] if isinstance(cells[name], dict) else cells[name] for name in IMAGES]
    images = checked_image(data[0]), checked_image(data[1])
    return new_pair(key, images, label_0, cells[table.prompt], {name: cells[name] for name in table.more})


@dataclass(frozen=True)
class PickAPic:
    """Rows of Parquet files, one after the other."""

    tables: tuple[Table, ...]
    name: str = "pick-a-pic"

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def bytes(self) -> int:
        return sum(table.bytes for table in self.tables)

    def about(self) -> dict[str, Any]:
        files = [{"name": table.name, "bytes": table.bytes, "rows": table.rows} for table in self.tables]
        return {"files": files, "options": {}}

    def part(self, begin: int, end: int) -> PickAPicPart:
        slices, row = [], 0
        for table in self.tables:
            row_in_file = 0
            for group, count in enumerate(table.groups):
                first, last = max(begin - row, 0), min(end - row, count)
                if first < last:
                    slices.append(Slice(table, group, first, last, row_in_file + first, row + first))
                row, row_in_file = row + count, row_in_file + count
        return PickAPicPart(tuple(slices))


def open_files(patterns: str | Sequence[str]) -> PickAPic:
    """The rows of Parquet files.

    Args:
        patterns: paths and URLs; braces and wildcards are expanded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is named twice, is no Parquet file or has not the columns.
    """
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not is_url(pattern) and Path(pattern).is_dir():
            raise UserValueError(
                f"files: {pattern} is a folder. Name the files in it: '{pattern.rstrip('/')}/*.parquet'"
            )
    paths = expand(patterns)
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UserValueError(f"files: {twice} is named twice. Name each file once.")
    with ThreadPoolExecutor(16) as pool:
        return PickAPic(tuple(track(pool.map(_open, paths), len(paths), "opening", "file", delay=BRIEF)))


def hub_files(repo: str, revision: str, pattern: str) -> str:
    """The address of files in a data set on the Hugging Face hub.

    Raises:
        ValueError: if `repo` is not the name of one.
    """
    if len([part for part in repo.split("/") if part]) != 2 or is_url(repo):
        raise UserValueError(f"repo: {repo!r} is not the name of a data set on the hub, which is OWNER/NAME.")
    return f"hf://datasets/{repo}@{quote(revision, safe='')}/{pattern}"


def _open(path: str) -> Table:
    try:
        with open_binary(path) as file:
            parquet = pq.ParquetFile(file)
            metadata, schema = parquet.metadata, parquet.schema_arrow
            bytes_ = file.seek(0, 2)
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error
    prompt = next((name for name in PROMPTS if name in schema.names), PROMPTS[0])
    needed = (*IMAGES, *LABELS, prompt)
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise UserValueError(
            f"{path}: column {', '.join(missing)} is missing; there are {', '.join(schema.names)}. "
            f"Pick-a-Pic's columns are {', '.join(needed)}; pairs in another form: lit-align import folder --help."
        )
    for name in needed:
        _check_type(path, schema.field(name))
    more = [field.name for field in schema if field.name not in needed and _is_small(field)]
    groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return Table(path, bytes_, groups, prompt, tuple(more))


def _check_type(path: str, field: pa.Field) -> None:
    kind = field.type
    if field.name in IMAGES:
        named = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        right = _is_binary(kind.field("bytes").type if "bytes" in named else kind)
        wanted = "encoded images: binary, or a struct with bytes"
    elif field.name in LABELS:
        right = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        wanted = "numbers"
    else:
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        right = pa.types.is_string(text) or pa.types.is_large_string(text)
        wanted = "text"
    if not right:
        raise UserValueError(f"{path}: column {field.name} is of type {kind}; it must hold {wanted}.")


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_small(field: pa.Field) -> bool:
    """No other images and no embeddings."""
    nested, binary = pa.types.is_nested(field.type), "binary" in str(field.type)
    return not (nested or binary or "." in field.name or field.name.startswith("__index_level_"))


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read as Parquet: {error}. Download it again, or leave it out; a file of some hundred "
        "bytes is a Git LFS pointer: run git lfs pull."
    )
