"""Imports that are interrupted, repeated or refused end as one uninterrupted import."""

import errno
import fcntl
import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import pytest

from lit_align.commands.importing.command import folder, pick_a_pic, webdataset
from lit_align.common.lock import locked_folder
from lit_align.data.importers import import_run as import_shards
from lit_align.data.shards.layout import SampleError, read_samples
from tests.support.imports import BUNDLED, LEFT_OUT, files, read_all, rejects, row, write_parquet
from tests.support.paths import PAIRS


def test_two_workers_write_what_one_writes(parquet, tmp_path):
    for workers in (1, 2):
        pick_a_pic(str(tmp_path / f"{workers}"), parquet, pairs_per_shard=2, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert rejects(tmp_path / "2") == LEFT_OUT
    assert not (tmp_path / "2/00004.tar").exists()  # both of its rows were left out
    assert len(json.loads((tmp_path / "2/index.json").read_text())["shards"]) == 5


def test_killed_import_goes_on(tmp_path):
    """After SIGKILL, finished shards stay unchanged, and the result equals that of an unbroken import."""
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
    while True:  # until the workers have ended with their parent
        before = files(output, mtimes=True)
        time.sleep(0.3)
        if files(output, mtimes=True) == before:
            break
    done = [Path(name).stem for name in before if name.startswith(".import/") and name.endswith(".json")]
    assert 5 <= len(done) < 78
    assert "index.json" not in before

    (output / ".00007.tar.1234abcd.part").write_bytes(b"half of it")  # the leftover of a machine that crashed
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
    assert "5 shards (4 done before)" in capsys.readouterr().out  # the shard without pairs counts as done
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
    with pytest.raises(ValueError, match=r"options.pairs_per_shard was 5, is 4\. Resume with .* delete this one"):
        pick_a_pic(str(output), parquet, pairs_per_shard=4, workers=1)
    with pytest.raises(ValueError, match=r"train-1.parquet is gone"):
        pick_a_pic(str(output), parquet.replace("*", "0"), pairs_per_shard=5, workers=1)
    write_parquet(tmp_path / "data/train-1.parquet", [row(7)])
    with pytest.raises(ValueError, match=r"files: train-1.parquet: rows was 5, is 1"):
        pick_a_pic(str(output), parquet, pairs_per_shard=5, workers=1)
    assert files(output, mtimes=True) == before
    (tmp_path / "mine").mkdir()
    shutil.copy(output / "00000.tar", tmp_path / "mine")
    with pytest.raises(ValueError, match=r"holds 00000.tar, but no import.json"):
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
    message = r"another lit-align import writes to .*out\. "
    with locked_folder(output, "import"), pytest.raises(RuntimeError, match=message):
        pick_a_pic(str(output), parquet, workers=1)

    def no_locks(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as on some network folders
    pick_a_pic(str(output), parquet, workers=1)
    assert len(read_all(output)) == 7


def test_what_was_missing_is_tried_again(tmp_path):
    """A misspelled folder leaves nothing behind, and an unfinished import looks again for missing files."""
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
