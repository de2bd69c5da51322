"""Import HPDv2: a JSON file of annotations and a folder of images (https://github.com/tgxs002/HPSv2).

Every two of the n images of a prompt are a pair, n (n - 1) / 2 pairs in the file's order. An entry holds its
preferences in one of three fields; the first field found is used:

human_preference   a value for each image, 1 for the preferred one, as in train.json
raw_annotations    a ranking by each annotator, [{"rank": [...]}, ...] or [[...], ...], as in test.json: the majority
                   decides, and an even vote is a tie
rank               one ranking

A ranking holds a rank for each image, and the smaller rank is better.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.data.importers.rejects import Reject, Rejected
from lit_align.data.importers.source import convert_row, load_image, new_pair, parse_labels
from lit_align.data.shards.filesystems import is_url, join
from lit_align.data.shards.storage import open_binary
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import UserFileNotFoundError, UserValueError

NAMES = ("file_path", "image_path")  # of the images, in train.json and in test.json
JUDGEMENTS = ("human_preference", "raw_annotations", "rank")
Entry = dict[str, Any]


class Row(NamedTuple):
    """Two images of an entry; an entry with fewer images has one row, which is rejected."""

    entry: int  # position in the file
    first: int  # position among the images of the entry
    second: int


@dataclass(frozen=True)
class HPDPart:
    """Rows that become one shard, with their entries."""

    begin: int
    rows: tuple[Row, ...]
    entries: dict[int, Any]
    annotations: str  # the file's name
    images: str  # folder

    @property
    def remote(self) -> bool:
        return is_url(self.images)

    def pairs_and_rejects(self) -> Iterator[NewPair | Reject]:
        for number, row in enumerate(self.rows, self.begin):
            location = f"{self.annotations}, entry {row.entry}, images {row.first} and {row.second}"
            yield convert_row(number, location, partial(_pair, self.entries[row.entry], row, self.images))


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

    def describe(self) -> dict[str, Any]:
        return {"files": [{"name": Path(self.path).name, "sha256": self.digest}], "options": {}}

    def part(self, begin: int, end: int) -> HPDPart:
        rows = tuple(self.pairs[begin:end])
        entries = {row.entry: self.entries[row.entry] for row in rows}
        return HPDPart(begin, rows, entries, Path(self.path).name, self.images)


def open_annotations(path: str, images: str | None) -> HPD:
    """Read the annotations and find their pairs.

    Args:
        path: JSON file or URL.
        images: folder or URL of the images; None is the folder `NAME` beside the file `NAME.json`.

    Raises:
        FileNotFoundError: if the file or the folder is missing.
        ValueError: if the file does not hold a list of entries.
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
        raise UserValueError(f"annotations: {path} must hold a list of entries; it holds a {type(entries).__name__}.")
    pairs = [Row(number, *pair) for number, entry in enumerate(entries) for pair in _pairs_of(entry)]
    return HPD(path, hashlib.sha256(data).hexdigest(), folder, entries, pairs)


def _pairs_of(entry: Any) -> list[tuple[int, int]]:
    return list(combinations(range(len(_image_names(entry))), 2)) or [(0, 1)]


def _image_names(entry: Any) -> list[Any]:
    named = [entry[name] for name in NAMES if name in entry] if isinstance(entry, dict) else []
    return named[0] if named and isinstance(named[0], list) else []


def _pair(entry: Any, row: Row, folder: str, key: str) -> NewPair:
    names = _image_names(entry)
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise Rejected("fewer than two images", f"the entry has {' and '.join(NAMES)} {names!r}"[:200])
    label_0, judgement = _judge(entry, row, len(names))
    two = names[row.first], names[row.second]
    images = load_image(join(folder, two[0])), load_image(join(folder, two[1]))
    kept = {name: value for name, value in entry.items() if name not in (*NAMES, *JUDGEMENTS, "prompt")}
    more = {"entry": row.entry, "image_0": two[0], "image_1": two[1], **judgement, **kept}
    return new_pair(key, images, label_0, entry.get("prompt"), more)


def _judge(entry: Entry, row: Row, count: int) -> tuple[float, dict[str, Any]]:
    """Return the label of image 0, and the votes or ranks behind it."""
    if "human_preference" in entry:
        values = _check_values(entry["human_preference"], "human_preference", count)
        return parse_labels(values[row.first], values[row.second]), {}
    if entry.get("raw_annotations"):
        annotators = [one.get("rank") if isinstance(one, dict) else one for one in entry["raw_annotations"]]
        rankings = [_check_values(ranks, "rank", count) for ranks in annotators]
        votes = [
            sum(ranks[a] < ranks[b] for ranks in rankings)
            for a, b in ((row.first, row.second), (row.second, row.first))
        ]
        return _prefer_larger(votes[0], votes[1]), {"votes_0": votes[0], "votes_1": votes[1]}
    if "rank" in entry:
        ranks = _check_values(entry["rank"], "rank", count)
        first, second = ranks[row.first], ranks[row.second]
        return _prefer_larger(second, first), {"rank_0": first, "rank_1": second}
    raise Rejected("no label", f"the entry has none of {', '.join(JUDGEMENTS)}")


def _check_values(values: Any, name: str, count: int) -> list[float]:
    numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    if not numbers or len(values) != count:
        raise Rejected(f"{name} is not one number for each image", ascii(values)[:200])
    found: list[float] = values
    return found


def _prefer_larger(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)
