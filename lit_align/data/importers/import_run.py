"""Import a source into a folder of shards with an index; the result does not depend on interruptions."""

import json
import shutil
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.common.manifest import check_manifest, read_manifest
from lit_align.common.passing_faults import OWN, call_patiently
from lit_align.common.progress import show_progress
from lit_align.common.sizes import format_bytes
from lit_align.data.importers.import_folder import MANIFEST, RECORDS, local_folder, locked_import_folder
from lit_align.data.importers.rejects import REJECTS, Reject, count_reasons, format_reasons, write_rejects
from lit_align.data.importers.shard_records import (
    ShardPlan,
    ShardRecord,
    is_whole,
    read_record,
    restore_records,
    write_record,
)
from lit_align.data.importers.source import Part, Source
from lit_align.data.importers.worker_pool import shared, worker_count
from lit_align.data.shards.index import INDEX, ShardEntry, index_shard, rows_path, write_index
from lit_align.data.shards.writer import NewPair, write_shard
from lit_align.user_errors import UserError, UserOSError, UserValueError

FORMAT = 1  # of how sources are divided and what is written
PASSES = 3  # at most, over one row group; each one reads what is before its first shard, so 2 times the file is read


class Summary(NamedTuple):
    """Result of an import."""

    folder: Path
    shards: int
    done_before: int  # shards that an earlier run had finished
    pairs: int
    ties: int
    rejects: dict[str, int]  # rows by reason, most frequent first


class ShardRows(NamedTuple):
    """A shard to write."""

    number: int
    path: Path
    rows: int


class Run(NamedTuple):
    """Shards to write whose rows are read in one pass."""

    shards: tuple[ShardRows, ...]
    part: Part  # with the rows of all of them

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


def import_source(source: Source, output: str, pairs_per_shard: int, workers: int | None) -> Summary:
    """Write the missing shards of a source, then the index.

    Raises:
        ValueError: if the folder holds something else, or no row is a pair.
        RuntimeError: if another import writes to the folder, or a worker was killed.
    """
    if pairs_per_shard < 1:
        raise UserValueError(f"pairs_per_shard: {pairs_per_shard}; it must be at least 1.")
    if not source.rows:
        raise UserValueError(f"{source.name}: the source has no rows.")
    processes = worker_count(workers)
    folder = local_folder(output)
    origin = source.describe()
    manifest = {
        "format": FORMAT,
        "source": source.name,
        "options": {**origin["options"], "pairs_per_shard": pairs_per_shard},
        "rows": source.rows,
        **{name: value for name, value in origin.items() if name != "options"},
    }
    plan = ShardPlan(folder, source.rows, pairs_per_shard)
    with locked_import_folder(folder):
        check_manifest(folder / MANIFEST, as_recorded(folder / MANIFEST, manifest), made=[INDEX, "*.tar"])
        unfinished = not (folder / INDEX).is_file()
        finished = _finished(plan)
        if finished is not None:
            return finished
        done = {number for number in range(plan.total) if read_record(plan, number, retry=unfinished) is not None}
        _warn_of_space(plan, source.bytes, len(done))
        _write_missing(source, plan, done, processes)
        return _finish(source.name, plan, len(done))


