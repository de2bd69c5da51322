"""Index existing shards in the layout of `shards.layout`; the shards are not changed."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lit_align.common.progress import show_progress
from lit_align.data.importers.import_folder import MANIFEST, local_folder, locked_import_folder
from lit_align.data.importers.import_run import Summary
from lit_align.data.importers.rejects import REJECTS, Reject, clean, count_reasons, format_reasons, write_rejects
from lit_align.data.importers.worker_pool import shared, worker_count
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.index import INDEX, ShardEntry, index_shard, read_entry, read_rows, rows_path, write_index
from lit_align.data.shards.layout import SampleError
from lit_align.data.shards.listing import name_shards
from lit_align.data.shards.storage import size
from lit_align.user_errors import UserValueError


class IndexedShard(NamedTuple):
    """A shard with written index rows."""

    entry: ShardEntry
    rejects: list[Reject]


def index_shards(patterns: str | Sequence[str], output: str | None, workers: int | None) -> Summary:
    """Write the missing index rows of shards, then the index of all.

    Raises:
        FileNotFoundError: if a pattern matches nothing.
        ValueError: if the index needs a named folder, the folder has an index of other shards, or no sample is a pair.
        SampleError: if a shard is truncated or damaged.
    """
    named = [file.path for file in name_shards(patterns, tars_first=True)]
    shards = [path if is_url(path) else str(Path(path).absolute()) for path in named]
    folder = _index_folder(shards, output)
    elsewhere = None if output is None else str(folder)
    processes = worker_count(workers)
    with locked_import_folder(folder):
        _refuse_others(folder, [shard if elsewhere else Path(shard).name for shard in shards])
        todo = [number for number, shard in enumerate(shards) if not _is_indexed(shard, elsewhere)]
        processes = max(1, min(processes, len(todo)))
        with show_progress(len(shards), "indexing", "shard", done=len(shards) - len(todo)) as bar:
            broken = []
            for fault in shared(partial(_index, elsewhere), [shards[number] for number in todo], processes):
                bar.update()
                broken += [] if fault is None else [fault]
        if broken:
            raise SampleError(
                f"{len(broken)} of {len(shards)} shards have no index, the others are done: {' '.join(sorted(broken))}"
            )
        indexed = [_read_indexed(shard, elsewhere) for shard in shards]
        return _finish(folder, indexed, len(shards) - len(todo))


def _index_folder(shards: list[str], output: str | None) -> Path:
    """Find or make the folder of the index.

    Raises:
        ValueError: if `output` is needed, or two shards would share their index rows.
    """
    if output is None:
        folders = {str(Path(shard).parent) for shard in shards if not is_url(shard)}
        if len(folders) != 1 or any(map(is_url, shards)):
            where = f"in {len(folders)} folders" if folders else "on the network"
            raise UserValueError(f"output: the shards lie {where}; name a local folder for their index.")
        output = folders.pop()
        if not os.access(output, os.W_OK):
            raise UserValueError(f"output: {output} cannot be written to; name another folder for the shards' index.")
    names = Counter(rows_path(shard, output) for shard in shards)
    twice = [shard for shard in shards if names[rows_path(shard, output)] > 1]
    if twice:
        raise UserValueError(
            f"shards: {twice[0]} and {twice[1]} have one name. Give them an import and an --output each."
        )
    return local_folder(output)


def _refuse_others(folder: Path, names: list[str]) -> None:
    if (folder / MANIFEST).is_file():
        raise UserValueError(f"{folder} has {MANIFEST}: another import writes the index of these shards.")
    if (folder / INDEX).is_file():
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]
        lost = [entry["name"] for entry in listed if entry["name"] not in names]
        if lost:
            raise UserValueError(
                f"{folder / INDEX} names {len(lost)} shards that are not named now, first {lost[0]}. Name all of them, "
                "choose another --output, or delete the index first."
            )


def _index(folder: str | None, shard: str) -> str | None:
    """Write a shard's index rows, or return why not: a damaged shard does not stop the others."""
    try:
        index_shard(shard, folder)
    except SampleError as error:
        return str(error)
    return None


def _is_indexed(shard: str, folder: str | None) -> bool:
    """Whether index rows exist and the shard's size and time of change fit them; the shard is not read."""
    rows = Path(rows_path(shard, folder))
    entry = read_entry(shard, folder) if rows.is_file() else None
    if entry is None or size(shard) != entry.bytes:
        return False
    return is_url(shard) or Path(shard).stat().st_mtime <= rows.stat().st_mtime


def _read_indexed(shard: str, folder: str | None) -> IndexedShard:
    entry = read_entry(shard, folder)
    assert entry is not None, shard
    faults = read_rows(rows_path(shard, folder), ["key", "fault"]).to_pylist()
    rejects = []
    for row, sample in enumerate(faults):
        if sample["fault"] is not None:
            why = sample["fault"].removeprefix(f"shard {shard}, key {sample['key']}: ")
            location = f"{shard.rsplit('/', 1)[-1]}, sample {row}"
            reason = why.split(";")[0].split(". ")[0].rstrip(".")
            rejects.append(Reject(row, location, clean(sample["key"]), clean(reason), clean(why)))
    return IndexedShard(entry, rejects)


def _finish(folder: Path, indexed: list[IndexedShard], done_before: int) -> Summary:
    rejects = [reject for shard in indexed for reject in shard.rejects]
    reasons = count_reasons(rejects)
    write_rejects(folder, rejects)
    entries = [shard.entry for shard in indexed]
    pairs, ties = sum(entry.pairs for entry in entries), sum(entry.ties for entry in entries)
    if pairs + ties == 0:
        most = format_reasons(reasons) or "there is none"
        raise UserValueError(f"Not one sample is a pair: {most}. See {folder / REJECTS}.")
    write_index(str(folder), entries, {"import": {"source": "webdataset", "rejects": reasons}})
    return Summary(folder, len(indexed), done_before, pairs, ties, reasons)
