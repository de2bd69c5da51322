"""Compare a shard with its index."""

from typing import Any

from lit_align.data.shards.index import SIZES, ShardEntry, digest_shard, read_rows, sample_row
from lit_align.data.shards.layout import Sample
from lit_align.data.shards.storage import exists
from lit_align.data.shards.timeouts import within

ALWAYS = ("key", "offset", "size", "label_0")  # columns compared for every sample
OF_PAIRS = ("prompt", "content", *SIZES)  # columns compared for valid pairs


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
        self.labels: list[float] = []  # NaN for a broken sample
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
        about |= {name: table.schema.metadata[name.encode()].decode() for name in ("bytes", "sha256")}
        return cls(shard, table.to_pylist(), about, [])

    def add(self, sample: Sample, seen: bool) -> None:
        """Compare the next sample; `seen` says that the shard had its key before."""
        number = len(self.labels)
        stored = self.stored[number] if self.stored is not None and number < len(self.stored) else None
        whole = stored is not None and stored["content"] != ""  # otherwise the index has not read the images
        row = sample_row(sample, whole, whole, seen)
        self.labels.append(row["label_0"])
        if stored is None:
            return
        for name in ALWAYS if row["fault"] is not None else (*ALWAYS, *OF_PAIRS):
            old, new = stored[name], row[name]
            if old != new and (old == old or new == new):  # NaN equals NaN here
                self.counts[name] = self.counts.get(name, 0) + 1
                text = f"first at key {sample.key}: index {_short(old)}, shard {_short(new)}"
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
        broken, ties = sum(label != label for label in self.labels), self.labels.count(0.5)
        try:
            facts: dict[str, Any] = within(None, self.shard, lambda: digest_shard(self.shard))
        except OSError as error:
            return [f"its bytes could not be read again: {error}"]
        facts |= {"samples": len(self.labels), "pairs": len(self.labels) - broken - ties}
        facts |= {"ties": ties, "broken": broken}
        pairs = [(name, stored, facts[name.removeprefix("index.json: ")]) for name, stored in self.about.items()]
        return [f"{name}: index {_short(a)}, shard {_short(b)}" for name, a, b in pairs if str(a) != str(b)]


def _short(value: Any) -> str:
    if value != value:
        return "broken"  # NaN
    text = repr(value) if isinstance(value, str) and not value.isalnum() else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
