"""Importers: every row becomes a pair or is listed, and an import that was killed ends up as if it had not been."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from PIL import Image

from lit_align.cli import main
from lit_align.commands.importing.command import folder, hpd, pick_a_pic, webdataset
from lit_align.data.importers import import_run as import_shards
from lit_align.data.importers import pick_a_pic as parquet_files
from lit_align.data.importers.import_manifest import held
from lit_align.data.importers.rejects import Rejected
from lit_align.data.importers.source import check_image, parse_label, parse_labels, shuffle_images
from lit_align.data.shards.index import read_index, read_rows
from lit_align.data.shards.layout import SampleError, parse_sample, read_samples
from lit_align.data.shards.writer import NewPair, write_shard
from tests.support.paths import PAIRS

BUNDLED = [parse_sample(sample) for i in range(2) for sample in read_samples(str(PAIRS / f"train/0000{i}.tar"))]


def encoded(data, kind):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def row(number, label_0=None, **changes):
    pair = BUNDLED[number]
    label_0 = pair.label_0 if label_0 is None else label_0
    return {
        "jpg_0": encoded(pair.image_0, "WEBP"),  # whatever the column's name says
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
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, type_ in {"label_0": kind, "label_1": kind, **changes}.items():
        if type_ is not None:
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(type_))
    pq.write_table(table, path, row_group_size=3)
    return str(path)


def read_all(folder):
    """All pairs through the index, with what is kept as JSON, after a check of the index itself."""
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
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    counted = json.loads((folder / "index.json").read_text())["import"]["rejects"]
    assert counted == {why: sum(line["reason"] == why for line in lines) for why in {line["reason"] for line in lines}}
    return [(line["row"], line["place"], line["reason"]) for line in lines]


def files(folder, mtimes=False):
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.stat().st_mtime_ns if mtimes else path.read_bytes() for name, path in found.items()}


def as_read(number, label_0=None):
    wanted = row(number, label_0)
    return wanted["jpg_0"], wanted["jpg_1"], wanted["label_0"], wanted["caption"]


# -- Pick-a-Pic


@pytest.fixture
def parquet(tmp_path):
    """Two files of 7 and 5 rows: row groups of 3, a tie, and all that leaves rows out."""
    good, cut = BUNDLED[1].image_1, encoded(BUNDLED[1].image_1, "JPEG")[:-20]
    first = [row(0), row(1, 0.5), row(2, 0.0), row(3, has_label=False), row(4), row(5, jpg_1=cut), row(6)]
    second = [row(7), row(8, jpg_0=good, jpg_1=good), row(9, label_1=1.0, label_0=1.0), row(10, jpg_0=None), row(11)]
    write_parquet(tmp_path / "data/train-0.parquet", first)
    write_parquet(tmp_path / "data/train-1.parquet", second)
    return f"{tmp_path}/data/train-*.parquet"


LEFT_OUT = [
    (3, "train-0.parquet, row 3", "no label"),
    (5, "train-0.parquet, row 5", "image cannot be decoded"),
    (8, "train-1.parquet, row 1", "both images are the same"),
    (9, "train-1.parquet, row 2", "labels do not add up to 1"),
    (10, "train-1.parquet, row 3", "image missing"),
]


def test_pick_a_pic(parquet, tmp_path, capsys):
    output = tmp_path / "out"
    main(["import", "pick-a-pic", f"--files={parquet}", f"--output={output}", "--pairs_per_shard=5", "--workers=1"])
    pairs = read_all(output)
    assert [pair.key for pair, _ in pairs] == [f"{number:08d}" for number in (0, 1, 2, 4, 6, 7, 11)]
    for (pair, more), number in zip(pairs, (0, 1, 2, 4, 6, 7, 11), strict=True):
        label = {1: 0.5, 2: 0.0}.get(number)
        assert (pair.image_0, pair.image_1, pair.label_0, pair.prompt) == as_read(number, label)
        assert more == {"model_0": "dreamlike", "ranking_id": 7000 + number, "has_label": True}
    assert rejects(output) == LEFT_OUT
    assert sorted(files(output)) == [
        *(f"0000{i}.{end}" for i in range(3) for end in ("index.parquet", "tar")),
        "import.json",
        "index.json",
        "rejects.jsonl",
    ]
    assert "jpg_0.webp" in next(read_samples(str(output / "00000.tar"))).fields
    said = " ".join(capsys.readouterr().out.split())
    assert "3 shards (0 done before) of 12 rows 6 pairs 1 ties, which do not train 5 left out" in said
    assert "1 image cannot be decoded" in said


def test_integer_labels_and_image_structs(tmp_path):
    """Pick-Style has labels of int64; `datasets` writes images as structs of bytes and path."""
    rows = [row(number, 1 - number % 2) for number in range(4)]
    for one in rows:
        one |= {name: {"bytes": one[name], "path": None} for name in ("jpg_0", "jpg_1")}
    write_parquet(tmp_path / "a.parquet", rows, pa.int64())
    write_parquet(tmp_path / "b.parquet", [row(4, 1.0)], pa.float32(), jpg_0=pa.large_binary())
    pick_a_pic(str(tmp_path / "out"), f"{tmp_path}/{{a,b}}.parquet", workers=1)
    pairs = [pair for pair, _ in read_all(tmp_path / "out")]
    assert [pair.label_0 for pair in pairs] == [1, 0, 1, 0, 1]
    assert [(pair.image_0, pair.image_1) for pair in pairs] == [as_read(number)[:2] for number in range(5)]


def test_any_division_reads_every_row_once(parquet):
    source = parquet_files.open_files(parquet)
    assert [table.groups for table in source.tables] == [(3, 3, 1), (3, 2)]
    whole = list(source.part(0, 12).pairs_and_rejects())
    assert [one.key for one in whole] == [f"{number:08d}" for number in range(12)]
    for size in (1, 2, 4, 7):
        assert [
            one for at in range(0, 12, size) for one in source.part(at, min(at + size, 12)).pairs_and_rejects()
        ] == whole


def test_columns_are_read_lazily(parquet, monkeypatch):
    """A part opens the files and row groups that it needs, and from these the columns that it needs."""
    asked = []
    read = pq.ParquetFile.iter_batches

    def spy(self, size, groups, columns, **more):
        asked.append((size, groups, columns))
        return read(self, size, groups, columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert len(list(parquet_files.open_files(parquet).part(4, 8).pairs_and_rejects())) == 4
    assert [(size, groups) for size, groups, _ in asked] == [(32, [1]), (32, [2]), (32, [0])]
    assert asked[0][2] == ["jpg_0", "jpg_1", "label_0", "label_1", "caption", "model_0", "ranking_id", "has_label"]


def test_faulty_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [{name: value for name, value in row(0).items() if name not in ("jpg_1", "label_0")}])
    with pytest.raises(ValueError, match=r"a.parquet: column jpg_1, label_0 is missing; there are jpg_0, label_1, cap"):
        pick_a_pic(str(tmp_path / "out"), str(path), workers=1)
    write_parquet(path, [row(0, jpg_0="http://gone/0.jpg")])
    with pytest.raises(ValueError, match="column jpg_0 is of type string; it must hold encoded images"):
        pick_a_pic(str(tmp_path / "out"), str(path), workers=1)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as Parquet.*git lfs pull"):
        pick_a_pic(str(tmp_path / "out"), str(path), workers=1)
    with pytest.raises(ValueError, match=r"is a folder. Name the files in it: '.*/\*.parquet'"):
        pick_a_pic(str(tmp_path / "out"), str(tmp_path), workers=1)
    with pytest.raises(ValueError, match="named twice"):
        pick_a_pic(str(tmp_path / "out"), [str(path), str(path)], workers=1)
    with pytest.raises(ValueError, match="--files or --repo"):
        pick_a_pic(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_hub_repository(parquet, tmp_path, monkeypatch):
    """The listing and the reading go through fsspec's `hf:`; a local folder stands in for the hub."""
    hub = tmp_path / "hub"
    shutil.copytree(tmp_path / "data", hub / "datasets/someone/pick-a-pic@main/data")

    class Hub(DirFileSystem):
        protocol = "hf"

        def __init__(self, **options):
            super().__init__(str(hub), LocalFileSystem())

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("hf://")

        def unstrip_protocol(self, name):
            return f"hf://{name}"

    monkeypatch.setitem(_registry, "hf", Hub)
    pick_a_pic(str(tmp_path / "remote"), repo="someone/pick-a-pic", pairs_per_shard=5, workers=1)
    pick_a_pic(str(tmp_path / "local"), parquet, pairs_per_shard=5, workers=1)
    assert files(tmp_path / "remote") == files(tmp_path / "local")
    with pytest.raises(FileNotFoundError, match=r"hf://datasets/someone/pick-a-pic@main/data/none-\*"):
        pick_a_pic(str(tmp_path / "out"), repo="someone/pick-a-pic", pattern="data/none-*")
    assert (
        parquet_files.hub_files("a/b", "refs/convert/parquet", "x*") == "hf://datasets/a/b@refs%2Fconvert%2Fparquet/x*"
    )
    with pytest.raises(ValueError, match="'pick-a-pic' is not the name of a data set"):
        pick_a_pic(str(tmp_path / "out"), repo="pick-a-pic")


