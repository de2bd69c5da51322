"""Indexing of existing shards."""

import hashlib
import json
import os

import fsspec
import pytest

from lit_align.cli import main
from lit_align.commands.importing.command import pick_a_pic, webdataset
from lit_align.data.shards.index import read_index, read_rows
from lit_align.data.shards.writer import NewPair, write_shard
from tests.support.imports import BUNDLED, files, rejects


def shard_of(path, numbers, **changes):
    """Write a shard of bundled pairs; `changes` are labels by key."""
    pairs = [BUNDLED[number] for number in numbers]
    write_shard(path, [NewPair(p.key, p.image_0, p.image_1, changes.get(p.key, p.label_0), p.prompt) for p in pairs])
    return path


def break_label(path, label):
    """Replace the first sample's label_0 by another one of equal length."""
    data = path.read_bytes()
    at = data.index(b".label_0.txt") // 512 * 512 + 512
    path.write_bytes(data[:at] + label + data[at + len(label) :])


def test_webdataset(tmp_path, capsys):
    shards = [
        shard_of(tmp_path / f"{name}.tar", numbers) for name, numbers in {"a": range(4), "b": range(4, 9)}.items()
    ]
    break_label(shards[1], b"7")
    before = files(tmp_path)
    main(["import", "webdataset", f"--shards={tmp_path}/*.tar", "--workers=1"])
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before)) == ["a.index.parquet", "b.index.parquet", "index.json", "rejects.jsonl"]
    index = json.loads(after["index.json"])
    assert [(entry["name"], entry["pairs"], entry["broken"]) for entry in index["shards"]] == [
        ("a.tar", 4, 0),
        ("b.tar", 4, 1),
    ]
    assert index["shards"][1]["sha256"] == hashlib.sha256(before["b.tar"]).hexdigest()
    assert rejects(tmp_path) == [(0, "b.tar, sample 0", "label_0.txt is '7'")]
    assert "8 pairs" in capsys.readouterr().out

    times = files(tmp_path, mtimes=True)
    webdataset(f"{tmp_path}/*.tar", workers=2)
    assert files(tmp_path, mtimes=True) == times
    assert "2 shards (2 done before)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"index.json names 1 shards that are not named now, first b.tar"):
        webdataset(f"{tmp_path}/a.tar", workers=1)

    shard_of(shards[1], range(4, 9))  # repaired, of the same size
    os.utime(shards[1], ns=(times["b.index.parquet"] + 10**9,) * 2)
    webdataset(f"{tmp_path}/*.tar", workers=1)
    assert json.loads((tmp_path / "index.json").read_text())["totals"]["pairs"] == 9
    assert rejects(tmp_path) == []


def test_webdataset_elsewhere(tmp_path, monkeypatch):
    """The index of shards in several folders, or on the network, has their full names."""
    paths = [shard_of(tmp_path / f"{name}.tar", range(3)) for name in ("one/a", "two/b")]
    with pytest.raises(ValueError, match="the shards lie in 2 folders; name a local folder"):
        webdataset([str(path) for path in paths], workers=1)
    monkeypatch.chdir(tmp_path)
    webdataset("{one/a,two/b}.tar", "index", workers=2)
    assert [path for path, _ in read_index("index/index.json")] == [str(path) for path in paths]
    assert sorted(files(tmp_path / "one")) == ["a.tar"]
    assert len(read_rows("index/b.index.parquet")) == 3

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/import/c.tar", paths[0].read_bytes())
    with pytest.raises(ValueError, match="the shards lie on the network"):
        webdataset("memory://import/*.tar", workers=1)
    webdataset("memory://import/*.tar", "remote", workers=1)
    assert [path for path, _ in read_index("remote/index.json")] == ["memory:///import/c.tar"]
    with pytest.raises(ValueError, match="have one name"):
        webdataset(["one/a.tar", str(shard_of(tmp_path / "two/a.tar", [1]))], "twice", workers=1)


def test_webdataset_leaves_other_indexes_alone(parquet, tmp_path):
    pick_a_pic(str(tmp_path / "out"), parquet, workers=1)
    with pytest.raises(ValueError, match=r"out has import.json"):
        webdataset(f"{tmp_path}/out/*.tar", workers=1)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    """Shards of other programs may have it, and invisible spaces too."""
    pair = BUNDLED[0]
    write_shard(tmp_path / "a.tar", [NewPair("0", pair.image_0, pair.image_1, 1.0, "\ufeffa red\u200b fox")])
    webdataset(f"{tmp_path}/a.tar", workers=1)
    assert read_rows(f"{tmp_path}/a.index.parquet")["prompt"].to_pylist() == ["a red fox"]
