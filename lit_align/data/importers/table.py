"""Import a table (CSV, TSV or JSON lines) of image files, prompts and labels."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.data.importers.rejects import Reject, Rejected
from lit_align.data.importers.source import convert_row, load_image, new_pair, parse_label, shuffle_images
from lit_align.data.shards.filesystems import is_url, join, parent
from lit_align.data.shards.storage import open_binary
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import UserValueError

SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns: either two images and a label, or a chosen and a rejected image; and a prompt."""

    image_0: str = "image_0"
    image_1: str = "image_1"
    label: str = "label"
    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str = "prompt"


class Line(NamedTuple):
    """A row of a table."""

    number: int  # of its first line in the file, from 1
    cells: dict[str, Any]
    fault: str  # why the row cannot be read; empty if it can


@dataclass(frozen=True)
class TablePart:
    """Rows of a table that become one shard."""

    begin: int
    lines: tuple[Line, ...]
    table: str  # the file's name
    base: str  # folder to which image paths are relative
    columns: Columns
    ordered: bool  # has columns for the chosen and the rejected image, not a label

    @property
    def remote(self) -> bool:
        return is_url(self.base)

    def pairs_and_rejects(self) -> Iterator[NewPair | Reject]:
        for row, line in enumerate(self.lines, self.begin):
            yield convert_row(row, f"{self.table}, line {line.number}", partial(self._pair, line))

    def _pair(self, line: Line, key: str) -> NewPair:
        if line.fault:
            raise Rejected("row cannot be read", line.fault)
        names = self.columns
        used = (names.chosen, names.rejected) if self.ordered else (names.image_0, names.image_1)
        label_0 = 1.0 if self.ordered else parse_label(_stripped(line.cells.get(names.label)))
        files = [line.cells.get(name) for name in used]
        for name, file in zip(used, files, strict=True):
            if not isinstance(file, str) or not file.strip():
                raise Rejected("image missing", f"column {name} names no file")
        if self.ordered:
            label_0, files = shuffle_images(key, files)
        images = load_image(join(self.base, str(files[0]))), load_image(join(self.base, str(files[1])))
        skipped = (*used, names.prompt) if self.ordered else (*used, names.prompt, names.label)
        more = {name: value for name, value in line.cells.items() if name not in skipped}
        more |= {"image_0": files[0], "image_1": files[1]}
        return new_pair(key, images, label_0, line.cells.get(names.prompt), more)


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


@dataclass(frozen=True)
class Table:
    """All rows of a table."""

    path: str
    digest: str  # of the file
    columns: Columns
    ordered: bool
    lines: list[Line]
    name: str = "folder"
    bytes: None = None

    @property
    def rows(self) -> int:
        return len(self.lines)

    def describe(self) -> dict[str, Any]:
        return {"files": [{"name": Path(self.path).name, "sha256": self.digest}], "options": asdict(self.columns)}

    def part(self, begin: int, end: int) -> TablePart:
        lines, base = tuple(self.lines[begin:end]), parent(self.path)
        return TablePart(begin, lines, Path(self.path).name, base, self.columns, self.ordered)


def open_table(path: str, columns: Columns) -> Table:
    """Read a table.

    Args:
        path: file or URL that ends in .csv, .tsv or .jsonl.
        columns: names of its columns.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not a table or lacks columns.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (*SEPARATORS, ".jsonl"):
        raise UserValueError(f"table: {path} must end in {', '.join(SEPARATORS)} or .jsonl, which says how to read it.")
    with open_binary(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")  # spreadsheet programs write a byte order mark
        lines = list(_json_lines(text) if suffix == ".jsonl" else _cell_lines(text, SEPARATORS[suffix]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserValueError(f"table: {path} cannot be read: {error}. Save it again, as UTF-8.") from error
    names = dict.fromkeys(name for line in lines for name in line.cells)
    ordered = _is_ordered(path, list(names), columns)
    return Table(path, hashlib.sha256(data).hexdigest(), columns, ordered, lines)


def _json_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                cells = json.loads(line)
            except ValueError as error:
                yield Line(number, {}, str(error))
                continue
            right = isinstance(cells, dict)
            yield Line(number, cells if right else {}, "" if right else "it is no JSON object")


def _cell_lines(text: str, separator: str) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header = next(reader, [])
    number = reader.line_num + 1
    for cells in reader:
        if len(cells) == len(header):
            yield Line(number, dict(zip(header, cells, strict=True)), "")
        elif cells:
            yield Line(number, {}, f"it has {len(cells)} cells, and the header {len(header)}")
        number = reader.line_num + 1


def _is_ordered(path: str, names: list[str], columns: Columns) -> bool:
    labelled = [columns.image_0, columns.image_1, columns.label, columns.prompt]
    ordered = [columns.chosen, columns.rejected, columns.prompt]
    complete = [all(name in names for name in wanted) for wanted in (labelled, ordered)]
    if sum(complete) != 1:
        has = "both" if all(complete) else "neither"
        raise UserValueError(
            f"table: {path} must have columns {', '.join(labelled)}, or else {', '.join(ordered)}, and has {has}; "
            f"it has {', '.join(names) or 'no column'}. Options such as --prompt_column say what they are called."
        )
    return complete[1]
