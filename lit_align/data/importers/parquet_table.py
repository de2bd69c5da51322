"""Parquet tables: their columns, read from the footer, and their rows, read a few at a time."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.common.passing_faults import call_patiently
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.storage import open_binary
from lit_align.user_errors import UserValueError

BATCH_ROWS = 32  # in memory at a time
BUFFER_BYTES = 1 << 20  # of a column of a local file, read at a time
FOOTER_END = 8  # bytes behind the footer: its size, and PAR1
AHEAD_BYTES = 256 << 20  # of a row group on the network that is read with one request for each column


class Column(NamedTuple):
    """A column of a Parquet file."""

    name: str
    kind: str  # see `kind_of`
    type: str  # Arrow's
    small: bool  # can be stored as JSON


class ParquetTable(NamedTuple):
    """A Parquet file, described by its footer."""

    path: str  # or URL
    bytes: int
    groups: tuple[int, ...]  # rows of each row group
    columns: tuple[Column, ...]
    footer: str  # digest of the footer, which tells files of equal size apart
    read: tuple[str, ...] = ()  # columns to read

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def rows(self) -> int:
        return sum(self.groups)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "rows": self.rows, "footer": self.footer}

    def ranges(self, begin: int, end: int, row: int) -> "list[RowRange]":
        """Row ranges of rows `begin` to `end` of the file, whose first row is `row` in the source."""
        found, at = [], 0
        for group, count in enumerate(self.groups):
            first, last = max(begin - at, 0), min(end - at, count)
            if first < last:
                found.append(RowRange(self, group, first, last, at + first, row + at + first))
            at += count
        return found

    def kinds(self) -> dict[str, str]:
        """What each column holds, by its type."""
        return {column.name: column.kind for column in self.columns}

    def reading(self, used: Iterable[str]) -> "ParquetTable":
        """The table with the columns to read: those used, and small ones."""
        needed = dict.fromkeys(used)
        return self._replace(
            read=(*needed, *(one.name for one in self.columns if one.small and one.name not in needed))
        )


class RowRange(NamedTuple):
    """Rows of one row group."""

    table: ParquetTable
    group: int
    begin: int  # in the row group
    end: int
    row_in_file: int  # of the first row
    row: int  # of the first row, in the source


class ParquetRow(NamedTuple):
    """A row and where it is."""

    row: int  # in the source
    row_in_file: int
    cells: dict[str, Any]


def open_parquet(path: str) -> ParquetTable:
    """Read a Parquet file's footer.

    Raises:
        FileNotFoundError: if the file is missing.
        UserValueError: if it is not a Parquet file, or two columns share a name.
    """
    return call_patiently(lambda: _open(path), path) if is_url(path) else _open(path)


def _open(path: str) -> ParquetTable:
    try:
        with open_binary(path) as file:
            parquet = pq.ParquetFile(file)
            metadata, schema = parquet.metadata, parquet.schema_arrow
            bytes_ = file.seek(0, 2)
            footer = _digest_end(file, metadata.serialized_size)
    except pa.ArrowException as error:
        raise unreadable(path, error) from error
    names = list(schema.names)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserValueError(
            f"table: {path}: column {twice} is there {names.count(twice)} times. Give each its own name."
        )
    groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    columns = [Column(one.name, kind_of(one.type), str(one.type), is_small(one)) for one in schema]
    return ParquetTable(path, bytes_, groups, tuple(columns), footer)


def _digest_end(file: IO[bytes], count: int) -> str:
    file.seek(-count - FOOTER_END, 2)
    return hashlib.sha256(file.read(count)).hexdigest()[:16]


def read_columns(table: ParquetTable, names: Sequence[str]) -> list[list[Any]]:
    """Read small columns of a whole file, each as a list."""

    def read() -> list[list[Any]]:
        with open_binary(table.path) as file:
            found = pq.ParquetFile(file, pre_buffer=is_url(table.path)).read(list(names), use_threads=False)
        return [plain(found[name].combine_chunks()).to_pylist() for name in names]

    return call_patiently(read, table.path) if is_url(table.path) else read()


def read_ranges(ranges: Iterable[RowRange]) -> Iterator[ParquetRow]:
    """Read rows, in order: each row group once, though several ranges lie in it."""
    for table, pieces in groupby(ranges, key=lambda piece: piece.table):
        try:
            yield from _read(table, _joined(pieces))
        except pa.ArrowException as error:
            raise unreadable(table.path, error) from error


def _joined(ranges: Iterable[RowRange]) -> Iterator[RowRange]:
    """Join neighbouring ranges of one row group."""
    last: RowRange | None = None
    for piece in ranges:
        if last is not None and last.group == piece.group and last.end == piece.begin:
            last = last._replace(end=piece.end)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _read(table: ParquetTable, ranges: Iterator[RowRange]) -> Iterator[ParquetRow]:
    """Read a local file page by page, and a remote one with one request for each column and row group.

    Writers make pages of up to 1024 rows, so a page may hold a whole row group; at most that is in memory.
    """
    remote = is_url(table.path)
    ahead = remote and table.bytes / max(len(table.groups), 1) < AHEAD_BYTES
    with open_binary(table.path) as file:
        parquet = pq.ParquetFile(file, pre_buffer=ahead, buffer_size=0 if ahead else BUFFER_BYTES)
        for piece in ranges:
            at = 0
            for batch in parquet.iter_batches(BATCH_ROWS, [piece.group], list(table.read), use_threads=False):
                begin, end = max(piece.begin - at, 0), min(piece.end - at, len(batch))
                for offset, cells in enumerate(_cells(batch.slice(begin, max(end - begin, 0))), at + begin):
                    after = offset - piece.begin
                    yield ParquetRow(piece.row + after, piece.row_in_file + after, cells)
                at += len(batch)
                if at >= piece.end:
                    break


def _cells(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    columns = [plain(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()


def plain(column: pa.Array) -> pa.Array:
    """Cut times of nanoseconds to microseconds, which Python can hold."""
    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return column.cast(pa.duration("us"), safe=False)
    return column.cast(pa.time64("us"), safe=False) if pa.types.is_time64(kind) and kind.unit == "ns" else column


def kind_of(kind: pa.DataType) -> str:
    """What a column of this type may hold: `image`, `text`, `list`, `number`, `empty` or `other`."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "image" if "bytes" in names else "other"
    if is_binary(kind):
        return "image"
    if is_text(kind):
        return "text"
    if pa.types.is_null(kind):
        return "empty"
    if "list" in str(kind).split("<")[0]:
        return "list"
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return "number" if any(is_number(kind) for is_number in numbers) else "other"


def is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes, in any of Arrow's layouts."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether values are text, in any of Arrow's layouts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_small(field: pa.Field) -> bool:
    """Whether a column can be stored as JSON: neither images nor embeddings nor a pandas index."""
    nested, binary = pa.types.is_nested(field.type), "binary" in str(field.type)
    return not (nested or binary or "." in field.name or field.name.startswith("__index_level_"))


def unreadable(path: str, error: Exception) -> UserValueError:
    """Error of a file that is not Parquet."""
    return UserValueError(
        f"{path} cannot be read as Parquet: {error}. Download it again, or leave it out; a file of some hundred "
        "bytes is a Git LFS pointer: run git lfs pull."
    )
