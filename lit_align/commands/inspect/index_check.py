"""Whether a shard is still the one that its index describes."""

import hashlib
from typing import Any

from lit_align.data.shards.index import SIZES, ShardEntry, content_digest, read_rows, upright_size
from lit_align.data.shards.layout import RawPair, Sample
from lit_align.data.shards.storage import exists, open_binary, within

BLOCK_BYTES = 1 << 20


class IndexCheck:
    """Compares a shard's samples with indexed rows, one after the other, as they are read.

    Args:
        shard: local path or URL.
        stored: the indexed rows; None where they cannot be had, and `differences` says why.
        about: what the index says of the whole shard, by name.
        differences: found so far.
    """

    def __init__(self, shard: str, stored: list[dict[str, Any]] | None, about: dict[str, Any], differences: list[str]):
        self.shard, self.stored, self.about, self.differences = shard, stored, about, differences
        self.labels: list[float | None] = []  # None where a sample is no pair
        self.counts: dict[str, int] = {}  # rows that differ, by column
        self.first: dict[str, str] = {}  # by column

    @classmethod
    def open(cls, shard: str, path: str, entry: ShardEntry | None) -> "IndexCheck | None":
        """A check against the rows in `path` and the entry in `index.json`; None where there is neither."""
        about = {} if entry is None else {f"index.json: {name}": value for name, value in entry._asdict().items()}
        about.pop("index.json: name", None)
        try:
            if not within(None, path, lambda: exists(path)):
                missing = [f"{path}, which has its rows, is missing"]
                return None if entry is None else cls(shard, None, about, missing)
            table = read_rows(path)
        except (OSError, ValueError) as error:
            return cls(shard, None, about, [str(error)])
        names = ("bytes", "sha256")
        about |= {name: table.schema.metadata[name.encode()].decode() for name in names}
        return cls(shard, table.to_pylist(), about, [])

    def see(self, sample: Sample, pair: RawPair | None) -> None:
        """The next sample; `pair` is None where it is none."""
        number = len(self.labels)
        self.labels.append(None if pair is None else pair.label_0)
        if self.stored is None or number >= len(self.stored):
            return
        stored = dict(self.stored[number])
        stored["label_0"] = None if stored["label_0"] != stored["label_0"] else stored["label_0"]
        found = {"key": sample.key, "offset": sample.offset, "size": sample.size, "label_0": self.labels[-1]}
        if pair is not None:
            found["prompt"] = pair.prompt
            if stored["content"]:  # else the images were not read
                found["content"] = content_digest(pair)
                sizes = (*upright_size(pair.image_0), *upright_size(pair.image_1))
                found |= dict(zip(SIZES, sizes, strict=True))
        for name, value in found.items():
            if stored[name] != value:
                self.counts[name] = self.counts.get(name, 0) + 1
                said = f"first at key {sample.key}: index {_short(stored[name])}, shard {_short(value)}"
                self.first.setdefault(name, said)

    def finish(self, whole: bool) -> list[str]:
        """All differences, after the last sample; `whole` says whether the shard was readable to its end."""
        found = list(self.differences)
        if self.stored is not None and whole and len(self.stored) != len(self.labels):
            found.append(f"samples: index {len(self.stored)}, shard {len(self.labels)}")
        found += [f"{name}: {count} rows differ, {self.first[name]}" for name, count in self.counts.items()]
        if whole:
            try:
                facts = within(None, self.shard, self._facts)
            except OSError as error:
                return [*found, f"its bytes could not be read once more: {error}"]
            for name, said in self.about.items():
                value = facts[name.removeprefix("index.json: ")]
                if str(said) != str(value):
                    found.append(f"{name}: index {_short(said)}, shard {_short(value)}")
        return found

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


def _short(value: Any) -> str:
    if value is None:
        return "broken"
    text = repr(value) if isinstance(value, str) and not value.isalnum() else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
