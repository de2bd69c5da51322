"""Open tables: find their files, their columns and what their labels mean, before anything is written."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_align.common.paths import expand_home
from lit_align.common.progress import BRIEF, track
from lit_align.data.importers.columns import Asked, Found, find_columns
from lit_align.data.importers.label_encodings import SHARE, Encoding, Values, canonical, find_encoding
from lit_align.data.importers.parquet_table import ParquetTable, open_parquet, read_columns
from lit_align.data.importers.table import AnyTable, Layout, Table
from lit_align.data.importers.text_tables import (
    JSON,
    SEPARATORS,
    TextTable,
    read_text_table,
    refuse_unreadable,
    suffix_of,
)
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.patterns import expand
from lit_align.user_errors import UserFileNotFoundError, UserValueError

SUFFIXES = (*SEPARATORS, *JSON, ".parquet")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of an image folder, as the hub's tools write it
ALIKE = 8  # equal labels of a column that nobody has named: more than that tell nothing of what they mean
SPLIT = re.compile("train|test|val|dev")  # parts of a data set that are not trained on together


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns: either two images and a label, or a chosen and a rejected image; and a prompt."""

    image_0: str = "image_0"
    image_1: str = "image_1"
    label: str = "label"
    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str = "prompt"


def open_table(path: str, columns: Columns) -> Table:
    """Read a text table whose columns are all named.

    Args:
        path: file or URL that ends in .csv, .tsv, .json or .jsonl.
        columns: names of its columns.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not a table or lacks columns.
    """
    if suffix_of(path) not in (*SEPARATORS, *JSON):
        raise UserValueError(
            f"table: {path} must end in {', '.join((*SEPARATORS, *JSON))}, which says how to read it. Other tables: "
            "lit-align import table --help."
        )
    table = read_text_table(path)
    refuse_unreadable(path, table.lines, SHARE)
    names = list(table.kinds())
    labelled = [columns.image_0, columns.image_1, columns.label, columns.prompt]
    ordered = [columns.chosen, columns.rejected, columns.prompt]
    complete = [all(name in names for name in wanted) for wanted in (labelled, ordered)]
    if sum(complete) != 1:
        has = "both" if all(complete) else "neither"
        raise UserValueError(
            f"table: {path} must have columns {', '.join(labelled)}, or else {', '.join(ordered)}, and has {has}; "
            f"it has {', '.join(names) or 'no column'}. Options such as --prompt_column say what they are called."
        )
    images = (columns.chosen, columns.rejected) if complete[1] else (columns.image_0, columns.image_1)
    found = Found(images, columns.prompt, () if complete[1] else (columns.label,))
    return with_layout([table], found, Values(), None, asdict(columns), "folder")


def open_tables(
    patterns: str | Sequence[str], asked: Asked, given: Values, images: str | None, leave_out: bool = False
) -> Table:
    """Read tables, find their columns and say which ones they are.

    Args:
        patterns: paths and URLs of files, braces and wildcards expanded, or a folder with a `metadata.jsonl`.
        asked: columns that the user names.
        given: meaning of label values that the user names.
        images: folder or URL to which image paths are relative; None is the folder of their table.
        leave_out: leave out rows whose image the network does not deliver at any attempt.

    Raises:
        FileNotFoundError: if a file is missing.
        UserValueError: if a file is no table, or its columns or labels are not known.
    """
    paths = _files(patterns)
    if images is not None and not is_url(images) and not Path(images).is_dir():
        raise UserFileNotFoundError(f"images: there is no folder {images}. Name the one that the images are in.")
    with ThreadPoolExecutor(16) as pool:
        tables = list(track(pool.map(_open, paths), len(paths), "opening", "file", delay=BRIEF))
    for table in tables:
        if isinstance(table, TextTable):
            refuse_unreadable(table.path, table.lines, SHARE)
    if not any(table.rows for table in tables):
        raise UserValueError(f"files: {', '.join(paths[:3])} has no rows.")
    kinds = _common_kinds([table for table in tables if table.rows])
    found = find_columns(paths[0], kinds, asked)
    if found.ordered and any(given):
        raise UserValueError(
            "label: --label_image_0, --label_image_1 and --label_tie are for the values of a label column, and the "
            f"preferred image is in column {found.images[0]}. Leave them out, or name --label_column."
        )
    options: dict[str, Any] = {"columns": list(found.used), "ordered": found.ordered}
    options |= {"labels": given._asdict()} if any(given) else {}
    source = with_layout(tables, found, given, images, options, "table")
    source = replace(source, layout=replace(source.layout, leave_out=leave_out))
    kept = [name for name, kind in kinds.items() if name not in found.used and kind in ("text", "number")]
    if source.layout.encoding is not None and source.layout.encoding.plain:
        print(f"Label: {source.layout.encoding.words}.")
    print(f"Columns: {found.in_words()}. Kept as JSON: {', '.join(kept) or 'none'}.")
    return source


