"""Import of tables and of folders of images."""

import csv
import json
import os
from pathlib import Path

import pytest

from lit_align.cli import main
from lit_align.commands.importing.command import folder
from lit_align.data.importers.folders import open_folders
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


def test_whatever_lies_in_the_folders_is_a_pair_or_counted(tmp_path):
    """Suffixes of all kinds and cases, links, hidden files, captions alone, and what is no image."""
    one, two = BUNDLED[0].image_0, BUNDLED[0].image_1
    pairs = {"a.jfif": "a.jpe", "b.JPG": "b.PNG", "c.dat": "c.dat", "d.1": "d.1", "sub/x y [1].Tif": "sub/x y [1].png"}
    for good, bad in pairs.items():
        for kind, name, data in (("good", good, one), ("bad", bad, two)):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / name).write_bytes(data)
    for name in ("a.txt", "b.TXT", "c.dat.txt", "d.1.Txt", "sub/x y [1].txt"):
        (tmp_path / "good" / name).write_text(name)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    for name in ("e.webp", "deep/f.png"):
        (tmp_path / "elsewhere" / name).write_bytes(encoded(one, "PNG"))
        (tmp_path / "bad/linked" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bad/linked" / name).write_bytes(two)
        (tmp_path / "elsewhere" / name).with_suffix(".txt").write_text(name)
    (tmp_path / "good/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "good/gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "good/notes.md").write_text("notes")
    (tmp_path / "good/.hidden").mkdir()
    (tmp_path / "good/.hidden/a.png").write_bytes(one)
    (tmp_path / "bad/._a.jpg").write_bytes(b"fork")
    (tmp_path / "bad/alone.txt").write_text("no image")
    (tmp_path / "bad/a.TXT").write_text("beside the rejected image")
    for kind in ("good", "bad"):
        (tmp_path / kind / "photo.heic").write_bytes(b"\0\0\0\x1cftypheic" + bytes(20))
    (tmp_path / "good/photo.txt").write_text("a format that is not read")
    (tmp_path / "good/twice.txt").write_text("one")
    (tmp_path / "good/twice.TXT").write_text("two")
    for kind, data in (("good", one), ("bad", two)):
        (tmp_path / kind / "twice.png").write_bytes(data)
    folder(str(tmp_path / "out"), None, tmp_path / "good", tmp_path / "bad", workers=1)
    prompts = ["a.txt", "b.TXT", "c.dat.txt", "d.1.Txt", "deep/f.png", "e.webp", "sub/x y [1].txt"]
    found = read_all(tmp_path / "out")
    assert [pair.prompt for pair, _ in found] == prompts
    assert next(pair.image_0 if pair.label_0 == 1 else pair.image_1 for pair, _ in found) == one
    assert sorted(rejects(tmp_path / "out")) == [
        (6, "photo", "image cannot be decoded"),
        (8, "twice", "two captions of the same name"),
        (9, "chosen/.hidden", "hidden file or folder"),
        (10, "chosen/gone.png", "link to nothing"),
        (11, "chosen/linked/deep/up", "link to a folder that it is in"),
        (12, "chosen/notes.md", "file is neither an image nor a caption"),
        (13, "rejected/._a.jpg", "hidden file or folder"),
        (14, "alone.txt", "caption without images"),
    ]


def test_a_linked_folder_that_is_read_anyway_adds_no_pair(tmp_path):
    for kind, data in (("good", BUNDLED[0].image_0), ("bad", BUNDLED[0].image_1)):
        (tmp_path / kind / "b").mkdir(parents=True)
        (tmp_path / kind / "b/x.png").write_bytes(data)
        (tmp_path / kind / "a").symlink_to("b")
    (tmp_path / "good/b/x.txt").write_text("x")
    folder(str(tmp_path / "out"), None, tmp_path / "good", tmp_path / "bad", workers=1)
    assert [pair.prompt for pair, _ in read_all(tmp_path / "out")] == ["x"]
    why = "link to a folder that is read by its own name"
    assert sorted(rejects(tmp_path / "out")) == [(1, "chosen/a", why), (2, "rejected/a", why)]


def test_files_that_file_managers_make_change_no_import(tmp_path):
    """The same command goes on, though a folder was looked at in between."""
    for kind, data in (("good", BUNDLED[0].image_0), ("bad", BUNDLED[0].image_1)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.png").write_bytes(data)
    (tmp_path / "good/a.txt").write_text("a")
    before = open_folders(tmp_path / "good", tmp_path / "bad", None)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "bad" / name).write_bytes(b"")
    after = open_folders(tmp_path / "good", tmp_path / "bad", None)
    assert (after.rows, after.digest) == (before.rows, before.digest) == (1, before.digest)


def test_a_captions_folder_counts_what_is_not_used(tmp_path):
    for kind, data in (("good", BUNDLED[0].image_0), ("bad", BUNDLED[0].image_1)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.png").write_bytes(data)
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt", "c.json", "a.png"):
        (tmp_path / "texts" / name).write_text("right")
    (tmp_path / "bad/a.txt").write_text("wrong")
    folder(str(tmp_path / "out"), None, tmp_path / "good", tmp_path / "bad", tmp_path / "texts", workers=1)
    assert [pair.prompt for pair, _ in read_all(tmp_path / "out")] == ["right"]
    assert [(place, why) for _, place, why in rejects(tmp_path / "out")] == [
        ("captions/c.json", "file is neither an image nor a caption"),
        ("captions/a.png", "image among captions"),
        ("rejected/a.txt", "caption beside images, not in captions"),
        ("b.txt", "caption without images"),
    ]
    before = files(tmp_path / "out")
    (tmp_path / "good/new.md").write_text("new")
    with pytest.raises(ValueError, match="chosen and rejected: sha256 was"):
        folder(str(tmp_path / "out"), None, tmp_path / "good", tmp_path / "bad", tmp_path / "texts", workers=1)
    assert files(tmp_path / "out") == before


def test_files_that_may_not_be_read_are_counted(tmp_path, monkeypatch):
    """Root may read everything, so the refusal is made."""
    listed, opened = os.listdir, Path.open

    def refuse(path, *args, **kinds):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    for kind in ("good", "bad"):
        (tmp_path / kind / "locked").mkdir(parents=True)
        for number in range(2):
            (tmp_path / kind / f"{number}.png").write_bytes(BUNDLED[number].image_0 + (b"" if kind == "good" else b" "))
            (tmp_path / kind / f"{number}.txt").write_text("x")

    def closed(path, *args, **kinds):
        if path.name == "1.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kinds)

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(Path, "open", closed)
    folder(str(tmp_path / "out"), None, tmp_path / "good", tmp_path / "bad", workers=1)
    assert [why for _, _, why in rejects(tmp_path / "out")] == [
        "image cannot be read",
        "folder cannot be read: Permission denied",
        "folder cannot be read: Permission denied",
    ]
