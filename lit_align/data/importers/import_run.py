"""From a source to a folder of shards with an index, which ends up the same however often it was interrupted."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.common.files import write_text
from lit_align.common.progress import show_progress
from lit_align.data.importers.import_manifest import PLAN, RECORDS, held, local_folder, settle_plan
from lit_align.data.importers.source import Part, Reject, Source
from lit_align.data.importers.worker_pool import shared, worker_count
from lit_align.data.shards.index import INDEX, ShardEntry, index_shard, rows_path, write_index
from lit_align.data.shards.writer import NewPair, write_shard
from lit_align.user_errors import UserOSError, UserValueError

REJECTS = "rejects.jsonl"
MAY_RETURN = ("image missing", "prompt missing")  # a drive may have been away, or a folder named wrongly
PAUSES = (2.0, 10.0, 60.0)  # seconds before a source on the network is asked again


class Summary(NamedTuple):
    """What an import has made."""

    folder: Path
    shards: int
    done_before: int  # of these
    pairs: int
    ties: int
    rejects: dict[str, int]  # how many, by reason, most frequent first


class Record(NamedTuple):
    """What became of the rows of a shard."""

    entry: ShardEntry | None  # None where not one row was a pair
    rejects: list[Reject]


class Task(NamedTuple):
    """A shard that is to be written."""

    number: int
    path: Path
    part: Part
    rows: int


class Shards(NamedTuple):
    """Shard k holds the rows from k * size on."""

    folder: Path
    rows: int
    size: int  # rows

    @property
    def total(self) -> int:
        return -(-self.rows // self.size)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.tar"

    def bounds(self, number: int) -> tuple[int, int]:
        return number * self.size, min((number + 1) * self.size, self.rows)


def import_source(source: Source, output: str, pairs_per_shard: int, workers: int | None) -> Summary:
    """Write the shards of a source that are not there yet, and the index of all.

    Raises:
        ValueError: if the folder holds something else, or not one row is a pair.
        RuntimeError: if another import writes to the folder, or a worker was killed.
    """
    if pairs_per_shard < 1:
        raise UserValueError(f"pairs_per_shard: {pairs_per_shard}; it must be at least 1.")
    if not source.rows:
        raise UserValueError(f"{source.name}: the source has no rows.")
    processes = worker_count(workers)
    folder = local_folder(output)
    about = source.about()
    plan = {"source": source.name, "options": {**about["options"], "pairs_per_shard": pairs_per_shard}}
    shards = Shards(folder, source.rows, pairs_per_shard)
    with held(folder):
        settle_plan(folder, plan | {"rows": source.rows, "files": about["files"]})
        unfinished = not (folder / INDEX).is_file()
        finished = _finished(shards)
        if finished is not None:
            return finished
        done = [number for number in range(shards.total) if _record(shards, number, retry=unfinished) is not None]
        _warn_of_space(shards, source.bytes, len(done))
        _write_missing(source, shards, set(done), processes)
        return _finish(source.name, shards, len(done))


def _warn_of_space(shards: Shards, needed: int | None, done: int) -> None:
    left = round((needed or 0) * (1 - done / shards.total))
    free = shutil.disk_usage(shards.folder).free
    if left > free:
        print(f"Warning: this takes about {left / 1e9:.1f} GB, and {shards.folder} has {free / 1e9:.1f} GB left.")


def _write_missing(source: Source, shards: Shards, done: set[int], processes: int) -> None:
    tasks = (
        Task(number, shards.path(number), source.part(*bounds), bounds[1] - bounds[0])
        for number in range(shards.total)
        if number not in done
        for bounds in [shards.bounds(number)]
    )
    rows_done = sum(end - begin for begin, end in map(shards.bounds, done))
    processes = max(1, min(processes, shards.total - len(done)))
    with show_progress(shards.rows, "importing", "pair", done=rows_done) as bar:
        for rows in shared(write_part, tasks, processes):
            bar.update(rows)


def write_part(task: Task) -> int:
    """Write a shard, its rows and then its record, which says that it is done; returns how many rows it took."""
    for pause in PAUSES if task.part.remote else ():
        try:
            record = _write_shard(task)
            break
        except Exception as error:
            print(f"{task.path.name}: {type(error).__name__}: {error}. Trying again in {pause:g} s.")
            time.sleep(pause)
    else:
        try:
            record = _write_shard(task)
        except Exception as error:  # those of network libraries do not travel between processes
            raise UserOSError(
                f"{task.path.name} cannot be written: {type(error).__name__}: {error}. The same command goes on there."
            ) from None
    _write_record(task.path.parent, task.number, record)
    return task.rows


def _write_shard(task: Task) -> Record:
    rejects: list[Reject] = []
    pairs = _kept(task.part, rejects)
    first = next(pairs, None)
    if first is None:
        for name in (str(task.path), rows_path(str(task.path))):
            Path(name).unlink(missing_ok=True)
        return Record(None, rejects)
    write_shard(task.path, chain([first], pairs))
    entry = index_shard(str(task.path))
    assert not entry.broken, f"{task.path}: {entry.broken} of the pairs just written cannot be read"
    return Record(entry, rejects)


def _kept(part: Part, rejects: list[Reject]) -> Iterator[NewPair]:
    for one in part.outcomes():
        if isinstance(one, Reject):
            rejects.append(one)
        else:
            yield one


def _record_file(folder: Path, number: int) -> Path:
    return folder / RECORDS / f"{number:05d}.json"


def _write_record(folder: Path, number: int, record: Record) -> None:
    entry = None if record.entry is None else record.entry._asdict()
    text = json.dumps({"entry": entry, "rejects": [reject._asdict() for reject in record.rejects]})
    write_text(_record_file(folder, number), text)


def _record(shards: Shards, number: int, retry: bool = False) -> Record | None:
    """The record of a shard that is there; None where it is yet to be written, or with `retry` is to be tried again."""
    try:
        record = json.loads(_record_file(shards.folder, number).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a machine that went down may leave an empty file
        return None
    entry = None if record["entry"] is None else ShardEntry(**record["entry"])
    if entry is not None and not _is_whole(shards.folder, entry):
        return None
    rejects = [Reject(**reject) for reject in record["rejects"]]
    return None if retry and any(reject.reason in MAY_RETURN for reject in rejects) else Record(entry, rejects)


def _is_whole(folder: Path, entry: ShardEntry) -> bool:
    path = folder / entry.name
    return path.is_file() and path.stat().st_size == entry.bytes and Path(rows_path(str(path))).is_file()


def _finish(source: str, shards: Shards, done_before: int) -> Summary:
    """Gather the records into the index and the list of rejects, the index last.

    Raises:
        ValueError: if not one row was a pair.
    """
    records = [_record(shards, number) for number in range(shards.total)]
    entries, rejects, reasons = [], [], Counter[str]()
    for number, record in enumerate(records):
        assert record is not None, shards.path(number)
        entries += [] if record.entry is None else [record.entry]
        rejects += [json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in record.rejects]
        reasons.update(reject.reason for reject in record.rejects)
    write_text(shards.folder / REJECTS, "".join(rejects))
    by_reason = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    if not entries:
        shutil.rmtree(shards.folder / RECORDS)  # nothing is to be kept of it
        (shards.folder / PLAN).unlink()
        most = ", ".join(f"{count} x {reason}" for reason, count in by_reason.items())
        raise UserValueError(f"Not one of {shards.rows} rows is a pair: {most}. See {shards.folder / REJECTS}.")
    index = write_index(str(shards.folder), entries, {"import": {"source": source, "rejects": by_reason}})
    shutil.rmtree(shards.folder / RECORDS)
    return _summary(shards, index, done_before)


def _summary(shards: Shards, index: dict[str, Any], done_before: int) -> Summary:
    totals = index["totals"]
    rejects = index["import"]["rejects"]
    return Summary(shards.folder, len(index["shards"]), done_before, totals["pairs"], totals["ties"], rejects)


def _finished(shards: Shards) -> Summary | None:
    """The summary where all is done; shards that have been lost since are made again."""
    path = shards.folder / INDEX
    if not path.is_file():
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    entries = [ShardEntry(**entry) for entry in index["shards"]]
    if (shards.folder / REJECTS).is_file():
        if all(_is_whole(shards.folder, entry) for entry in entries):
            shutil.rmtree(shards.folder / RECORDS, ignore_errors=True)  # killed before it came to that
            return _summary(shards, index, len(entries))
        _restore_records(shards, {entry.name: entry for entry in entries})
    path.unlink()
    return None


def _restore_records(shards: Shards, entries: dict[str, ShardEntry]) -> None:
    rejects: dict[int, list[Reject]] = {}
    for line in (shards.folder / REJECTS).read_text(encoding="utf-8").split("\n")[:-1]:
        reject = Reject(**json.loads(line))
        rejects.setdefault(reject.row // shards.size, []).append(reject)
    for number in range(shards.total):
        record = Record(entries.get(shards.path(number).name), rejects.get(number, []))
        _write_record(shards.folder, number, record)
