"""Import of tables in the forms of public data sets."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_align.cli import main
from lit_align.commands.importing.command import folder, pick_a_pic, table
from lit_align.data.importers import parquet_table
from lit_align.data.importers.columns import Asked
from lit_align.data.importers.import_run import divide
from lit_align.data.importers.label_encodings import Values
from lit_align.data.importers.open_tables import open_tables
from lit_align.data.importers.parquet_table import open_parquet
from lit_align.data.importers.pick_a_pic import open_files
from lit_align.data.importers.shard_records import ShardPlan
from lit_align.data.importers.text_tables import read_text_table
from lit_align.user_errors import UserValueError
from tests.support.imports import BUNDLED, read_all, rejects, row, write_parquet

PICTURES = [(BUNDLED[i].image_0, BUNDLED[i].image_1) for i in range(4)]


@pytest.fixture
def pictures(tmp_path):
    """A folder with good0.png to good3.png and bad0.png to bad3.png."""
    for i, (good, bad) in enumerate(PICTURES):
        (tmp_path / f"good{i}.png").write_bytes(good)
        (tmp_path / f"bad{i}.png").write_bytes(bad)
    return tmp_path


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def parquet_file(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def chosen_of(output):
    """Prompt, and chosen and rejected image of each pair."""
    two = [(pair.prompt, pair.image_0, pair.image_1, pair.label_0) for pair, _ in read_all(output)]
    return [(prompt, *((a, b) if label == 1 else (b, a))) for prompt, a, b, label in two]


WANTED = [(f"p{i}", *PICTURES[i]) for i in range(4)]


def struct(data, path=None):
    return {"bytes": data, "path": path}


def message(role, content):
    return [{"role": role, "content": content}]


FORMS = {
    "structs": lambda i: {
        "prompt": f"p{i}",
        "simplified_prompt": "x",
        "chosen": struct(PICTURES[i][0], f"{i}.png"),
        "rejected": struct(PICTURES[i][1]),
    },
    "messages": lambda i: {
        "prompt": message("user", [{"type": "text", "text": f"p{i}"}]),
        "chosen": message("assistant", [{"type": "image", "image": struct(PICTURES[i][0])}]),
        "rejected": message("assistant", [{"type": "image", "image": struct(PICTURES[i][1])}]),
    },
    "lists": lambda i: {
        "prompt": message("user", f"p{i}"),
        "chosen": [struct(PICTURES[i][0])],
        "rejected": [struct(PICTURES[i][1])],
    },
    "whole talks": lambda i: {
        name: [
            *message("user", [{"type": "text", "text": f"p{i}"}]),
            *message("assistant", [{"type": "image", "image": struct(PICTURES[i][at])}]),
        ]
        for at, name in enumerate(("chosen", "rejected"))
    },
    "binary": lambda i: {"caption": f"p{i}", "winner_image": PICTURES[i][0], "loser_image": PICTURES[i][1]},
    "paths": lambda i: {"text": f"p{i}", "chosen": f"good{i}.png", "rejected": f"bad{i}.png"},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_parquet(pictures, form):
    source = parquet_file(pictures / "train.parquet", [FORMS[form](i) for i in range(4)])
    table(str(pictures / "out"), source, workers=1)
    assert chosen_of(pictures / "out") == WANTED


def test_hpd_v3_prefers_its_first_path(pictures, capsys):
    rows = [
        {"prompt": f"p{i}", "path1": f"good{i}.png", "path2": f"bad{i}.png", "choice_dist": [9, 3]} for i in range(4)
    ]
    (pictures / "all.json").write_text(json.dumps(rows))
    main(["import", "table", f"--files={pictures}/all.json", f"--output={pictures}/out", "--workers=1"])
    assert chosen_of(pictures / "out") == WANTED
    assert read_all(pictures / "out")[0][1]["choice_dist"] == [9, 3]
    said = capsys.readouterr().out
    assert "Columns: chosen path1 (as in HPDv3), rejected path2, prompt prompt. Kept as JSON:" in said


def test_pick_a_pic_without_images(pictures):
    """Addresses of images, nanoseconds, and rows without a label."""
    rows = [
        {
            **{f"image_{j}_url": f"file://{pictures}/{('good', 'bad')[(i + j) % 2]}{i}.png" for j in range(2)},
            **{
                "label_0": 1.0 - i % 2,
                "label_1": float(i % 2),
                "caption": f"p{i}",
                "has_label": i != 3,
                "model_0": "m",
            },
        }
        for i in range(4)
    ]
    at = pa.array([1_700_000_000_123_456_789] * 4, pa.timestamp("ns"))
    pq.write_table(pa.Table.from_pylist(rows).append_column("created_at", at), pictures / "a.parquet")
    table(str(pictures / "out"), f"{pictures}/a.parquet", workers=1)
    assert chosen_of(pictures / "out") == WANTED[:3]
    assert read_all(pictures / "out")[0][1]["created_at"] == "2023-11-14 22:13:20.123456"
    assert rejects(pictures / "out") == [(3, "a.parquet, row 3", "no label")]


def test_views_of_polars(pictures):
    columns = {
        "caption": pa.array([f"p{i}" for i in range(4)], pa.string_view()),
        **{f"jpg_{j}": pa.array([PICTURES[i][j] for i in range(4)], pa.binary_view()) for j in range(2)},
        **{f"label_{j}": [1.0 - j] * 4 for j in range(2)},
        "at": pa.array([1, 2, 3, 4], pa.timestamp("ns", "UTC")),
    }
    pq.write_table(pa.table(columns), pictures / "a.parquet")
    pick_a_pic(str(pictures / "out"), f"{pictures}/a.parquet", workers=1)
    assert chosen_of(pictures / "out") == WANTED


def test_a_folder_with_metadata(pictures):
    rows = [
        {"prompt": f"p{i}", "chosen_file_name": f"good{i}.png", "rejected_file_name": f"bad{i}.png"} for i in range(4)
    ]
    lines(pictures / "metadata.jsonl", rows)
    table(str(pictures / "out"), str(pictures), workers=1)
    assert chosen_of(pictures / "out") == WANTED


@pytest.mark.parametrize(("name", "text"), [("a.csv", ""), ("a.csv", "chosen,rejected,prompt\n"), ("a.json", "[]")])
def test_an_empty_table_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"files: .*{name} has no rows"):
        table(str(tmp_path / "out"), f"{tmp_path}/{name}", workers=1)


def test_splits_of_a_folder_are_not_mixed(pictures):
    for name in ("train-0.parquet", "test-0.parquet"):
        parquet_file(pictures / name, [FORMS["paths"](0)])
    with pytest.raises(ValueError, match=r"is a folder with test-0\.parquet, train-0\.parquet\. Name the files in it"):
        table(str(pictures / "out"), str(pictures), workers=1)


def test_several_tables_and_a_folder_of_images(pictures, tmp_path_factory):
    """Tables of different kinds make one import, whose images lie elsewhere."""
    here = tmp_path_factory.mktemp("tables")
    rows = [FORMS["paths"](i) for i in range(4)]
    (here / "a.csv.gz").write_bytes(gzip.compress(b"chosen,rejected,text\ngood0.png,bad0.png,p0\n"))
    lines(here / "b.ndjson", rows[1:2])
    sources = [f"{here}/a.csv.gz", f"{here}/b.ndjson", parquet_file(here / "c.parquet", rows[2:])]
    table(str(here / "out"), sources, images=str(pictures), pairs_per_shard=3, workers=1)
    assert chosen_of(here / "out") == WANTED
    with pytest.raises(FileNotFoundError, match="images: there is no folder"):
        table(str(here / "out"), sources, images=f"{pictures}/none")


@pytest.mark.parametrize("command", [table, folder])
def test_labels_of_1_and_minus_1_keep_all_rows(pictures, command, capsys):
    rows = [
        {"image_0": f"good{i}.png", "image_1": f"bad{i}.png", "prompt": f"p{i}", "label": (1, -1)[i % 2]}
        for i in range(4)
    ]
    command(str(pictures / "out"), lines(pictures / "pairs.jsonl", rows), workers=1)
    assert [pair.label_0 for pair, _ in read_all(pictures / "out")] == [1, 0, 1, 0]
    assert "Label: 1 prefers image_0 (2 rows), -1 prefers image_1 (2 rows)." in capsys.readouterr().out


@pytest.mark.parametrize("label", [0, 1])
def test_equal_labels_of_a_column_that_nobody_named_are_no_preference(tmp_path, label):
    """As in MJ-Bench, whose label is always 0, the number of the preferred image."""
    rows = [{"image0": "a.png", "image1": "b.png", "label": label, "caption": "p"}] * 9
    with pytest.raises(UserValueError, match=rf"column label holds '{label}' \(9 rows\); 0 and 1 may be the number"):
        open_tables(lines(tmp_path / "t.jsonl", rows), Asked(), Values(), None)
    named = open_tables(lines(tmp_path / "t.jsonl", rows), Asked(label="label"), Values(), None)
    assert named.layout.encoding.label_0([label]) == label


def test_values_of_labels_are_not_passed_over(tmp_path):
    rows = lines(tmp_path / "t.jsonl", [{"chosen": "a.png", "rejected": "b.png", "prompt": "p"}])
    with pytest.raises(UserValueError, match="the preferred image is in column chosen"):
        open_tables(rows, Asked(), Values(("yes",)), None)


def test_columns_and_values_can_be_named(pictures):
    """All options that name columns, and those that say what labels mean."""
    rows = [
        {
            "x": f"good{i}.png",
            "y": f"bad{i}.png",
            "tags": f"p{i}",
            "who": ("yes", "no", "maybe", "?")[i],
            "n": 9 - i,
            "m": 8,
        }
        for i in range(4)
    ]
    source = lines(pictures / "pairs.jsonl", rows)
    named = {"image_0_column": "x", "image_1_column": "y", "prompt_column": "tags", "workers": 1}
    values = {"label_image_0": ["yes"], "label_image_1": ["no"], "label_tie": ["maybe"]}
    table(str(pictures / "one"), source, **named, label_column="who", **values)
    assert [pair.label_0 for pair, _ in read_all(pictures / "one")] == [1, 0, 0.5]
    assert rejects(pictures / "one") == [(3, "pairs.jsonl, line 4", "label is none of yes, no, maybe")]
    table(str(pictures / "two"), source, **named, label_0_column="n", label_1_column="m")
    assert [pair.label_0 for pair, _ in read_all(pictures / "two")] == [1, 0.5, 0, 0]
    table(str(pictures / "three"), source, chosen_column="x", rejected_column="y", prompt_column="tags", workers=1)
    assert chosen_of(pictures / "three") == WANTED
    with pytest.raises(ValueError, match=r"begun with other values: options\.columns"):
        table(str(pictures / "three"), source, chosen_column="y", rejected_column="x", prompt_column="tags", workers=1)


@pytest.mark.parametrize("other", ["labels", "columns"])
def test_a_table_of_equal_size_with_other_content_is_not_gone_on_with(tmp_path, other):
    def save(labels, names):
        columns = [[good for good, _ in PICTURES], [bad for _, bad in PICTURES], labels, ["p"] * 4]
        arrays = [pa.array(column) for column in columns]
        pq.write_table(pa.table(arrays, names), tmp_path / "t.parquet", use_dictionary=False, compression="none")
        return (tmp_path / "t.parquet").stat().st_size

    names, output = ["image_0", "image_1", "label", "prompt"], str(tmp_path / "out")
    size = save([1, 0, 1, 0], names)
    table(output, str(tmp_path / "t.parquet"), workers=1)
    manifest = json.loads((tmp_path / "out/import.json").read_text())
    changed = {"labels": ([0, 1, 0, 1], names), "columns": ([1, 0, 1, 0], ["image_1", "image_0", "label", "prompt"])}
    assert save(*changed[other]) == size
    with pytest.raises(UserValueError, match="labels was" if other == "labels" else r"t\.parquet: footer was"):
        table(output, str(tmp_path / "t.parquet"), workers=1)
    del manifest["labels"], manifest["files"][0]["footer"]  # as older versions wrote it
    (tmp_path / "out/import.json").write_text(json.dumps(manifest))
    table(output, str(tmp_path / "t.parquet"), workers=1)


def test_labels_of_pick_a_pic_of_which_a_share_is_refused_stop_it(tmp_path):
    odd = [row(i, label_1=1.0, label_0=1.0) for i in range(3)]
    source = write_parquet(tmp_path / "a.parquet", [*odd, *(row(i) for i in range(3, 9))])
    with pytest.raises(
        ValueError, match=r"column label_0 and label_1 holds .*'1 and 1' \(3 rows\).*do not add up to 1"
    ):
        pick_a_pic(str(tmp_path / "out"), source, workers=1)
    assert not (tmp_path / "out").exists()


HEADER = "chosen,rejected,prompt\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "label,a,label\n1,x,0\n", r"a\.csv, line 1: column label is there 2 times, as cells 1 and 3"),
        (
            "a.csv",
            HEADER + 'a,b,"one\ntwo"\nc,d,"a "b" c"\n',
            r"begins in line 4: a quote ends its cell in line 4.*twice",
        ),
        (
            "a.tsv",
            "chosen\trejected\tprompt\n" + 'a\tb\t"open\nc\td\tshut"\ne\tf\tg\n',
            r"a\.tsv, row that begins in line 2: a quote opens in this row and takes in the next one",
        ),
        (
            "a.csv",
            HEADER + 'a,b,c\na,b,"open\nc,d,e\n',
            r"a\.csv, row that begins in line 3: a quote opens in this row",
        ),
        ("a.csv", HEADER.encode() + b"a,b,c\na,b,caf\xe9\n", r"a\.csv, line 3: byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"a": 1},\n{"a": 2},\n', r"a\.jsonl, line 1: character 9: a comma follows the object"),
        ("a.jsonl", '{"a": 1,}\n', r"line 1: .*a comma stands before }, where JSON allows none"),
        ("a.jsonl", "{'a': 1}\n", r"line 1: character 2: JSON needs double quotes"),
        ("a.json", '[{"a": 1},\n {"a": 2},\n]', r"a\.json: line \d, .*a comma stands before \]"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", r"a\.jsonl is a Git LFS pointer"),
        ("a.json", '{"a": {"0": 1}}', r"must hold a list of rows.*it holds one object of columns: a.*orient='records'"),
    ],
)
def test_a_faulty_table_names_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_text_table(f"{tmp_path}/{name}")


def test_tables_of_other_programs_are_read(tmp_path):
    long = "word " * 40_000
    for name, data in {
        "long.csv": f"a,b\n1,{long}\n".encode(),
        "semicolon.csv": f"a;b\n1;{long}\n".encode(),
        "wide.tsv": f"a\tb\n1\t{long}\n".encode("utf-16"),
        "lines.json": json.dumps({"a": "1", "b": long}).encode(),
        "viewer.json": json.dumps(
            {"features": [{"name": "a"}], "rows": [{"row_idx": 0, "row": {"a": "1", "b": long}, "truncated_cells": []}]}
        ).encode(),
        "wrapped.json": json.dumps({"data": [{"a": "1", "b": long}]}).encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert [line.cells for line in read_text_table(f"{tmp_path}/{name}").lines] == [{"a": "1", "b": long}], name


def test_repeated_names_are_found_in_json_and_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"label": 1, "label": 0}\n{"label": 1}\n')
    found = read_text_table(f"{tmp_path}/a.jsonl").lines
    assert [line.fault for line in found] == ['the object {"label": 0} has label 2 times', ""]
    pq.write_table(
        pa.Table.from_arrays([pa.array([1]), pa.array([0])], names=["label", "label"]), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=r"a\.parquet: column label is there 2 times"):
        open_parquet(f"{tmp_path}/a.parquet")


def test_a_large_row_group_is_read_about_once(tmp_path, monkeypatch):
    """Shards of one row group are written in one pass."""
    source = tmp_path / "a.parquet"
    rows = pa.Table.from_pylist([row(i % 26) for i in range(48)])
    pq.write_table(rows, source, use_dictionary=False, data_page_size=1000, write_batch_size=1)
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    monkeypatch.setattr(parquet_table, "open_binary", Counting)
    monkeypatch.setattr(parquet_table, "BUFFER_BYTES", 4096)
    pick_a_pic(str(tmp_path / "out"), str(source), pairs_per_shard=4, workers=1)
    assert len(read_all(tmp_path / "out")) == 48
    assert sum(read) < 3 * source.stat().st_size  # the end of the file, with its columns, is read three times


def test_workers_share_a_row_group_in_few_passes(tmp_path):
    """A row group is divided among at most three workers; others begin where a row group begins."""
    counts = [100, 100, 4]
    writer = pq.ParquetWriter(tmp_path / "a.parquet", pa.Table.from_pylist([row(0)]).schema)
    for count in counts:
        writer.write_table(pa.Table.from_pylist([row(i % 26) for i in range(count)]))
    writer.close()
    source, plan = open_files(f"{tmp_path}/a.parquet"), ShardPlan(tmp_path, sum(counts), 10)
    runs = list(divide(source, plan, {3}, 8))
    assert runs == [
        [0, 1],
        [2],
        [4, 5],
        [6, 7],
        [8, 9],
        [10, 11, 12, 13],
        [14, 15, 16, 17],
        [18, 19],
        [20],
    ]
    assert list(divide(source, plan, set(), 1)) == [list(range(10)), list(range(10, 20)), [20]]
