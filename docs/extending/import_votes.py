"""An importer: JSON lines of two image files and how many people preferred each. import_votes.py FILE OUTPUT."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lit_align.data.importers.import_run import import_source
from lit_align.data.importers.rejects import Reject, Rejected
from lit_align.data.importers.source import convert_row, load_image, new_pair
from lit_align.data.shards.writer import NewPair


@dataclass(frozen=True)
class VotesPart:
    """Rows that become one shard; it is pickled to the process that writes the shard."""

    begin: int
    lines: tuple[str, ...]
    folder: Path
    remote: bool = False  # True: a failed read is tried again

    def pairs_and_rejects(self) -> Iterator[NewPair | Reject]:
        for row, line in enumerate(self.lines, self.begin):
            yield convert_row(row, f"line {row + 1}", partial(self._pair, json.loads(line)))

    def _pair(self, row: dict[str, Any], key: str) -> NewPair:
        first, second = row["votes"]
        if first + second < 3:
            raise Rejected("fewer than 3 votes")  # counted by this reason, and listed in rejects.jsonl
        images = [load_image(str(self.folder / name)) for name in row["images"]]
        label_0 = 0.5 if first == second else float(first > second)
        return new_pair(key, (images[0], images[1]), label_0, row["prompt"], {"votes": row["votes"]})


@dataclass(frozen=True)
class Votes:
    """All rows of the file."""

    path: Path
    name: str = "votes"
    bytes: int | None = None

    @property
    def rows(self) -> int:
        return len(self._lines())

    def describe(self) -> dict[str, Any]:
        """Describe what decides the pairs: another file cannot continue an interrupted import."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"files": [{"name": self.path.name, "sha256": digest}], "options": {}}

    def part(self, begin: int, end: int) -> VotesPart:
        return VotesPart(begin, tuple(self._lines()[begin:end]), self.path.parent)

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    print(import_source(Votes(Path(sys.argv[1])), sys.argv[2], 1000, 1))