def as_recorded(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a manifest the digests that an older version did not record in the file."""
    then = read_manifest(path) if path.is_file() else manifest
    known = {name for one in (then, *then.get("files", ())) for name in one}
    files = [{name: one[name] for name in one if name in known or name != "footer"} for one in manifest["files"]]
    return {name: value for name, value in manifest.items() if name in known or name != "labels"} | {"files": files}


def _warn_of_space(plan: ShardPlan, needed: int | None, done: int) -> None:
    left = round((needed or 0) * (1 - done / plan.total))
    free = shutil.disk_usage(plan.folder).free
    if left > free:
        print(f"Warning: this takes about {format_bytes(left)}, and {plan.folder} has {format_bytes(free)} left.")


def _write_missing(source: Source, plan: ShardPlan, done: set[int], processes: int) -> None:
    rows_done = sum(end - begin for begin, end in map(plan.bounds, done))
    processes = max(1, min(processes, plan.total - len(done)))
    runs = (_run(source, plan, numbers) for numbers in divide(source, plan, done, processes))
    with show_progress(plan.rows, "importing", "pair", done=rows_done) as bar:
        for rows in shared(write_run, runs, processes):
            bar.update(rows)


def divide(source: Source, plan: ShardPlan, done: set[int], processes: int) -> Iterator[list[int]]:
    """Divide the missing shards into runs; neighbours that begin in one row group are read in few passes."""
    starts = getattr(source, "starts", None)  # of row groups; a source without them can begin anywhere
    runs: list[list[int]] = []
    before = None
    for number in (number for number in range(plan.total) if number not in done):
        start = number if starts is None else bisect_right(starts, plan.bounds(number)[0])
        if runs and start == before and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
        before = start
    for numbers in runs:
        size = max(2, -(-len(numbers) // min(processes, PASSES)))
        yield from (numbers[at : at + size] for at in range(0, len(numbers), size))


def _run(source: Source, plan: ShardPlan, numbers: list[int]) -> Run:
    bounds = [plan.bounds(number) for number in numbers]
    shards = [
        ShardRows(number, plan.path(number), end - begin) for number, (begin, end) in zip(numbers, bounds, strict=True)
    ]
    return Run(tuple(shards), source.part(bounds[0][0], bounds[-1][1]))


def write_run(run: Run) -> int:
    """Write shards, each with its index rows and last its record, which marks it as done; return the number of rows."""
    written: set[int] = set()
    write = partial(_write_shards, run, written)
    try:
        if run.part.remote:
            call_patiently(write, run.shards[0].path.name)
        else:
            write()
        return run.rows
    except (*OWN, KeyError):  # faults of an importer keep their traceback
        raise
    except Exception as error:  # errors of network libraries cannot be pickled for the main process
        path = run.shards[len(written)].path
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserOSError(
            f"{path.name} cannot be written: {words}. Run the same command again to resume at this shard."
        ) from None


def _write_shards(run: Run, written: set[int]) -> None:
    """Write the shards that are not in `written`, and add them to it."""
    rows = run.part.pairs_and_rejects()
    for shard in run.shards:
        of_shard = islice(rows, shard.rows)
        if shard.number in written:
            deque(of_shard, maxlen=0)
            continue
        write_record(shard.path.parent, shard.number, _write_shard(shard.path, of_shard))
        written.add(shard.number)


def _write_shard(path: Path, rows: Iterator[NewPair | Reject]) -> ShardRecord:
    rejects: list[Reject] = []
    pairs = _keep_pairs(rows, rejects)
    first = next(pairs, None)
    if first is None:
        for name in (str(path), rows_path(str(path))):
            Path(name).unlink(missing_ok=True)
        return ShardRecord(None, rejects)
    write_shard(path, chain([first], pairs))
    entry = index_shard(str(path))
    assert not entry.broken, f"{path}: {entry.broken} of the pairs just written cannot be read"
    return ShardRecord(entry, rejects)


def _keep_pairs(rows: Iterator[NewPair | Reject], rejects: list[Reject]) -> Iterator[NewPair]:
    for one in rows:
        if isinstance(one, Reject):
            rejects.append(one)
        else:
            yield one


def _finish(source: str, plan: ShardPlan, done_before: int) -> Summary:
    """Write the list of rejected rows and the index from the records; the index is last and marks the end.

    Raises:
        ValueError: if no row was a pair.
    """
    records = [record for number in range(plan.total) if (record := read_record(plan, number)) is not None]
    assert len(records) == plan.total
    rejects = [reject for record in records for reject in record.rejects]
    reasons = count_reasons(rejects)
    write_rejects(plan.folder, rejects)
    entries = [record.entry for record in records if record.entry is not None]
    if not entries:
        shutil.rmtree(plan.folder / RECORDS)  # a later import starts from scratch
        (plan.folder / MANIFEST).unlink()
        most = format_reasons(reasons)
        raise UserValueError(f"Not one of {plan.rows} rows is a pair: {most}. See {plan.folder / REJECTS}.")
    index = write_index(str(plan.folder), entries, {"import": {"source": source, "rejects": reasons}})
    shutil.rmtree(plan.folder / RECORDS)
    return _summary(plan, index, done_before)


def _summary(plan: ShardPlan, index: dict[str, Any], done_before: int) -> Summary:
    totals = index["totals"]
    rejects = index["import"]["rejects"]
    return Summary(plan.folder, len(index["shards"]), done_before, totals["pairs"], totals["ties"], rejects)


def _finished(plan: ShardPlan) -> Summary | None:
    """Return the summary of a finished import; if shards were lost since, reopen it and return None."""
    path = plan.folder / INDEX
    if not path.is_file():
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    entries = [ShardEntry(**entry) for entry in index["shards"]]
    if (plan.folder / REJECTS).is_file():
        if all(is_whole(plan.folder, entry) for entry in entries):
            shutil.rmtree(plan.folder / RECORDS, ignore_errors=True)  # left if it was killed after writing the index
            return _summary(plan, index, len(entries))
        restore_records(plan, {entry.name: entry for entry in entries})
    path.unlink()
    return None
