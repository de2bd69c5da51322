"""Find shards by all that names them: tar files, patterns, folders, and the `index.json` of an import."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lit_align.common.passing_faults import describe
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.filesystems import PIPE, filesystem_of, is_url, join
from lit_align.data.shards.index import INDEX, read_index, rows_path
from lit_align.data.shards.patterns import expand
from lit_align.data.shards.storage import ask, exists
from lit_align.user_errors import UserFileNotFoundError, UserOSError, UserValueError

log = logging.getLogger(__name__)

COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
BEGUN = ("import.json", "generate.json")  # written before the first shard


class ShardFile(NamedTuple):
    """A tar file, and the file of its index rows."""

    path: str  # or URL
    rows: str | None  # None without an index
    listed_in: str | None = None  # the `index.json` that names the shard


def find_shards(patterns: str | Sequence[str], options: ReadOptions, must_exist: bool = True) -> list[ShardFile]:
    """Find shards as `name_shards`, and the index rows beside those that no `index.json` names.

    Raises:
        OSError: if it cannot be found out whether a shard has index rows.
    """
    files = name_shards(patterns, options.allow_pipe, must_exist)
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_with_rows, files))


def name_shards(
    patterns: str | Sequence[str], allow_pipe: bool = False, must_exist: bool = True, tars_first: bool = False
) -> list[ShardFile]:
    """List the shards of paths and URLs, with braces and wildcards, of folders, or of the `index.json` of an import.

    Args:
        patterns: one or several.
        allow_pipe: whether `pipe:` may run shell commands.
        must_exist: refuse missing local files; otherwise they are found missing when they are read.
        tars_first: of a folder take the tar files, not the `index.json`, which may name fewer.

    Raises:
        FileNotFoundError: if a pattern matches nothing.
        ValueError: if an index cannot be read, or a shard is named twice.
    """
    found = [file for path in expand(patterns, allow_pipe, must_exist) for file in _named(path, allow_pipe, tars_first)]
    counts = Counter(map(_place, found))
    twice = next((file.path for file in found if counts[_place(file)] > 1), None)
    if twice is not None:
        raise UserValueError(f"{twice} is named twice; its pairs would train twice as often. Name each shard once.")
    return found


def _place(file: ShardFile) -> str:
    return file.path if is_url(file.path) else os.path.realpath(file.path)


def _named(path: str, allow_pipe: bool, tars_first: bool) -> list[ShardFile]:
    if path.startswith(PIPE):
        return [ShardFile(path, None)]
    if path.endswith("/") if is_url(path) else Path(path).is_dir():
        _refuse_unfinished(path)
        tars = _tars(path)
        _name_compressed(path)
        if tars and (tars_first or not exists(join(path, INDEX))):
            return [ShardFile(tar, None) for tar in tars]
        return _indexed(join(path, INDEX), allow_pipe, tars)
    return _indexed(path, allow_pipe) if path.endswith(".json") else [ShardFile(path, None)]


def _refuse_unfinished(folder: str) -> None:
    for begun in BEGUN:
        if not is_url(folder) and (Path(folder) / begun).is_file() and not (Path(folder) / INDEX).is_file():
            raise UserValueError(
                f"{folder} holds {begun} and no {INDEX}: what writes its shards has not ended. Run the same command "
                "again to go on, or name the tar files that are there."
            )


def _tars(folder: str) -> list[str]:
    """The tar files of a folder; none of a folder on a web server, which cannot be listed."""
    if not is_url(folder):
        return sorted(map(str, Path(folder).glob("*.tar")))
    if folder.startswith(("http:", "https:")):
        return []
    filesystem, name = filesystem_of(folder)
    return [
        filesystem.unstrip_protocol(tar)
        for tar in sorted(ask(folder, lambda: filesystem.glob(f"{name.rstrip('/')}/*.tar")))
    ]


def _name_compressed(folder: str) -> None:
    """Count the compressed tar files of a local folder in the log: pairs are read at their places in a plain one."""
    if is_url(folder):
        return
    if found := sorted(path.name for path in Path(folder).iterdir() if path.name.endswith(COMPRESSED)):
        log.warning("%s: %d compressed tar files are left out, first %s. Unpack them.", folder, len(found), found[0])


def _indexed(path: str, allow_pipe: bool, tars: Sequence[str] = ()) -> list[ShardFile]:
    """The shards of an `index.json`; tar files of its folder that it does not name are counted in the log."""
    if not is_url(path) and not Path(path).is_file():
        raise UserFileNotFoundError(f"{Path(path).parent} holds no tar file and no {INDEX}.")
    listed = read_index(path)
    expand([shard for shard, _ in listed if shard.startswith(PIPE)], allow_pipe)  # refuses untrusted commands
    named = {shard for shard, _ in listed}
    if left := [tar for tar in tars if tar not in named]:
        log.warning(
            "%s names %d shards; %d other tar files of its folder are left out, first %s. Name *.tar to take all.",
            path,
            len(listed),
            len(left),
            left[0],
        )
    return [ShardFile(shard, rows, path) for shard, rows in listed]


def _with_rows(file: ShardFile) -> ShardFile:
    if file.rows is not None or file.path.startswith(PIPE):
        return file
    rows = rows_path(file.path)
    try:
        return file._replace(rows=rows if exists(rows) else None)
    except OSError as error:
        raise UserOSError(
            f"It cannot be found out whether {file.path} has an index, {rows}: {describe(error)}. Try again later. "
            "Where a server refuses what it does not have: lit-align import webdataset --shards ... --output FOLDER "
            "writes an index.json that is used instead."
        ) from error
