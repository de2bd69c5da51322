"""Import of tables and of folders of images."""

import csv
import json

import pytest

from lit_align.cli import main
from lit_align.commands.importing.command import folder
from lit_align.data.importers.source import shuffle_images
from tests.support.imports import BUNDLED, encoded, files, read_all, rejects


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


def test_columns_of_a_labelled_table_can_be_named(images):
    """Named columns give the shard of a table with the default columns."""
    rows = [["train/0.jpg", "train/1.jpg", "one", "1"], ["train/2.jpg", "train/3.jpg", "two", "0"]]
    names = {"image_0": "left", "image_1": "right", "prompt": "text", "label": "left_wins"}
    for name, header in (("default", names.keys()), ("named", names.values())):
        with (images / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    words = ["--image_0_column=left", "--image_1_column=right", "--prompt_column=text", "--label_column=left_wins"]
    main(["import", "folder", f"--table={images}/default.csv", f"--output={images}/default", "--workers=1"])
    main(["import", "folder", f"--table={images}/named.csv", f"--output={images}/named", "--workers=1", *words])
    assert [(pair.prompt, pair.label_0) for pair, _ in read_all(images / "named")] == [("one", 1), ("two", 0)]
    assert files(images / "named")["00000.tar"] == files(images / "default")["00000.tar"]
    with pytest.raises(ValueError, match=r"must have columns left, image_1, label, prompt.* and has neither"):
        folder(str(images / "out"), f"{images}/default.csv", image_0_column="left", workers=1)


def test_chosen_and_rejected_table(images):
    """A hash of the pair's key decides whether the chosen image becomes image 0."""
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
    with pytest.raises(ValueError, match=r"files: pairs.jsonl: sha256 was \"[0-9a-f]+\", is"):
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
