"""Import Pick-a-Pic, and other data with its columns: Parquet files, local or on the hub."""

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
from lit_align.data.importers.rejects import Reject, Rejected
from lit_align.data.importers.source import check_image, convert_row, new_pair, parse_labels
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.patterns import expand
from lit_align.data.shards.storage import open_binary
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import UserValueError

IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
PROMPTS = ("caption", "original_prompt")  # the first one found is used
BATCH_ROWS = 32  # in memory at a time
BUFFER_BYTES = 1 << 20  # of a column of a local file, read at a time


class ParquetTable(NamedTuple):
    """A Parquet file, described by its footer."""

    path: str  # or URL
    bytes: int
    groups: tuple[int, ...]  # rows of each row group
    prompt: str  # name of the column
    more: tuple[str, ...]  # further columns, stored as JSON

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def rows(self) -> int:
        return sum(self.groups)


class RowRange(NamedTuple):
    """Rows of one row group."""

    table: ParquetTable
    group: int
    begin: int  # in the row group
    end: int
    row_in_file: int  # of the first row
    row: int  # of the first row, in the source


@dataclass(frozen=True)
class PickAPicPart:
    """Rows of one or several files that become one shard."""

    ranges: tuple[RowRange, ...]

    @property
    def remote(self) -> bool:
        return any(is_url(piece.table.path) for piece in self.ranges)

    def pairs_and_rejects(self) -> Iterator[NewPair | Reject]:
        for table, ranges in groupby(self.ranges, key=lambda piece: piece.table):
            try:
                yield from _read(table, ranges)
            except pa.ArrowException as error:
                raise _unreadable(table.path, error) from error


def _read(table: ParquetTable, ranges: Iterator[RowRange]) -> Iterator[NewPair | Reject]:
    """Read a local file page by page, and a remote one with one request for each column and row group.

    Writers make pages of up to 1024 rows, so a page may hold a whole row group; at most that is in memory.
    """
    remote = is_url(table.path)
    columns = [*IMAGES, *LABELS, table.prompt, *table.more]
    with open_binary(table.path) as file:
        parquet = pq.ParquetFile(file, pre_buffer=remote, buffer_size=0 if remote else BUFFER_BYTES)
        for piece in ranges:
            at = 0
            for batch in parquet.iter_batches(BATCH_ROWS, [piece.group], columns, use_threads=False):
                begin, end = max(piece.begin - at, 0), min(piece.end - at, len(batch))
                for offset, cells in enumerate(batch.slice(begin, max(end - begin, 0)).to_pylist(), at + begin):
                    ahead = offset - piece.begin
                    location = f"{table.name}, row {piece.row_in_file + ahead}"
                    yield convert_row(piece.row + ahead, location, partial(_pair, table, cells))
                at += len(batch)
                if at >= piece.end:
                    break


def _pair(table: ParquetTable, cells: dict[str, Any], key: str) -> NewPair:
    if cells.get("has_label") is False:
        raise Rejected("no label", "has_label is false")
    label_0 = parse_labels(*(cells[name] for name in LABELS))
    data = [cells[name]["bytes"] if isinstance(cells[name], dict) else cells[name] for name in IMAGES]
    images = check_image(data[0]), check_image(data[1])
    return new_pair(key, images, label_0, cells[table.prompt], {name: cells[name] for name in table.more})


@dataclass(frozen=True)
class PickAPic:
    """Rows of Parquet files, file by file."""

    tables: tuple[ParquetTable, ...]
    name: str = "pick-a-pic"

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def bytes(self) -> int:
        return sum(table.bytes for table in self.tables)

    def describe(self) -> dict[str, Any]:
        files = [{"name": table.name, "bytes": table.bytes, "rows": table.rows} for table in self.tables]
        return {"files": files, "options": {}}

    def part(self, begin: int, end: int) -> PickAPicPart:
        ranges, row = [], 0
        for table in self.tables:
            row_in_file = 0
            for group, count in enumerate(table.groups):
                first, last = max(begin - row, 0), min(end - row, count)
                if first < last:
                    ranges.append(RowRange(table, group, first, last, row_in_file + first, row + first))
                row, row_in_file = row + count, row_in_file + count
        return PickAPicPart(tuple(ranges))


def open_files(patterns: str | Sequence[str]) -> PickAPic:
    """Read the footers of Parquet files.

    Args:
        patterns: paths and URLs; braces and wildcards are expanded.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is named twice, is not a Parquet file or lacks a column.
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
    """URL pattern of files in a dataset repository of the Hugging Face hub.

    Raises:
        ValueError: if `repo` is not of the form OWNER/NAME.
    """
    if len([part for part in repo.split("/") if part]) != 2 or is_url(repo):
        raise UserValueError(f"repo: {repo!r} is not the name of a dataset on the hub; write it as OWNER/NAME.")
    return f"hf://datasets/{repo}@{quote(revision, safe='')}/{pattern}"


def _open(path: str) -> ParquetTable:
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
    return ParquetTable(path, bytes_, groups, prompt, tuple(more))


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
    """Whether a column can be stored as JSON: neither images nor embeddings nor a pandas index."""
    nested, binary = pa.types.is_nested(field.type), "binary" in str(field.type)
    return not (nested or binary or "." in field.name or field.name.startswith("__index_level_"))


def _unreadable(path: str, error: Exception) -> UserValueError:
    return UserValueError(
        f"{path} cannot be read as Parquet: {error}. Download it again, or leave it out; a file of some hundred "
        "bytes is a Git LFS pointer: run git lfs pull."
    )
