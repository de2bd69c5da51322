"""What a folder of shards is made from, so that an import that goes on makes the same shards and no others."""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_align.common.files import write_text
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.index import INDEX
from lit_align.user_errors import UserRuntimeError, UserValueError

PLAN = "import.json"
RECORDS = ".import"  # a folder with one file for each shard that is done, while not all are
LOCK = ".import.lock"
FORMAT = 1  # of how sources are divided and what is written
LEFTOVER = re.compile(
    r"\.(.*\.tar|.*\.index\.parquet|\d+\.json|import\.json|index\.json|rejects\.jsonl)\.[0-9a-f]{8}\.part"
)


def local_folder(output: str) -> Path:
    """The folder that an import writes to, made if it is not there.

    Raises:
        ValueError: for a URL.
    """
    if is_url(output):
        raise UserValueError(f"output: {output} is not a local folder. Import to a local one and copy it there.")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def settle_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan of a new import, or compare it with that of the one that goes on.

    Raises:
        ValueError: if the folder holds something else.
    """
    path = folder / PLAN
    plan = {"format": FORMAT, **json.loads(json.dumps(plan))}
    if not path.is_file():
        foreign = [INDEX] * (folder / INDEX).exists() + sorted(file.name for file in folder.glob("*.tar"))
        if foreign:
            raise UserValueError(
                f"output: {folder} holds {foreign[0]} and has no {PLAN}: no import has written it. "
                "Choose another folder."
            )
        write_text(path, json.dumps(plan, indent=1, ensure_ascii=False) + "\n")
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserValueError(f"{path} cannot be read: {error}. Delete the folder and import again.") from error
    found = differences(known, plan)
    if found:
        more = f", and {len(found) - 5} more differences" if len(found) > 5 else ""
        raise UserValueError(
            f"output: {folder} holds another import: {'; '.join(found[:5])}{more}. Go on with the source and options "
            "of before, choose another folder, or delete this one."
        )


def differences(known: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    found = []
    for name in ("format", "source"):
        if known.get(name) != plan[name]:
            found.append(f"{name} was {known.get(name)!r} and is {plan[name]!r}")
    before, now = known.get("options") or {}, plan["options"]
    found += [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return found + _file_differences(known.get("files") or [], plan["files"])


def _file_differences(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    old, new = ({file["name"]: file for file in files} for files in (before, now))
    found = [f"{name} is gone" for name in old if name not in new]
    found += [f"{name} is new" for name in new if name not in old]
    found += [
        f"{name} had {old[name].get(what)} {what} and has {value}"
        for name in new
        if name in old
        for what, value in new[name].items()
        if old[name].get(what) != value
    ]
    return found or ["the files are in another order"] * (before != now)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for one import at a time; what killed ones have left half written is removed.

    Raises:
        RuntimeError: if another import writes to it.
    """
    # A file, open for writing: network drives lock no folders.
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserRuntimeError(
                    f"output: another import writes to {folder}. Start one process only; --workers makes it many."
                ) from error
            print(f"Warning: {folder} cannot be locked ({error}). Start no second import on it.")
        for path in (*folder.glob(".*.part"), *folder.glob(f"{RECORDS}/.*.part")):
            if LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
    finally:
        os.close(handle)
