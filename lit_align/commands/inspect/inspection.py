"""Inspection of shards: in threads, with a report and a contact sheet."""

import json
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from lit_align.commands.inspect.contact_sheet import Tile, draw_sheet, make_tile
from lit_align.commands.inspect.shard_report import ShardReport, ShardToInspect, inspect_shard, read_pairs
from lit_align.commands.inspect.summary import pairs_of, sample_pairs, summarise
from lit_align.commands.inspect.text_report import to_text
from lit_align.common.files import write_text
from lit_align.common.progress import show_progress, track
from lit_align.data.importers.worker_pool import worker_count
from lit_align.data.shards.filesystems import join, parent
from lit_align.data.shards.index import ShardEntry, rows_path
from lit_align.data.shards.listing import name_shards
from lit_align.data.shards.storage import open_binary, size
from lit_align.user_errors import UserValueError


def inspect_shards(shards: str | list[str], output: Path, sheet_pairs: int, seed: int, workers: int | None) -> None:
    """Inspect shards and write the report; arguments and errors are those of `inspect`."""
    workers = worker_count(workers)
    if sheet_pairs < 0:
        raise UserValueError(f"sheet_pairs is {sheet_pairs}; it must be 0 or more.")
    reports = _inspect_all(shards_to_inspect(shards), seed, workers)
    pairs = pairs_of(reports)
    found = summarise(reports, pairs, lambda locations: [pair.prompt for pair in read_pairs(reports, locations)])
    write_text(output / "inspect.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    saved = f"Saved as {output / 'inspect.json'}"
    locations = sample_pairs(pairs, sheet_pairs)
    if locations:
        title = f"{len(locations):,} of {found['pairs'] + found['ties']:,} pairs, seed {seed}"
        unknown = draw_sheet(_tiles(reports, locations), title, output / "inspect.png")
        saved += f", the contact sheet as {output / 'inspect.png'}{unknown and f'. {unknown}'}"
    print(f"{to_text(found)}\n{saved}")
    if any(found["faults"].values()):
        raise SystemExit(1)


def shards_to_inspect(patterns: str | Sequence[str]) -> list[ShardToInspect]:
    """List the shards, with their index files.

    Raises:
        FileNotFoundError: if there is no such shard.
        ValueError: if an `index.json` was not written by lit-align.
    """
    files = name_shards(patterns)
    entries = {path: _entries(path) for path in {file.listed_in for file in files} if path is not None}
    return [
        ShardToInspect(
            number,
            file.path,
            file.rows or rows_path(file.path),
            None if file.listed_in is None else entries[file.listed_in][file.path],
        )
        for number, file in enumerate(files)
    ]


def _entries(path: str) -> dict[str, ShardEntry]:
    with open_binary(path) as file:
        index = json.loads(file.read())
    try:
        return {join(parent(path), entry["name"]): ShardEntry(**entry) for entry in index["shards"]}
    except TypeError as error:
        raise UserValueError(
            f"{path} is not an index of this version of lit-align: {error}. Import the shards again."
        ) from error


def _inspect_all(shards: Sequence[ShardToInspect], seed: int, workers: int) -> list[ShardReport]:
    """Inspect shards in threads: decoding and hashing release the interpreter's lock."""
    stopped, lock = Event(), Lock()
    with (
        show_progress(_total_bytes(shards), "inspecting", "B") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def advance(count: int) -> None:
            if stopped.is_set():
                raise CancelledError
            with lock:
                bar.update(count)

        try:
            return list(pool.map(lambda shard: inspect_shard(shard, seed, advance), shards))
        except BaseException:  # also Ctrl-C: otherwise the pool would finish all shards first
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _total_bytes(shards: Sequence[ShardToInspect]) -> int | None:
    """Sum the shards' sizes, for the progress bar; None where a size is unknown before reading."""
    try:
        sizes = [size(shard.shard) for shard in shards]
    except OSError:
        return None
    return None if None in sizes else sum(count or 0 for count in sizes)


def _tiles(reports: list[ShardReport], locations: list[tuple[int, int]]) -> list[Tile]:
    pairs = track(read_pairs(reports, locations), len(locations), "contact sheet", "pair")
    return [make_tile(pair) for pair in pairs]
