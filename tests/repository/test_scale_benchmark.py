"""The benchmark of scale runs at tiny size, and its record has a row for each way and size."""

import json
import subprocess
import sys

from benchmarks import scale
from lit_align.data import PreferenceDataModule
from tests.support.paths import ROOT

MEASURED = {"set-up, CPU s", "set-up, s", "digests, CPU s", "first address, CPU s", "addresses, CPU us a pair"}
MEASURED |= {"state, CPU s", "state bytes", "peak MB", "kept MB"}


def test_every_way_is_measured_at_each_size(tmp_path):
    options = ["--out", tmp_path / "record", "--work", tmp_path / "work", "--shards", 2, 5, "--pairs", 50]
    command = [sys.executable, "benchmarks/scale.py", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads((tmp_path / "record/results.json").read_text())["results"]
    named = {(row["stage"], row["name"]) for row in rows}
    assert named == {
        (f"{mode}: {how}", f"{shards} shards")
        for mode in ("labels", "buckets", "vote")
        for how in ("start", "resume")
        for shards in (2, 5)
    }
    assert all(row.keys() >= MEASURED for row in rows), rows
    pairs = {row["name"]: row["pairs"] for row in rows if row["stage"] == "labels: start"}
    assert 80 < pairs["2 shards"] <= 100
    assert 230 < pairs["5 shards"] <= 250
    assert len({row["state bytes"] for row in rows if row["stage"] == "vote: start"}) <= 2  # digits of the counts
    assert "| 5 shards |" in (tmp_path / "record/results.md").read_text()


def test_the_shards_have_an_index_that_a_run_accepts(tmp_path):
    scale.write_shards(tmp_path / "shards", 3, 40)
    data = PreferenceDataModule(str(tmp_path / "shards/index.json"), num_workers=0, **scale.MODES["vote"])
    data.setup("fit")
    assert [shard.content_known_from for shard in data.train.shards] == ["index"] * 3
    assert sum(len(shard) + shard.ties for shard in data.train.shards) == 120
    assert all((shard.pairs.content > 0).all() for shard in data.train.shards)
