"""Tables of text, in memory: CSV and TSV cells, and JSON by `json_rows`; a message about a fault names its line."""

import csv
import gzip
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_align.common.passing_faults import call_patiently
from lit_align.data.importers.json_rows import JSON, Line, read_json_rows, suffix_of
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.storage import open_binary
from lit_align.user_errors import UserValueError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # with which spreadsheet programs save "Unicode text"


@dataclass(frozen=True)
class TextTable:
    """A table whose rows are in memory."""

    path: str
    digest: str  # of the file
    lines: list[Line]

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def rows(self) -> int:
        return len(self.lines)

    def describe(self) -> dict[str, Any]:
        return {"name": Path(self.path).name, "sha256": self.digest}

    def kinds(self) -> dict[str, str]:
        """What each column holds, by its first value."""
        found: dict[str, str] = {}
        for line in self.lines:
            for name, value in line.cells.items():
                if found.get(name, "empty") == "empty":
                    found[name] = _kind(value)
        return found


def _kind(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return "number"
    return {str: "text", list: "list", dict: "image", type(None): "empty"}.get(type(value), "other")


def read_text_table(path: str) -> TextTable:
    """Read a CSV, TSV, JSON or JSON lines file, also gzipped.

    Raises:
        FileNotFoundError: if the file is missing.
        UserValueError: if it is not such a table; it names the line.
    """
    data = call_patiently(lambda: _read(path), path) if is_url(path) else _read(path)
    content = _unpack(path, data)
    text = _decode(path, content)
    suffix = suffix_of(path)
    lines = read_json_rows(path, text) if suffix in JSON else _cell_lines(path, text, SEPARATORS[suffix])
    return TextTable(path, hashlib.sha256(data).hexdigest(), lines)


def _read(path: str) -> bytes:
    with open_binary(path) as file:
        return file.read()


def _unpack(path: str, data: bytes) -> bytes:
    if data.startswith(b"version https://git-lfs"):
        raise UserValueError(f"table: {path} is a Git LFS pointer, not the table. Run git lfs pull.")
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, ValueError) as error:
        raise UserValueError(f"table: {path} cannot be unpacked: {error}. Download it again.") from error


def _decode(path: str, data: bytes) -> str:
    encoding = MARKS.get(data[:2], "utf-8-sig")  # spreadsheet programs write a byte order mark
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserValueError(
            f"table: {path}, line {line}: byte {data[error.start]:#04x} is not UTF-8. Save the table again, as UTF-8."
        ) from error


def _cell_lines(path: str, text: str, separator: str) -> list[Line]:
    first = text.split("\n", 1)[0]
    if separator not in first and (other := next((one for one in ("\t", ";", "|", ",") if one in first), None)):
        print(f"{path}: its header is separated by {other!r}, not by {separator!r}, and so are its rows.")
        separator = other
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # a prompt may be long
    begin = 1
    lines: list[Line] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        _refuse_repeated(path, header)
        begin = reader.line_num + 1
        for cells in reader:
            if separator == "\t" and any("\n" in cell and cell.count("\t") >= len(header) - 1 for cell in cells):
                raise csv.Error("a quote opens in this row and takes in the next one")
            if cells:
                lines.append(_cells(f"line {begin}", header, cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise _quote_error(path, begin, reader.line_num, error) from error
    finally:
        csv.field_size_limit(limit)
    return lines


def _cells(place: str, header: list[str], cells: list[str]) -> Line:
    if len(cells) == len(header):
        return Line(place, dict(zip(header, cells, strict=True)), "")
    return Line(place, {}, f"it has {len(cells)} cells, and the header {len(header)}")


def _refuse_repeated(path: str, header: list[str]) -> None:
    for name in header:
        if name and header.count(name) > 1:
            cells = [str(number) for number, one in enumerate(header, 1) if one == name]
            raise UserValueError(
                f"table: {path}, line 1: column {name} is there {len(cells)} times, as cells {' and '.join(cells)}. "
                "Give each column its own name."
            )


def _quote_error(path: str, begin: int, end: int, error: csv.Error) -> UserValueError:
    if "unexpected end" in str(error):
        what = "a quote opens in this row and is never closed"
    elif "expected after" in str(error):
        what = f'a quote ends its cell in line {end}, and more text follows; inside a cell, write it twice: ""'
    else:
        what = str(error)
    return UserValueError(f"table: {path}, row that begins in line {begin}: {what}. Correct it and import again.")


def refuse_unreadable(path: str, lines: list[Line], share: float) -> None:
    """Refuse a table of which more than a share of the rows, and more than ten, cannot be read."""
    faulty = [line for line in lines if line.fault]
    if len(faulty) > max(10, share * len(lines)):
        raise UserValueError(
            f"table: {path}: {len(faulty):,} of {len(lines):,} rows cannot be read, first {faulty[0].place}: "
            f"{faulty[0].fault}. Correct the table and import again."
        )
