"""Rows to import, and what an import has written."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lit_align.data.shards.index import read_index, read_rows
from lit_align.data.shards.layout import parse_sample, read_samples
from tests.support.paths import PAIRS

BUNDLED = [parse_sample(sample) for i in range(2) for sample in read_samples(str(PAIRS / f"train/0000{i}.tar"))]


def encoded(data, kind):
    """Encode an image in another format."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def row(number, label_0=None, **changes):
    """A row of Pick-a-Pic, made of a bundled pair."""
    pair = BUNDLED[number]
    label_0 = pair.label_0 if label_0 is None else label_0
    return {
        "jpg_0": encoded(pair.image_0, "WEBP"),  # also under the name jpg
        "jpg_1": pair.image_1,
        "label_0": label_0,
        "label_1": 1 - label_0,
        "caption": pair.prompt,
        "model_0": "dreamlike",
        "ranking_id": 7000 + number,
        "has_label": True,
        **changes,
    }


def write_parquet(path, rows, kind=None, **changes):
    """Write rows as Parquet, `kind` being the type of both labels and `changes` those of other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, type_ in {"label_0": kind, "label_1": kind, **changes}.items():
        if type_ is not None:
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(type_))
    pq.write_table(table, path, row_group_size=3)
    return str(path)


def read_all(folder):
    """Check an index, and read all pairs with the facts stored as JSON."""
    index = json.loads((folder / "index.json").read_text())
    found = []
    for entry, (shard, rows) in zip(index["shards"], read_index(str(folder / "index.json")), strict=True):
        data = Path(shard).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        samples = list(read_samples(shard))
        pairs = [parse_sample(sample) for sample in samples]
        ties = sum(pair.label_0 == 0.5 for pair in pairs)
        counts = {"samples": len(pairs), "pairs": len(pairs) - ties, "ties": ties, "broken": 0}
        assert {name: entry[name] for name in counts} == counts
        assert read_rows(rows)["key"].to_pylist() == [pair.key for pair in pairs]
        found += [(pair, json.loads(sample.fields["json"])) for pair, sample in zip(pairs, samples, strict=True)]
    assert index["totals"]["samples"] == len(found)
    return found


def rejects(folder):
    """Row, location and reason of each rejected row; checks that the index counts them."""
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    counted = json.loads((folder / "index.json").read_text())["import"]["rejects"]
    assert counted == {why: sum(line["reason"] == why for line in lines) for why in {line["reason"] for line in lines}}
    return [(line["row"], line["place"], line["reason"]) for line in lines]


def files(folder, mtimes=False):
    """Content, or time of change, of all files in a folder."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.stat().st_mtime_ns if mtimes else path.read_bytes() for name, path in found.items()}


def as_read(number, label_0=None):
    """Images, label and prompt of the pair that `row` becomes."""
    wanted = row(number, label_0)
    return wanted["jpg_0"], wanted["jpg_1"], wanted["label_0"], wanted["caption"]


LEFT_OUT = [
    (3, "train-0.parquet, row 3", "no label"),
    (5, "train-0.parquet, row 5", "image cannot be decoded"),
    (8, "train-1.parquet, row 1", "both images are the same"),
    (9, "train-1.parquet, row 2", "labels do not add up to 1"),
    (10, "train-1.parquet, row 3", "image missing"),
]