def test_remote_reads_are_tried_again(parquet, tmp_path, monkeypatch, capsys):
    """A network that fails for a moment does not end an import of a night; a file that is not there does."""
    real, faults = parquet_files.open_binary, [OSError("503"), OSError("timed out")]

    def open_binary(path):
        if faults and (tmp_path / "out/import.json").is_file():  # while shards are written
            raise faults.pop()
        return real(path)

    pattern = parquet.replace(str(tmp_path), f"local://{tmp_path}")
    monkeypatch.setattr(parquet_files, "open_binary", open_binary)
    monkeypatch.setattr(import_shards, "PAUSES", (0.0, 0.0))
    pick_a_pic(str(tmp_path / "out"), pattern, pairs_per_shard=5, workers=1)
    assert not faults
    assert "00000.tar: OSError: timed out. Trying again in 0 s." in capsys.readouterr().out
    pick_a_pic(str(tmp_path / "unbroken"), parquet, pairs_per_shard=5, workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


# -- going on


def test_two_workers_write_what_one_writes(parquet, tmp_path):
    for workers in (1, 2):
        pick_a_pic(str(tmp_path / f"{workers}"), parquet, pairs_per_shard=2, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert rejects(tmp_path / "2") == LEFT_OUT
    assert not (tmp_path / "2/00004.tar").exists()  # both of its rows were left out
    assert len(json.loads((tmp_path / "2/index.json").read_text())["shards"]) == 5


def test_killed_import_goes_on(tmp_path):
    """SIGKILL in the middle: what was done stays as it is, and the end is that of an import that nobody killed."""
    rows = [row(number, jpg_1=b"broken" if number % 7 == 3 else BUNDLED[number].image_1) for number in range(26)]
    source = write_parquet(tmp_path / "a.parquet", rows * 6)
    pick_a_pic(str(tmp_path / "unbroken"), source, pairs_per_shard=2, workers=1)

    output = tmp_path / "out"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([import_shards.__name__])
    process = context.Process(
        target=pick_a_pic, args=(str(output), source), kwargs={"pairs_per_shard": 2, "workers": 2}
    )
    process.start()
    while len(list(output.glob(".import/*.json"))) < 5 and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    while True:  # workers end with their parent
        before = files(output, mtimes=True)
        time.sleep(0.3)
        if files(output, mtimes=True) == before:
            break
    done = [Path(name).stem for name in before if name.startswith(".import/") and name.endswith(".json")]
    assert 5 <= len(done) < 78
    assert "index.json" not in before

    (output / ".00007.tar.1234abcd.part").write_bytes(b"half of it")  # as a machine that went down leaves it
    pick_a_pic(str(output), source, pairs_per_shard=2, workers=1)
    assert files(output) == files(tmp_path / "unbroken")
    after = files(output, mtimes=True)
    for name in (f"{number}.tar" for number in done):
        assert after.get(name) == before.get(name)
    assert len(rejects(output)) == 6 * 4
    pick_a_pic(str(output), source, pairs_per_shard=2, workers=1)
    assert files(output, mtimes=True) == after


def test_second_run_restores_what_was_lost(parquet, tmp_path, capsys):
    output = tmp_path / "out"
    pick_a_pic(str(output), parquet, pairs_per_shard=2, workers=1)
    before, times = files(output), files(output, mtimes=True)
    (output / "00001.tar").unlink()
    (output / "00002.tar").write_bytes(b"cut")
    pick_a_pic(str(output), parquet, pairs_per_shard=2, workers=1)
    assert "5 shards (4 done before)" in capsys.readouterr().out  # the one without pairs is done, too
    assert files(output) == before
    assert files(output, mtimes=True)["00000.tar"] == times["00000.tar"]
    (output / "00003.tar").unlink()
    (output / "rejects.jsonl").unlink()
    pick_a_pic(str(output), parquet, pairs_per_shard=2, workers=1)
    assert files(output) == before


def test_other_plans_are_refused(parquet, tmp_path):
    output = tmp_path / "out"
    pick_a_pic(str(output), parquet, pairs_per_shard=5, workers=1)
    before = files(output, mtimes=True)
    with pytest.raises(ValueError, match=r"pairs_per_shard was 5 and is 4. Go on with .* delete this one"):
        pick_a_pic(str(output), parquet, pairs_per_shard=4, workers=1)
    with pytest.raises(ValueError, match=r"train-1.parquet is gone"):
        pick_a_pic(str(output), parquet.replace("*", "0"), pairs_per_shard=5, workers=1)
    write_parquet(tmp_path / "data/train-1.parquet", [row(7)])
    with pytest.raises(ValueError, match=r"train-1.parquet had 5 rows and has 1"):
        pick_a_pic(str(output), parquet, pairs_per_shard=5, workers=1)
    assert files(output, mtimes=True) == before
    (tmp_path / "mine").mkdir()
    shutil.copy(output / "00000.tar", tmp_path / "mine")
    with pytest.raises(ValueError, match=r"holds 00000.tar and has no import.json"):
        pick_a_pic(str(tmp_path / "mine"), parquet, workers=1)
    with pytest.raises(ValueError, match="not a local folder"):
        pick_a_pic("s3://bucket/pairs", parquet, workers=1)


def test_moved_source_goes_on(parquet, tmp_path):
    output = tmp_path / "out"
    pick_a_pic(str(output), parquet, pairs_per_shard=5, workers=1)
    before = files(output, mtimes=True)
    (tmp_path / "data").rename(tmp_path / "scratch")
    pick_a_pic(str(output), f"{tmp_path}/scratch/*.parquet", pairs_per_shard=5, workers=2)
    assert files(output, mtimes=True) == before


def test_one_import_at_a_time(parquet, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    with held(output), pytest.raises(RuntimeError, match=r"another import writes to .*out. Start one process only"):
        pick_a_pic(str(output), parquet, workers=1)

    def no_locks(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as on some network folders
    pick_a_pic(str(output), parquet, workers=1)
    assert len(read_all(output)) == 7


def test_what_was_missing_is_tried_again(tmp_path):
    """A folder named wrongly leaves nothing behind, and an unfinished import asks again for what was missing."""
    source = tmp_path / "pairs.csv"
    source.write_text("image_0,image_1,prompt,label\na.png,b.png,one,1\n")
    with pytest.raises(ValueError, match="Not one of 1 rows is a pair: 1 x image missing"):
        folder(str(tmp_path / "out"), str(source), workers=1)
    (tmp_path / "a.png").write_bytes(BUNDLED[0].image_0)
    (tmp_path / "b.png").write_bytes(BUNDLED[0].image_1)
    folder(str(tmp_path / "out"), str(source), workers=1)
    assert len(list(read_samples(str(tmp_path / "out/00000.tar")))) == 1


def test_a_table_runs_no_command(tmp_path):
    (tmp_path / "a.png").write_bytes(BUNDLED[0].image_0)
    source = tmp_path / "pairs.csv"
    source.write_text(f"image_0,image_1,prompt,label\na.png,pipe:touch {tmp_path}/ran,one,1\n")
    with pytest.raises(ValueError, match="1 x image"):
        folder(str(tmp_path / "out"), str(source), workers=1)
    assert not (tmp_path / "ran").exists()


def test_an_index_follows_its_shards(tmp_path):
    """One damaged shard neither stops the others nor leaves an old index behind."""
    for number in range(3):
        shutil.copy(PAIRS / f"train/0000{number}.tar", tmp_path)
    webdataset(f"{tmp_path}/00000.tar", workers=1)
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[:5000])
    with pytest.raises(SampleError, match=r"1 of 3 shards have no index, the others are done: .*00001\.tar"):
        webdataset(f"{tmp_path}/*.tar", workers=1)
    (tmp_path / "00001.tar").unlink()
    webdataset(f"{tmp_path}/*.tar", workers=1)
    assert json.loads((tmp_path / "index.json").read_text())["totals"]["pairs"] == 52


def test_no_pair_is_an_error(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [row(0, jpg_0=b"no image"), row(1, has_label=False)])
    for _ in range(2):
        with pytest.raises(ValueError, match="Not one of 2 rows is a pair: 1 x image cannot be decoded, 1 x no label"):
            pick_a_pic(str(tmp_path / "out"), source, workers=1)
    assert sorted(files(tmp_path / "out")) == ["rejects.jsonl"]
    assert len((tmp_path / "out/rejects.jsonl").read_text().splitlines()) == 2


# -- tar shards


def shard_of(path, numbers, **changes):
    pairs = [BUNDLED[number] for number in numbers]
    write_shard(path, [NewPair(p.key, p.image_0, p.image_1, changes.get(p.key, p.label_0), p.prompt) for p in pairs])
    return path


def break_label(path, label):
    """The first sample's label_0 is another of the same length."""
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
    """Shards in several folders, or on the network, are named in full."""
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


# -- HPDv2


@pytest.fixture
def images(tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(6):
        (tmp_path / f"train/{number}.jpg").write_bytes(BUNDLED[number].image_0)
    return tmp_path


def test_hpd_train(images):
    entries = [
        {"prompt": "first", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0], "user_hash": "u"},
        {"prompt": "second", "file_path": ["2.jpg", "3.jpg"], "human_preference": [0, 1]},
        {"prompt": "gone", "file_path": ["4.jpg", "9.jpg"], "human_preference": [1, 0]},
        {"prompt": "both", "file_path": ["4.jpg", "5.jpg"], "human_preference": [1, 1]},
        {"prompt": "one", "file_path": ["4.jpg"], "human_preference": [1]},
        {"prompt": "odd", "file_path": ["4.jpg", "5.jpg"], "human_preference": [1]},
        {"prompt": "best of three", "file_path": ["0.jpg", "1.jpg", "2.jpg"], "human_preference": [0, 1, 0]},
    ]
    (images / "train.json").write_text(json.dumps(entries))
    main(["import", "hpd", f"--annotations={images}/train.json", f"--output={images}/out", "--workers=1"])
    pairs = read_all(images / "out")
    assert [(pair.prompt, pair.label_0, more["image_0"], more["image_1"]) for pair, more in pairs] == [
        ("first", 1, "0.jpg", "1.jpg"),
        ("second", 0, "2.jpg", "3.jpg"),
        ("best of three", 0, "0.jpg", "1.jpg"),
        ("best of three", 1, "1.jpg", "2.jpg"),
    ]
    assert pairs[0][1] == {"entry": 0, "image_0": "0.jpg", "image_1": "1.jpg", "user_hash": "u"}
    assert (pairs[1][0].image_0, pairs[1][0].image_1) == (BUNDLED[2].image_0, BUNDLED[3].image_0)
    assert rejects(images / "out") == [
        (2, "train.json, entry 2, images 0 and 1", "image missing"),
        (3, "train.json, entry 3, images 0 and 1", "labels do not add up to 1"),
        (4, "train.json, entry 4, images 0 and 1", "fewer than two images"),
        (5, "train.json, entry 5, images 0 and 1", "human_preference is not one number for each image"),
        (7, "train.json, entry 6, images 0 and 2", "labels do not add up to 1"),
    ]


def test_hpd_rankings(images):
    """The majority of the annotators decides, pair by pair; without annotators the rank does."""
    ranks = [[1, 2, 3], [2, 1, 3], [1, 3, 2], [3, 1, 2]]
    raw = [{"rank": rank, "user_hash": "u"} for rank in ranks]
    names = ["0.jpg", "1.jpg", "2.jpg"]
    entries = [
        {"prompt": "raw", "image_path": names, "rank": [3, 2, 1], "raw_annotations": raw},
        {"prompt": "lists", "image_path": names, "raw_annotations": ranks[:1]},
        {"prompt": "rank", "image_path": names, "rank": [2, 2, 1]},
    ]
    (images / "test.json").write_text(json.dumps(entries))
    for workers in (1, 2):
        hpd(f"{images}/{workers}", f"{images}/test.json", f"{images}/train", pairs_per_shard=2, workers=workers)
    pairs = read_all(images / "1")
    assert files(images / "1") == files(images / "2")
    assert [pair.label_0 for pair, _ in pairs] == [0.5, 1, 1, 1, 1, 1, 0.5, 0, 0]
    assert [(more["votes_0"], more["votes_1"]) for _, more in pairs[:3]] == [(2, 2), (3, 1), (3, 1)]
    assert pairs[7][1] == {"entry": 2, "image_0": "0.jpg", "image_1": "2.jpg", "rank_0": 2, "rank_1": 1}
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/test. Name the one"):
        hpd(f"{images}/3", f"{images}/test.json", workers=1)
    (images / "train.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no list of entries but a dict"):
        hpd(f"{images}/3", f"{images}/train.json", workers=1)


# -- tables and folders


def test_labelled_table(images):
    lines = [
        ["image_0", "image_1", "prompt", "label", "who"],
        ["train/0.jpg", "train/1.jpg", "a, b", "1", "x"],
        ["train/1.jpg", "train/2.jpg", "two\nlines", "0.5", "y"],
        ["train/2.jpg", "train/3.jpg", "", "0.0", ""],
        [str(images / "train/3.jpg"), "train/9.jpg", "gone", "1", ""],
        ["train/3.jpg", "", "no name", "1", ""],
        ["train/3.jpg", "train/4.jpg", "label", "2", ""],
        ["train/3.jpg", "train/4.jpg", "short"],
    ]
    for name, separator in {"pairs.csv": ",", "pairs.tsv": "\t"}.items():
        with (images / name).open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=separator).writerows(lines)
        output = images / f"{name}.out"
        main(["import", "folder", f"--table={images}/{name}", f"--output={output}", "--workers=1"])
        pairs = read_all(output)
        assert [(pair.prompt, pair.label_0) for pair, _ in pairs] == [("a, b", 1), ("two\nlines", 0.5), ("", 0)]
        assert (pairs[2][0].image_0, pairs[2][0].image_1) == (BUNDLED[2].image_0, BUNDLED[3].image_0)
        assert pairs[0][1] == {"who": "x", "image_0": "train/0.jpg", "image_1": "train/1.jpg"}
        assert rejects(output) == [
            (3, f"{name}, line 6", "image missing"),
            (4, f"{name}, line 7", "image missing"),
            (5, f"{name}, line 8", "label is not 0, 0.5 or 1"),
            (6, f"{name}, line 9", "row cannot be read"),
        ]


def test_chosen_and_rejected_table(images):
    """Which one becomes image 0 is drawn from the pair's key; the label says it."""
    rows = [{"good": f"train/{i % 5}.jpg", "bad": "train/5.jpg", "prompt": f"p {i}", "n": [i]} for i in range(20)]
    lines = [*map(json.dumps, rows), "{broken", "[]", json.dumps({**rows[0], "prompt": None}), ""]
    (images / "pairs.jsonl").write_text("\n".join(lines))
    names = ["--chosen_column=good", "--rejected_column=bad"]
    main(["import", "folder", f"--table={images}/pairs.jsonl", f"--output={images}/out", "--workers=1", *names])
    pairs = read_all(images / "out")
    for number, (pair, more) in enumerate(pairs):
        two = [pair.image_0, pair.image_1] if pair.label_0 == 1 else [pair.image_1, pair.image_0]
        assert two == [BUNDLED[number % 5].image_0, BUNDLED[5].image_0]
        assert (pair.prompt, more["n"]) == (f"p {number}", [number])
    assert {pair.label_0 for pair, _ in pairs} == {0.0, 1.0}
    assert 400 < sum(shuffle_images(f"{number:08d}", [0, 1])[0] for number in range(1000)) < 600
    assert [(row_, why) for row_, _, why in rejects(images / "out")] == [
        (20, "row cannot be read"),
        (21, "row cannot be read"),
        (22, "prompt missing"),
    ]
    with pytest.raises(ValueError, match=r"must have columns image_0, .* and has neither; it has good, bad, prompt, n"):
        folder(str(images / "out2"), f"{images}/pairs.jsonl", workers=1)
    (images / "pairs.jsonl").write_text("\n".join(lines[:5]))
    with pytest.raises(ValueError, match=r"pairs.jsonl had [0-9a-f]+ sha256 and has"):
        folder(str(images / "out"), f"{images}/pairs.jsonl", chosen_column="good", rejected_column="bad", workers=1)


def test_two_folders(tmp_path):
    for number, pair in enumerate(BUNDLED[:5]):
        for kind, data, suffix in (("good", pair.image_0, "png"), ("bad", encoded(pair.image_1, "JPEG"), "jpg")):
            path = tmp_path / kind / "sub" / f"{number}.v1.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        place = tmp_path / ("good" if number % 2 else "bad") / "sub" / f"{number}.v1.txt"
        place.write_text(f"prompt {number}\n")
    (tmp_path / "bad/sub/4.v1.txt").unlink()
    (tmp_path / "good/alone.png").write_bytes(BUNDLED[0].image_0)
    (tmp_path / "bad/sub/3.v1.png").write_bytes(BUNDLED[0].image_0)
    words = [f"--chosen={tmp_path}/good", f"--rejected={tmp_path}/bad", "--workers=1"]
    main(["import", "folder", f"--output={tmp_path}/out", *words])
    pairs = read_all(tmp_path / "out")
    assert [(pair.prompt, more["name"]) for pair, more in pairs] == [(f"prompt {i}", f"sub/{i}.v1") for i in range(3)]
    for number, (pair, _) in enumerate(pairs):
        chosen = pair.image_0 if pair.label_0 == 1 else pair.image_1
        assert chosen == BUNDLED[number].image_0
    assert rejects(tmp_path / "out") == [
        (0, "alone", "image missing"),
        (4, "sub/3.v1", "two images of the same name"),
        (5, "sub/4.v1", "prompt missing"),
    ]
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "texts/sub/4.v1.txt").write_text("elsewhere")
    folder(str(tmp_path / "out2"), None, tmp_path / "good", tmp_path / "bad", tmp_path / "texts", workers=1)
    assert [pair.prompt for pair, _ in read_all(tmp_path / "out2")] == ["elsewhere"]
    with pytest.raises(ValueError, match="side by side"):
        folder(str(tmp_path / "out3"), None, tmp_path, tmp_path / "bad", workers=1)
    with pytest.raises(ValueError, match="Name --table, or --chosen and --rejected"):
        folder(str(tmp_path / "out3"), None, tmp_path, workers=1)


# -- one row


def test_labels():
    assert [parse_label(value) for value in (1, 0, 0.5, "1", "0.0", "1.0", "0.5")] == [1, 0, 0.5, 1, 0, 1, 0.5]
    for value in (2, -1, "yes", True, 0.3, [1], "nan"):
        with pytest.raises(Rejected, match=r"label is not 0, 0.5 or 1"):
            parse_label(value)
    for value in (None, "", float("nan")):
        with pytest.raises(Rejected, match="no label"):
            parse_label(value)
    with pytest.raises(Rejected, match=r"labels do not add up to 1: 0.5 and 1"):
        parse_labels(0.5, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP"])
def test_cut_off_images_are_found(kind):
    data = encoded(BUNDLED[0].image_0, kind)
    assert check_image(data) == data
    with pytest.raises(Rejected, match="image cannot be decoded"):
        check_image(data[: len(data) * 3 // 4])
    with pytest.raises(Rejected, match="image missing"):
        check_image(b"")


def test_odd_text_survives(images):
    """Half a surrogate pair is no text; in what is kept besides it is replaced, as is a NaN."""
    lines = [
        '{"image_0": "train/0.jpg", "image_1": "train/1.jpg", "label": 1, "prompt": "\\ud83e\\udd8a", "x": NaN}',
        '{"image_0": "train/0.jpg", "image_1": "train/1.jpg", "label": 1, "prompt": "\\ud83e"}',
        '{"image_0": "train/1.jpg", "image_1": "train/2.jpg", "label": 1, "prompt": "a\\u2028b", "x": "\\ud83e"}',
        '{"image_0": "train/\\u0000.jpg", "image_1": "train/2.jpg", "label": 1, "prompt": ""}',
    ]
    (images / "pairs.jsonl").write_text("\n".join(lines))
    folder(str(images / "out"), f"{images}/pairs.jsonl", workers=1)
    pairs = read_all(images / "out")
    assert [(pair.prompt, more["x"]) for pair, more in pairs] == [("\U0001f98a", None), ("a\u2028b", "?")]
    assert [why for _, _, why in rejects(images / "out")] == ["prompt is not text", "image missing"]


def test_help_lists_the_sources(capsys):
    for words in (["import"], ["import", "pick-a-pic"], ["import", "hpd"]):
        with contextlib.suppress(SystemExit):
            main([*words, "--help"])
        said = capsys.readouterr().out
        assert f"usage: lit-align {' '.join(words)} " in said
        if len(words) == 1:
            assert all(f"\n    {name} " in said for name in ("pick-a-pic", "webdataset", "hpd", "folder"))
    assert "n (n - 1) / 2 pairs" in " ".join(said.split())
