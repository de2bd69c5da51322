"""Rows that an import leaves out: why, and the file that lists them."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.common.files import write_text

REJECTS = "rejects.jsonl"


class Rejected(ValueError):
    """Raised for a row that is not a pair.

    Args:
        reason: is counted, so it must not depend on the row.
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Reject(NamedTuple):
    """A row that was left out. The field names are the keys in the file."""

    row: int  # in the source
    place: str  # for people: a file and a row in it
    key: str  # of the pair that the row would have become
    reason: str
    detail: str


def count_reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """Count the rejected rows by reason, most frequent first."""
    counts = Counter(reject.reason for reject in rejects)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def format_reasons(counts: dict[str, int]) -> str:
    """Counted reasons in one line."""
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())


def write_rejects(folder: Path, rejects: Iterable[Reject]) -> None:
    """Write the list of rejected rows, unless the file already has this content."""
    text = "".join(json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects)
    path = folder / REJECTS
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def read_rejects(folder: Path) -> list[Reject]:
    """Read the list of rejected rows."""
    lines = (folder / REJECTS).read_text(encoding="utf-8").split("\n")  # not splitlines: a detail may hold U+2028
    return [Reject(**json.loads(line)) for line in lines[:-1]]


def clean(value: Any) -> Any:
    """Replace what JSON and UTF-8 cannot hold: NaN and infinity by None, lone surrogates by `?`."""
    if isinstance(value, dict):
        return {encodable(str(name)): clean(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [clean(one) for one in value]
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def encodable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot hold, by `?`."""
    return text.encode("utf-8", "replace").decode()
