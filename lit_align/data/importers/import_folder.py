"""The folder that an import writes to."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_align.common.lock import locked_folder
from lit_align.data.shards.filesystems import is_url
from lit_align.user_errors import UserValueError

MANIFEST = "import.json"
RECORDS = ".import"  # folder with one file per finished shard, until all are finished
LEFTOVER = re.compile(
    r"\.(.*\.tar|.*\.index\.parquet|\d+\.json|import\.json|index\.json|rejects\.jsonl)\.[0-9a-f]{8}\.part"
)


def local_folder(output: str) -> Path:
    """Make the folder that an import writes to, if it is missing.

    Raises:
        UserValueError: for a URL.
    """
    if is_url(output):
        raise UserValueError(f"output: {output} is not a local folder. Import to a local one and copy it there.")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked_import_folder(folder: Path) -> Iterator[None]:
    """Lock the folder for one import, and remove partial files of killed imports.

    Raises:
        UserRuntimeError: if another import writes to the folder.
    """
    with locked_folder(folder, "import"):
        for path in (*folder.glob(".*.part"), *folder.glob(f"{RECORDS}/.*.part")):
            if LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield
