"""HPDv2: a JSON file of annotations and a folder of images (https://github.com/tgxs002/HPSv2).

Of n images of a prompt every two are a pair, n (n - 1) / 2 of them, in the file's order. An entry says which one is
better in one of three ways, of which the first one that is there counts:

human_preference   a value for each image, 1 for the preferred one, as in train.json
raw_annotations    a ranking by each annotator, [{"rank": [...]}, ...] or [[...], ...], as in test.json: the majority
                   decides, and a pair on which as many say one thing as the other is a tie
rank               one ranking

A rank belongs to the image at its place, and a smaller one is better.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.data.importers.source import Reject, Rejected, label_of, load_image, new_pair, outcome
from lit_align.data.shards.storage import is_url, join, open_binary
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import UserFileNotFoundError, UserValueError

NAMES = ("file_path", "image_path")  # as train.json and test.json call them
JUDGEMENTS = ("human_preference", "raw_annotations", "rank")
Entry = dict[str, Any]


class Row(NamedTuple):
    """Two images of an entry; an entry of fewer has one row, which is rejected."""

    entry: int  # in the file
    first: int  # images of the entry
    second: int


@dataclass(frozen=True)
class HPDPart:
    """Rows and the entries that they belong to."""

    begin: int
    rows: tuple[Row, ...]
    entries: dict[int, Any]
    annotations: str  # the file's name
    images: str  # folder

    @property
    def remote(self) -> bool:
        return is_url(self.images)

    def outcomes(self) -> Iterator[NewPair | Reject]:
        for number, row in enumerate(self.rows, self.begin):
            place = f"{self.annotations}, entry {row.entry}, images {row.first} and {row.second}"
            yield outcome(number, place, partial(_pair, self.entries[row.entry], row, self.images))


@dataclass(frozen=True)
class HPD:
    """All pairs of all entries."""

    path: str
    digest: str  # of the file
    images: str
    entries: list[Any]
    pairs: list[Row]
    name: str = "hpd"
    bytes: None = None

    @property
    def rows(self) -> int:
        return len(self.pairs)

    def about(self) -> dict[str, Any]:
        return {"files": [{"name": Path(self.path).name, "sha256": self.digest}], "options": {}}

    def part(self, begin: int, end: int) -> HPDPart:
        rows = tuple(self.pairs[begin:end])
        entries = {row.entry: self.entries[row.entry] for row in rows}
        return HPDPart(begin, rows, entries, Path(self.path).name, self.images)


def open_annotations(path: str, images: str | None) -> HPD:
    """The pairs of an annotation file.

    Args:
        path: JSON file or URL.
        images: folder or URL that the images' names are relative to; none: the one beside the file that has its name.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it is not a list of entries.
    """
    folder = path.removesuffix(".json") if images is None else images
    if not is_url(folder) and not Path(folder).is_dir():
        raise UserFileNotFoundError(f"images: there is no folder {folder}. Name the one that the images are in.")
    with open_binary(path) as file:
        data = file.read()
    try:
        entries = json.loads(data)
    except ValueError as error:
        raise UserValueError(f"annotations: {path} is not JSON: {error}. Download it again.") from error
    if not isinstance(entries, list):
        raise UserValueError(f"annotations: {path} holds no list of entries but a {type(entries).__name__}.")
    pairs = [Row(number, *two) for number, entry in enumerate(entries) for two in _every_two(len(_names(entry)))]
    return HPD(path, hashlib.sha256(data).hexdigest(), folder, entries, pairs)


def _every_two(count: int) -> list[tuple[int, int]]:
    return [(first, second) for first in range(count) for second in range(first + 1, count)] or [(0, 1)]


def _names(entry: Any) -> list[Any]:
    named = [entry[name] for name in NAMES if name in entry] if isinstance(entry, dict) else []
    return named[0] if named and isinstance(named[0], list) else []


def _pair(entry: Any, row: Row, folder: str, key: str) -> NewPair:
    names = _names(entry)
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise Rejected("fewer than two images", f"the entry has {' and '.join(NAMES)} {names!r}"[:200])
    label_0, judged = _judge(entry, row, len(names))
    two = names[row.first], names[row.second]
    images = load_image(join(folder, two[0])), load_image(join(folder, two[1]))
    kept = {name: value for name, value in entry.items() if name not in (*NAMES, *JUDGEMENTS, "prompt")}
    more = {"entry": row.entry, "image_0": two[0], "image_1": two[1], **judged, **kept}
    return new_pair(key, images, label_0, entry.get("prompt"), more)


def _judge(entry: Entry, row: Row, count: int) -> tuple[float, dict[str, Any]]:
    """The label, and what it was made of."""
    if "human_preference" in entry:
        values = _one_each(entry["human_preference"], "human_preference", count)
        return label_of(values[row.first], values[row.second]), {}
    if entry.get("raw_annotations"):
        annotators = [one.get("rank") if isinstance(one, dict) else one for one in entry["raw_annotations"]]
        rankings = [_one_each(ranks, "rank", count) for ranks in annotators]
        votes = [
            sum(ranks[a] < ranks[b] for ranks in rankings)
            for a, b in ((row.first, row.second), (row.second, row.first))
        ]
        return _more_is_better(votes[0], votes[1]), {"votes_0": votes[0], "votes_1": votes[1]}
    if "rank" in entry:
        ranks = _one_each(entry["rank"], "rank", count)
        first, second = ranks[row.first], ranks[row.second]
        return _more_is_better(second, first), {"rank_0": first, "rank_1": second}
    raise Rejected("no label", f"the entry has none of {', '.join(JUDGEMENTS)}")


def _one_each(values: Any, name: str, count: int) -> list[float]:
    numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    if not numbers or len(values) != count:
        raise Rejected(f"{name} is not one number for each image", ascii(values)[:200])
    found: list[float] = values
    return found


def _more_is_better(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)