def with_layout(
    tables: Sequence[AnyTable],
    found: Found,
    given: Values,
    images: str | None,
    options: dict[str, Any],
    name: str,
) -> Table:
    """Join tables of known columns, after a look at all their labels; say what unusual ones mean.

    Raises:
        UserValueError: if it is not known what the labels mean.
    """
    read = tuple(one.reading(found.used) if isinstance(one, ParquetTable) else one for one in tables)
    encoding: Encoding | None = None
    digest = ""
    if found.labels:
        counts, digest = _count_labels(read, found)
        all_alike = not found.named and len(counts) == 1 and counts.total() > ALIKE
        encoding = find_encoding(counts, found.labels, found.images, given, found.sure and not all_alike)
        if not encoding.plain:
            print(f"Label: {encoding.words}.")
    return Table(read, Layout(found, encoding, images), options, name, digest)


def _files(patterns: str | Sequence[str]) -> list[str]:
    """Paths of the tables.

    Raises:
        UserValueError: if a file is named twice, or its name does not say how to read it.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        folder = Path(expand_home(pattern))
        paths += _in_folder(folder) if not is_url(pattern) and folder.is_dir() else expand(pattern)
    refuse_repeated(paths)
    for path in paths:
        if suffix_of(path) not in SUFFIXES:
            raise UserValueError(f"files: {path} must end in {', '.join(SUFFIXES)}, which says how to read it.")
    return paths


def refuse_repeated(paths: Sequence[str]) -> None:
    """Refuse a file that is named twice.

    Raises:
        UserValueError: naming it.
    """
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise UserValueError(f"files: {twice} is named twice. Name each file once.")


def _in_folder(folder: Path) -> list[str]:
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    found = metadata or sorted(path for path in folder.iterdir() if suffix_of(str(path)) in SUFFIXES)
    splits = {match[0] for path in found if (match := SPLIT.match(path.name.lower()))}
    if len({suffix_of(str(path)) for path in found}) != 1 or len(splits) > 1:
        listed = ", ".join(path.name for path in found[:5]) or "no table"
        raise UserValueError(
            f"files: {folder} is a folder with {listed}. Name the files in it: '{str(folder).rstrip('/')}/*.parquet'"
        )
    return [str(path) for path in found]


def _open(path: str) -> AnyTable:
    return open_parquet(path) if suffix_of(path) == ".parquet" else read_text_table(path)


def _common_kinds(tables: Sequence[AnyTable]) -> dict[str, str]:
    """What each column that all tables have holds, by the first table that has a value."""
    kinds = [table.kinds() for table in tables]
    found: dict[str, str] = {}
    for name in kinds[0]:
        known = [one[name] for one in kinds if name in one]
        if len(known) == len(kinds):
            found[name] = next((kind for kind in known if kind != "empty"), "empty")
    return found


def _count_labels(tables: Sequence[AnyTable], found: Found) -> tuple[Counter[tuple[str, ...]], str]:
    """Rows of all tables by their labels, without those that lack one; and a digest of all labels in their order."""
    counts, digest = Counter[tuple[str, ...]](), hashlib.sha256()
    with ThreadPoolExecutor(16) as pool:
        read = pool.map(partial(_labels, found=found), tables)
        for rows in track(read, len(tables), "reading labels", "file", delay=BRIEF):
            counts.update(row for row in rows if row is not None)
            digest.update(repr(rows).encode())
    return counts, digest.hexdigest()[:16]


def _labels(table: AnyTable, found: Found) -> list[tuple[str, ...] | None]:
    """Labels of each row, None where it lacks one."""
    names = (*found.labels, *((found.has_label,) if found.has_label else ()))
    if isinstance(table, ParquetTable):
        columns: list[list[Any]] = read_columns(table, names)
    else:
        columns = [[line.cells.get(name) for line in table.lines if not line.fault] for name in names]
    rows = [tuple(map(canonical, values)) for values in zip(*columns, strict=True)]
    count = len(found.labels)
    return [None if "" in row[:count] or row[count:] in (("false",), ("0",)) else row[:count] for row in rows]
