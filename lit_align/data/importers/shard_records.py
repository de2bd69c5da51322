"""Records of the shards that an unfinished import has written, one file for each."""

import json
from pathlib import Path
from typing import NamedTuple

from lit_align.common.files import write_text
from lit_align.data.importers.import_folder import RECORDS
from lit_align.data.importers.rejects import Reject, read_rejects
from lit_align.data.shards.index import ShardEntry, rows_path

# A drive may be unmounted, or a folder misspelled.
MAY_RETURN = ("image missing", "image cannot be read", "prompt missing")


class ShardRecord(NamedTuple):
    """Result of importing the rows of one shard."""

    entry: ShardEntry | None  # None if no row was a pair: then there is no shard
    rejects: list[Reject]


class ShardPlan(NamedTuple):
    """Division of a source into shards: shard k holds the rows from k * size on."""

    folder: Path
    rows: int
    size: int  # rows

    @property
    def total(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.size)

    def path(self, number: int) -> Path:
        """Path of a shard."""
        return self.folder / f"{number:05d}.tar"

    def bounds(self, number: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last one."""
        return number * self.size, min((number + 1) * self.size, self.rows)


def _record_path(folder: Path, number: int) -> Path:
    return folder / RECORDS / f"{number:05d}.json"


def write_record(folder: Path, number: int, record: ShardRecord) -> None:
    """Write a shard's record, which marks the shard as done."""
    entry = None if record.entry is None else record.entry._asdict()
    text = json.dumps({"entry": entry, "rejects": [reject._asdict() for reject in record.rejects]})
    write_text(_record_path(folder, number), text)


def read_record(plan: ShardPlan, number: int, retry: bool = False) -> ShardRecord | None:
    """Read a shard's record; None if the shard is missing or, with `retry`, lacks files that may have returned."""
    try:
        record = json.loads(_record_path(plan.folder, number).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a machine that crashed may leave an empty file
        return None
    entry = None if record["entry"] is None else ShardEntry(**record["entry"])
    if entry is not None and not is_whole(plan.folder, entry):
        return None
    rejects = [Reject(**reject) for reject in record["rejects"]]
    return None if retry and any(reject.reason in MAY_RETURN for reject in rejects) else ShardRecord(entry, rejects)


def is_whole(folder: Path, entry: ShardEntry) -> bool:
    """Whether a shard has its recorded size, and index rows."""
    path = folder / entry.name
    return path.is_file() and path.stat().st_size == entry.bytes and Path(rows_path(str(path))).is_file()


def restore_records(plan: ShardPlan, entries: dict[str, ShardEntry]) -> None:
    """Write the records of a finished import again, from its index entries by name and its rejected rows."""
    rejects: dict[int, list[Reject]] = {}
    for reject in read_rejects(plan.folder):
        rejects.setdefault(reject.row // plan.size, []).append(reject)
    for number in range(plan.total):
        record = ShardRecord(entries.get(plan.path(number).name), rejects.get(number, []))
        write_record(plan.folder, number, record)
