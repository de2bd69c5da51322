"""Import Pick-a-Pic, and other data with its columns: Parquet files, local or on the hub."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from lit_align.common.progress import BRIEF, track
from lit_align.data.importers.columns import HAS_LABEL, Found
from lit_align.data.importers.label_encodings import Values
from lit_align.data.importers.open_tables import refuse_repeated, with_layout
from lit_align.data.importers.parquet_table import ParquetTable, open_parquet
from lit_align.data.importers.table import Table
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.patterns import expand
from lit_align.user_errors import UserValueError

IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
PROMPTS = ("caption", "original_prompt")  # the first one found is used
WANTED = {
    **dict.fromkeys(IMAGES, ("image", "encoded images: binary, or a struct with bytes")),
    **dict.fromkeys(LABELS, ("number", "numbers")),
    **dict.fromkeys(PROMPTS, ("text", "text")),
}


def open_files(patterns: str | Sequence[str]) -> Table:
    """Read the footers and labels of Parquet files.

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
    refuse_repeated(paths)
    with ThreadPoolExecutor(16) as pool:
        tables = list(track(pool.map(open_parquet, paths), len(paths), "opening", "file", delay=BRIEF))
    prompts = {_check(table) for table in tables}
    if len(prompts) > 1:
        raise UserValueError(f"files: the prompt is in column {' or '.join(sorted(prompts))}. Import them separately.")
    has_label = HAS_LABEL if all(HAS_LABEL in table.kinds() for table in tables) else None
    found = Found(IMAGES, prompts.pop(), LABELS, has_label)
    return with_layout(tables, found, Values(), None, {}, "pick-a-pic")


def hub_files(repo: str, revision: str, pattern: str) -> str:
    """URL pattern of files in a dataset repository of the Hugging Face hub.

    Raises:
        ValueError: if `repo` is not of the form OWNER/NAME.
    """
    if len([part for part in repo.split("/") if part]) != 2 or is_url(repo):
        raise UserValueError(f"repo: {repo!r} is not the name of a dataset on the hub; write it as OWNER/NAME.")
    return f"hf://datasets/{repo}@{quote(revision, safe='')}/{pattern}"


def _check(table: ParquetTable) -> str:
    """Refuse a file without Pick-a-Pic's columns, and return the name of its prompt column."""
    kinds = table.kinds()
    prompt = next((name for name in PROMPTS if name in kinds), PROMPTS[0])
    needed = (*IMAGES, *LABELS, prompt)
    missing = [name for name in needed if name not in kinds]
    if missing:
        raise UserValueError(
            f"{table.path}: column {', '.join(missing)} is missing; there are {', '.join(kinds)}. "
            f"Pick-a-Pic's columns are {', '.join(needed)}; pairs in another form: lit-align import table --help."
        )
    for column in table.columns:
        if column.name in needed and column.kind != WANTED[column.name][0]:
            raise UserValueError(
                f"{table.path}: column {column.name} is of type {column.type}; it must hold {WANTED[column.name][1]}."
            )
    return prompt
