"""Import of Pick-a-Pic's Parquet files."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from lit_align.cli import main
from lit_align.commands.importing.command import pick_a_pic
from lit_align.common import passing_faults
from lit_align.data.importers import parquet_table
from lit_align.data.importers import pick_a_pic as parquet_files
from lit_align.data.shards.layout import read_samples
from tests.support.imports import LEFT_OUT, as_read, files, read_all, rejects, row, write_parquet


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
    """Pick-Style has int64 labels; `datasets` writes images as structs of bytes and path."""
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
    """A part opens only the files, row groups and columns that it needs."""
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
    """Files are listed and read through fsspec's `hf:`; a local folder replaces the hub."""
    hub = tmp_path / "hub"
    shutil.copytree(tmp_path / "data", hub / "datasets/someone/pick-a-pic@main/data")
    shutil.copytree(tmp_path / "data", hub / "datasets/someone/pick-a-pic@v1/data")
    (hub / "datasets/someone/pick-a-pic@v1/data/train-1.parquet").unlink()

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
    pick_a_pic(str(tmp_path / "v1"), repo="someone/pick-a-pic", revision="v1", workers=1)
    assert [pair.key for pair, _ in read_all(tmp_path / "v1")] == [f"{number:08d}" for number in (0, 1, 2, 4, 6)]
    with pytest.raises(FileNotFoundError, match=r"hf://datasets/someone/pick-a-pic@main/data/none-\*"):
        pick_a_pic(str(tmp_path / "out"), repo="someone/pick-a-pic", pattern="data/none-*")
    assert (
        parquet_files.hub_files("a/b", "refs/convert/parquet", "x*") == "hf://datasets/a/b@refs%2Fconvert%2Fparquet/x*"
    )
    with pytest.raises(ValueError, match="'pick-a-pic' is not the name of a dataset"):
        pick_a_pic(str(tmp_path / "out"), repo="pick-a-pic")


def test_remote_reads_are_tried_again(parquet, tmp_path, monkeypatch, capsys):
    """A network that fails for a moment does not end a long import; a missing file does."""
    real, faults = parquet_table.open_binary, [OSError("503"), OSError("timed out")]

    def open_binary(path):
        if faults and (tmp_path / "out/import.json").is_file():  # while shards are written
            raise faults.pop()
        return real(path)

    pattern = parquet.replace(str(tmp_path), f"local://{tmp_path}")
    monkeypatch.setattr(parquet_table, "open_binary", open_binary)
    monkeypatch.setattr(passing_faults, "PAUSES", (0.0, 0.0))
    pick_a_pic(str(tmp_path / "out"), pattern, pairs_per_shard=5, workers=1)
    assert not faults
    assert "00000.tar: OSError: timed out. Trying again in 0 s." in capsys.readouterr().out
    pick_a_pic(str(tmp_path / "unbroken"), parquet, pairs_per_shard=5, workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")
