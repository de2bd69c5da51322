"""Compare a shard with its index."""

import hashlib
from typing import Any

from lit_align.data.shards.index import SIZES, ShardEntry, content_digest, read_rows, upright_size
from lit_align.data.shards.layout import RawPair, Sample
from lit_align.data.shards.storage import exists, open_binary, within

BLOCK_BYTES = 1 << 20


class IndexCheck:
    """Compares a shard's samples with the rows of its index, sample by sample, as they are read.

    Args:
        shard: local path or URL.
        stored: rows of the index; None where they cannot be read, for the reason in `differences`.
        about: facts that the index states about the whole shard, by name.
        differences: differences found so far.
    """

    def __init__(self, shard: str, stored: list[dict[str, Any]] | None, about: dict[str, Any], differences: list[str]):
        self.shard, self.stored, self.about, self.differences = shard, stored, about, differences
        self.labels: list[float | None] = []  # None for a broken sample
        self.counts: dict[str, int] = {}  # number of differing rows, by column
        self.first: dict[str, str] = {}  # the first difference, by column

    @classmethod
    def open(cls, shard: str, path: str, entry: ShardEntry | None) -> "IndexCheck | None":
        """Open the index rows at `path` and the entry in `index.json`; None where there is neither."""
        about = {} if entry is None else {f"index.json: {name}": value for name, value in entry._asdict().items()}
        about.pop("index.json: name", None)
        try:
            if not within(None, path, lambda: exists(path)):
                missing = [f"{path}, the shard's index, is missing"]
                return None if entry is None else cls(shard, None, about, missing)
            table = read_rows(path)
        except (OSError, ValueError) as error:
            return cls(shard, None, about, [str(error)])
        names = ("bytes", "sha256")
        about |= {name: table.schema.metadata[name.encode()].decode() for name in names}
        return cls(shard, table.to_pylist(), about, [])

    def add(self, sample: Sample, pair: RawPair | None) -> None:
        """Compare the next sample; `pair` is None for a broken one."""
        number = len(self.labels)
        self.labels.append(None if pair is None else pair.label_0)
        if self.stored is None or number >= len(self.stored):
            return
        stored = dict(self.stored[number])
        stored["label_0"] = None if stored["label_0"] != stored["label_0"] else stored["label_0"]
        for name, value in _row(sample, pair, with_images=bool(stored["content"])).items():
            if stored[name] != value:
                self.counts[name] = self.counts.get(name, 0) + 1
                text = f"first at key {sample.key}: index {_short(stored[name])}, shard {_short(value)}"
                self.first.setdefault(name, text)

    def finish(self, whole: bool) -> list[str]:
        """Return all differences, after the last sample.

        Args:
            whole: whether the shard could be read to its end.
        """
        found = list(self.differences)
        if self.stored is not None and whole and len(self.stored) != len(self.labels):
            found.append(f"samples: index {len(self.stored)}, shard {len(self.labels)}")
        found += [f"{name}: {count} rows differ, {self.first[name]}" for name, count in self.counts.items()]
        return found + self._shard_differences() if whole else found

    def _shard_differences(self) -> list[str]:
        try:
            facts = within(None, self.shard, self._facts)
        except OSError as error:
            return [f"its bytes could not be read again: {error}"]
        pairs = [(name, stored, facts[name.removeprefix("index.json: ")]) for name, stored in self.about.items()]
        return [f"{name}: index {_short(a)}, shard {_short(b)}" for name, a, b in pairs if str(a) != str(b)]

    def _facts(self) -> dict[str, Any]:
        sha256, count = hashlib.sha256(), 0
        with open_binary(self.shard) as file:
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                count += len(block)
        broken, ties = self.labels.count(None), self.labels.count(0.5)
        pairs = len(self.labels) - broken - ties
        facts = {"samples": len(self.labels), "pairs": pairs, "ties": ties, "broken": broken}
        return {"bytes": count, "sha256": sha256.hexdigest(), **facts}


def _row(sample: Sample, pair: RawPair | None, with_images: bool) -> dict[str, Any]:
    """Compute the sample's index row; digest and sizes of the images only `with_images`."""
    row = {
        "key": sample.key,
        "offset": sample.offset,
        "size": sample.size,
        "label_0": None if pair is None else pair.label_0,
    }
    if pair is not None:
        row["prompt"] = pair.prompt
        if with_images:
            sizes = (*upright_size(pair.image_0), *upright_size(pair.image_1))
            row |= {"content": content_digest(pair), **dict(zip(SIZES, sizes, strict=True))}
    return row


def _short(value: Any) -> str:
    if value is None:
        return "broken"
    text = repr(value) if isinstance(value, str) and not value.isalnum() else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
