"""`lit-align inspect`: what is in the shards, what is wrong with them, and what the pairs look like."""

import json
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from lit_align.commands.inspect.contact_sheet import Tile, draw_sheet, make_tile
from lit_align.commands.inspect.shard_report import Look, Task, look_at, read_pairs
from lit_align.commands.inspect.summary import draw_pairs, pairs_of, summarise
from lit_align.commands.inspect.text_report import to_text
from lit_align.common.files import write_text
from lit_align.common.progress import show_progress, track
from lit_align.data.importers.worker_pool import worker_count
from lit_align.data.shards.index import INDEX, ShardEntry, read_index, rows_path
from lit_align.data.shards.storage import expand, join, open_binary, parent, size
from lit_align.user_errors import UserValueError


def inspect(
    shards: str | list[str],
    output: Path = Path("inspect"),
    sheet_pairs: int = 24,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Read all shards, decode every image, and report what is there: printed, as inspect.json and as inspect.png.

    Ends with status 1 where samples or shards are broken, or a shard is not the one that its index describes.

    Args:
        shards: tar files, or an index.json that names them; braces `{000..127}` and wildcards `*` are expanded.
        output: folder of inspect.json and of the contact sheet inspect.png.
        sheet_pairs: number of random pairs on the contact sheet; 0: none is drawn.
        seed: of the choice of these pairs.
        workers: threads that read and decode, a shard at a time each; none: one per core, up to 16.

    Raises:
        FileNotFoundError: if there is no such shard.
        ValueError: if a number is out of range, or an index.json is not one of lit-align's.
    """
    workers = worker_count(workers)
    if sheet_pairs < 0:
        raise UserValueError(f"sheet_pairs is {sheet_pairs}; it must be 0 or more.")
    looks = _look_at_all(find_tasks(shards), seed, workers)
    pairs = pairs_of(looks)
    found = summarise(looks, pairs, lambda places: [pair.prompt for pair in read_pairs(looks, places)])
    write_text(output / "inspect.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    saved = f"Saved as {output / 'inspect.json'}"
    places = draw_pairs(pairs, sheet_pairs)
    if places:
        tiles = _tiles(looks, places)
        total = found["pairs"] + found["ties"]
        draw_sheet(tiles, f"{len(tiles):,} of {total:,} pairs, seed {seed}", output / "inspect.png")
        saved += f", the contact sheet as {output / 'inspect.png'}"
    print(f"{to_text(found)}\n{saved}")
    if any(found["faults"].values()):
        raise SystemExit(1)


def find_tasks(shards: str | Sequence[str]) -> list[Task]:
    """The shards that patterns or an `index.json` name, and where the rows of each one should be.

    Raises:
        FileNotFoundError: if there is no such shard.
        ValueError: if an `index.json` is not one of ours.
    """
    named: list[tuple[str, str, ShardEntry | None]] = []
    for path in expand(shards):
        if path.rsplit("/", 1)[-1] == INDEX:
            entries = _entries(path)
            named += [(shard, rows, entries[shard]) for shard, rows in read_index(path)]
        else:
            named.append((path, rows_path(path), None))
    return [Task(number, *about) for number, about in enumerate(named)]


def _entries(path: str) -> dict[str, ShardEntry]:
    with open_binary(path) as file:
        index = json.loads(file.read())
    try:
        return {join(parent(path), entry["name"]): ShardEntry(**entry) for entry in index["shards"]}
    except TypeError as error:
        raise UserValueError(
            f"{path} is no index of this version of lit-align: {error}. Import the shards again."
        ) from error


def _look_at_all(tasks: Sequence[Task], seed: int, workers: int) -> list[Look]:
    """Threads do: decoders and hashes work without the interpreter's lock."""
    stopped, lock = Event(), Lock()
    with (
        show_progress(_total_bytes(tasks), "inspecting", "B") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def advance(count: int) -> None:
            if stopped.is_set():
                raise CancelledError
            with lock:
                bar.update(count)

        try:
            return list(pool.map(lambda task: look_at(task, seed, advance), tasks))
        except BaseException:  # Ctrl-C too: else the pool would finish all shards before it ends
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _total_bytes(tasks: Sequence[Task]) -> int | None:
    """For the time left; None where it cannot be told before reading."""
    try:
        sizes = [size(task.shard) for task in tasks]
    except OSError:
        return None
    return None if None in sizes else sum(count or 0 for count in sizes)


def _tiles(looks: list[Look], places: list[tuple[int, int]]) -> list[Tile]:
    return [make_tile(pair) for pair in track(read_pairs(looks, places), len(places), "contact sheet", "pair")]
