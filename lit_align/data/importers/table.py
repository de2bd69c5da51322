"""Import tables with named columns: CSV, TSV, JSON, JSON lines and Parquet, local, at an address or on the hub."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

from lit_align.common.decode_ahead import decode_ahead
from lit_align.common.passing_faults import StillFailingError
from lit_align.data.importers.cells import image_name, is_remote, load_cell, prompt_of
from lit_align.data.importers.columns import Found
from lit_align.data.importers.label_encodings import Encoding, canonical
from lit_align.data.importers.parquet_table import ParquetTable, RowRange, read_ranges
from lit_align.data.importers.rejects import Reject, Rejected
from lit_align.data.importers.source import convert_row, new_pair, shuffle_images
from lit_align.data.importers.text_tables import Line, TextTable
from lit_align.data.shards.filesystems import is_url, parent
from lit_align.data.shards.writer import NewPair

AnyTable = TextTable | ParquetTable
DOWNLOADS = 4  # images on the network that a worker reads at a time
ROWS_AHEAD = 16  # whose images are read while earlier rows are written


@dataclass(frozen=True)
class Layout:
    """How a row becomes a pair."""

    found: Found
    encoding: Encoding | None  # None where the first image is the chosen one
    images: str | None = None  # folder or URL of the images; None is the table's
    leave_out: bool = False  # rows whose image the network does not deliver at any attempt

    def pair(self, row: "Row", key: str) -> NewPair:
        """Make a pair of a row's cells.

        Raises:
            Rejected: if the row is not a pair.
        """
        if row.fault:
            raise Rejected("row cannot be read", row.fault)
        found, cells, label_0 = self.found, row.cells, 1.0
        if found.has_label is not None and canonical(cells.get(found.has_label)) in ("false", "0"):
            raise Rejected("no label", f"{found.has_label} is false")
        if self.encoding is not None:
            label_0 = self.encoding.label_0([cells.get(name) for name in found.labels])
        two: list[Any] = [(name, cells.get(name)) for name in found.images]
        for name, value in two:
            if value is None or (isinstance(value, str) and not value.strip()):
                raise Rejected("image missing", f"column {name} names no file")
        if found.ordered:
            label_0, two = shuffle_images(key, two)
        prompt = prompt_of(cells.get(found.prompt))
        try:
            images = [load_cell(name, value, self.images or row.base) for name, value in two]
        except StillFailingError as error:
            if self.leave_out:
                raise Rejected("image not delivered", str(error)) from error
            raise
        more = {name: value for name, value in cells.items() if name not in found.used}
        if self.encoding is not None and not self.encoding.plain:
            more |= {name: cells.get(name) for name in found.labels}
        named = [image_name(value) for _, value in two]
        more |= {f"image_{i}": name for i, name in enumerate(named) if name is not None}
        return new_pair(key, (images[0], images[1]), label_0, prompt, more)


class LineRange(NamedTuple):
    """Rows of a text table."""

    table: str  # path
    lines: tuple[Line, ...]
    row: int  # of the first line, in the source


class Row(NamedTuple):
    """A row of any table."""

    number: int  # in the source
    place: str  # in its file
    cells: dict[str, Any]
    fault: str  # why it cannot be read; empty if it can
    base: str  # folder or URL of its table
    table: str  # name of its table


@dataclass(frozen=True)
class TablePart:
    """Rows of one or several tables that become one shard."""

    ranges: tuple[LineRange | RowRange, ...]
    layout: Layout

    @property
    def remote(self) -> bool:
        """Whether the table itself is on the network; an image there is asked for patiently by itself."""
        return any(isinstance(piece, RowRange) and is_url(piece.table.path) for piece in self.ranges)

    def pairs_and_rejects(self) -> Iterator[NewPair | Reject]:
        rows = self._rows()
        first = next(rows, None)
        if first is None:
            return
        rows = chain([first], rows)
        base = self.layout.images or first.base
        if any(is_remote(first.cells.get(name), base) for name in self.layout.found.images):
            for some in decode_ahead(self._convert, rows, ROWS_AHEAD, DOWNLOADS):
                yield from some
        else:
            yield from map(self._convert, rows)

    def _rows(self) -> Iterator[Row]:
        for path, pieces in groupby(self.ranges, key=_path):
            about = parent(path), path.rsplit("/", 1)[-1]
            several = list(pieces)
            for row in read_ranges(one for one in several if isinstance(one, RowRange)):
                yield Row(row.row, f"row {row.row_in_file}", row.cells, "", *about)
            for piece in several:
                if isinstance(piece, LineRange):
                    for number, line in enumerate(piece.lines, piece.row):
                        yield Row(number, line.place, line.cells, line.fault, *about)

    def _convert(self, row: Row) -> NewPair | Reject:
        return convert_row(row.number, f"{row.table}, {row.place}", partial(self.layout.pair, row))


def _path(piece: LineRange | RowRange) -> str:
    return piece.table if isinstance(piece, LineRange) else piece.table.path


@dataclass(frozen=True)
class Table:
    """All rows of one or several tables, file by file."""

    tables: tuple[AnyTable, ...]
    layout: Layout
    options: dict[str, Any]  # what decides the pairs beside the files
    name: str = "table"
    labels: str = ""  # digest of all labels, in their order

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def bytes(self) -> int | None:
        """Size of the tables, if their images are in them."""
        inside = all(
            isinstance(table, ParquetTable) and all(table.kinds()[name] == "image" for name in self.layout.found.images)
            for table in self.tables
        )
        return sum(table.bytes for table in self.tables if isinstance(table, ParquetTable)) if inside else None

    @property
    def starts(self) -> list[int]:
        """Rows from which reading can begin without reading what is before."""
        found, row = [], 0
        for table in self.tables:
            groups = table.groups if isinstance(table, ParquetTable) else (1,) * table.rows
            for count in groups:
                found.append(row)
                row += count
        return found

    def describe(self) -> dict[str, Any]:
        labels = {"labels": self.labels} if self.labels else {}
        return {"files": [table.describe() for table in self.tables], "options": self.options, **labels}

    def part(self, begin: int, end: int) -> TablePart:
        ranges: list[LineRange | RowRange] = []
        row = 0
        for table in self.tables:
            if isinstance(table, TextTable):
                first, last = max(begin - row, 0), min(end - row, table.rows)
                if first < last:
                    ranges.append(LineRange(table.path, tuple(table.lines[first:last]), row + first))
            else:
                ranges += table.ranges(begin - row, end - row, row)
            row += table.rows
        return TablePart(tuple(ranges), self.layout)
