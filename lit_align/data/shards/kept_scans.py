"""Scans of remote shards without an index, kept on this machine: the next start and other ranks read no shard for them.

A scan is kept under the shard's address and what its server says of the shard's version; without that it is not kept.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.common.files import atomic_path
from lit_align.common.lock import folder_turn
from lit_align.data.shards.filesystems import PIPE, filesystem_of, is_url
from lit_align.data.shards.index import ROWS, scan_rows
from lit_align.data.shards.storage import ask

FORMAT = 1  # of the scans; to be raised when `scan_rows` finds something else in the same shard
KEPT = 90 * 86400  # seconds since a scan was used
VERSIONS = {"etag", "lastmodified", "contentmd5", "digest", "md5hash", "generation", "blobid", "sha256", "mtime"}


def kept_folder() -> Path:
    """Folder of the scans in the user's cache; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-align" / "scans"


def labels_of(shard: str, sizes: bool, timeout: float | None = None) -> pa.Table:
    """Read the index rows of a shard without digests, see `scan_rows`, from the shard or from a scan that was kept.

    Args:
        shard: local path or URL.
        sizes: read the sizes of the images too.
        timeout: seconds until a read is given up; None waits forever.

    Raises:
        SampleError: if the shard is missing, truncated or damaged.
    """
    scan = partial(scan_rows, shard, False, sizes, timeout)
    try:
        version = _version(shard, timeout)
    except OSError:
        version = None  # the scan says what is wrong
    if version is None:
        return scan()
    name = hashlib.sha256(json.dumps([FORMAT, shard, version, sizes]).encode()).hexdigest()[:24]
    path = kept_folder() / f"{name}.parquet"
    with _turn(path):  # other ranks wait for this scan
        found = _read(path)
        if found is None:
            found = scan()
            with suppress(OSError):  # a full disk
                _write(path, found)
    return found


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait for the process that makes a scan; without a folder to write to, wait for none."""
    with ExitStack() as turn:
        with suppress(OSError):
            turn.enter_context(folder_turn(path.parent, path.stem))
            _forget_old(path.parent)
        yield


@lru_cache(maxsize=1)
def _forget_old(folder: Path) -> None:
    """Delete the scans that were not used for `KEPT` seconds, once in a process."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - KEPT:
                path.unlink()


def _version(shard: str, timeout: float | None) -> dict[str, str] | None:
    """Size and version of a remote shard, as its server states them; None without a version."""
    if not is_url(shard) or shard.startswith(PIPE):
        return None
    filesystem, name = filesystem_of(shard)
    about = ask(shard, partial(filesystem.info, name), timeout)
    stated = {key: str(value) for key, value in about.items() if _plain(key) in VERSIONS and value}
    return stated | {"size": str(about.get("size"))} if stated else None


def _plain(key: str) -> str:
    return key.lower().replace("-", "").replace("_", "")


def _read(path: Path) -> pa.Table | None:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError):
        return None
    with suppress(OSError):
        os.utime(path)
    return table if table.schema.equals(ROWS) else None


def _write(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as part:
        pq.write_table(table, part, compression="zstd")
