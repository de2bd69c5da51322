"""`lit-align inspect`: counts, duplicates, faults, the comparison with an index, and the contact sheet."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from lit_align.cli import main
from lit_align.commands.inspect.command import inspect
from lit_align.commands.inspect.contact_sheet import BOX, cut, fit, image_position, sheet_size
from lit_align.data.importers.worker_pool import worker_count
from lit_align.data.shards.index import INDEX, index_shard, rows_path, write_index
from lit_align.data.shards.layout import parse_sample, read_samples
from lit_align.data.shards.writer import NewPair, write_shard
from tests.support.paths import PAIRS

TRAIN = sorted((PAIRS / "train").glob("*.tar"))


def picture(colour, size=(32, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def report(capsys, shards, output, code=0, **options):
    """Run the command, check its exit status, and return the saved and the printed report."""
    try:
        inspect([str(shard) for shard in shards], output, **options)
        ended = 0
    except SystemExit as error:
        ended = error.code
    assert ended == code
    return json.loads((output / "inspect.json").read_text()), capsys.readouterr().out


def write_broken_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def test_bundled_pairs(tmp_path, capsys):
    found, text = report(capsys, [PAIRS / "train" / "*.tar"], tmp_path)
    samples = [parse_sample(sample) for shard in TRAIN for sample in read_samples(str(shard))]
    assert found["shards"] == len(TRAIN) == 8
    assert found["samples"] == found["pairs"] == len(samples) == 208
    assert (found["ties"], found["broken"], found["broken_shards"]) == (0, 0, 0)
    assert found["bytes"] == sum(shard.stat().st_size for shard in TRAIN)
    assert found["image_bytes"] == sum(len(pair.image_0) + len(pair.image_1) for pair in samples)
    assert found["image_0_preferred"] == sum(pair.label_0 for pair in samples) / 208
    assert found["images"]["frequent_sizes"] == [{"width": 32, "height": 32, "images": 416}]
    assert found["prompts"]["unique"] == len({pair.prompt for pair in samples}) == 208
    assert found["duplicates"]["unique_images"] == len({i for pair in samples for i in (pair.image_0, pair.image_1)})
    assert found["faults"] == {"shards": [], "samples": [], "index": []}
    assert "pairs with a preference  208  100.0%" in text
    assert "8 shards have no index" in text
    assert f"Saved as {tmp_path / 'inspect.json'}" in text


@pytest.fixture
def messy(tmp_path):
    """Two shards with every kind of duplicate, tie and size that readable pairs can have."""
    red, green, blue, gray = (picture(colour) for colour in ("red", "green", "blue", "gray"))
    wide, tall = picture("pink", (64, 16)), picture("pink", (20, 50))
    pairs = [
        NewPair("a", red, green, 1, "two colours"),
        NewPair("b", green, red, 1, "two colours"),  # a with exchanged images and a contradictory label
        NewPair("c", red, green, 1, "two colours"),  # a again
        NewPair("d", blue, gray, 0, "others"),
        NewPair("e", blue, gray, 0.5, ""),  # another prompt, so no repetition of d
        NewPair("f", gray, gray, 1, "one image"),
        NewPair("g", wide, tall, 0, "others"),
    ]
    write_shard(tmp_path / "0.tar", pairs[:4])
    # h is d with exchanged images and an agreeing label
    write_shard(tmp_path / "1.tar", [*pairs[4:], NewPair("h", gray, blue, 1, "others")])
    return [tmp_path / "0.tar", tmp_path / "1.tar"]


def test_ties_sizes_and_duplicates(messy, tmp_path, capsys):
    found, text = report(capsys, messy, tmp_path / "out")
    assert (found["samples"], found["pairs"], found["ties"], found["broken"]) == (8, 7, 1, 0)
    assert found["image_0_preferred"] == 5 / 7
    images = found["images"]
    assert images["width"] == {"least": 20, "median": 32, "greatest": 64}
    assert images["height"] == {"least": 16, "median": 32, "greatest": 50}
    assert images["short_side"]["least"] == 16
    assert images["aspect_ratio"] == {"least": 0.4, "median": 1, "greatest": 4}
    assert images["frequent_sizes"][0] == {"width": 32, "height": 32, "images": 14}
    assert (images["different_sizes"], images["pairs_of_unequal_size"]) == (3, 1)
    prompts = found["prompts"]
    assert (prompts["unique"], prompts["used_more_than_once"], prompts["empty"]) == (4, 2, 1)
    assert prompts["most_repeated"] == [{"prompt": "two colours", "pairs": 3}, {"prompt": "others", "pairs": 3}]
    duplicates = found["duplicates"]
    assert duplicates["unique_images"] == 6
    assert duplicates["within_a_pair"] == {"pairs": 1, "examples": [{"shard": str(messy[1]), "key": "f"}]}
    # red and green are in a, b, c; blue in d, e, h; gray in d, e, f, h
    assert duplicates["across_pairs"] == {"images": 4, "pairs": 7, "most_pairs_of_one_image": 4}
    again = duplicates["repeated_pairs"]
    assert (again["groups"], again["superfluous_pairs"]) == (2, 3)
    assert (again["with_exchanged_images"], again["with_contradictory_labels"]) == (2, 1)
    first, second = again["examples"]
    assert [pair["key"] for pair in first["pairs"]] == ["a", "b", "c"]
    assert first["times"] == 3
    assert first["with_contradictory_labels"]
    assert second["pairs"] == [{"shard": str(messy[0]), "key": "d"}, {"shard": str(messy[1]), "key": "h"}]
    assert second["with_exchanged_images"]
    assert not second["with_contradictory_labels"]
    assert f"pair 3 times, exchanged, contradictory: {messy[0]} a = {messy[0]} b = {messy[0]} c" in text
    assert "pairs of two sizes   1  12.5%" in text


def test_the_number_of_workers_changes_nothing(messy, tmp_path, capsys):
    shards = [*messy, *TRAIN]
    one, _ = report(capsys, shards, tmp_path / "one", workers=1, sheet_pairs=5)
    two, _ = report(capsys, shards, tmp_path / "two", workers=2, sheet_pairs=5)
    assert one == two
    sheets = [(tmp_path / name / "inspect.png").read_bytes() for name in ("one", "two")]
    assert sheets[0] == sheets[1]
    report(capsys, shards, tmp_path / "other", seed=1, sheet_pairs=5)
    assert (tmp_path / "other" / "inspect.png").read_bytes() != sheets[0]
    assert worker_count(None) >= 1


def test_broken_samples_are_named(tmp_path, capsys):
    png = picture("red")
    whole = {"jpg_0.png": png, "jpg_1.png": picture("blue"), "label_0.txt": b"1", "label_1.txt": b"0"}
    whole["caption.txt"] = b"x"
    wrong = {
        "label": whole | {"label_0.txt": b"2"},
        "image": whole | {"jpg_1.png": png[: len(png) // 2]},
        "nothing": whole | {"jpg_0.png": b""},
        "sound": whole,
    }
    members = [(f"{key}.{name}", data) for key, fields in wrong.items() for name, data in fields.items()]
    members += [(f"bare.{name}", data) for name, data in whole.items() if name != "caption.txt"]
    members += [(f"sound.{name}", data) for name, data in whole.items()]
    write_broken_tar(tmp_path / "0.tar", members)
    found, text = report(capsys, [tmp_path / "0.tar"], tmp_path, code=1)
    assert (found["samples"], found["pairs"], found["broken"]) == (6, 1, 5)
    faults = found["faults"]["samples"]
    assert [fault["key"] for fault in faults] == ["label", "image", "nothing", "bare", "sound"]
    reasons = [fault["reason"] for fault in faults]
    assert "label_0.txt is '2'" in reasons[0]
    assert "jpg_1 cannot be decoded" in reasons[1]
    assert "jpg_0 cannot be decoded" in reasons[2]
    assert "no prompt" in reasons[3]
    assert "this key twice" in reasons[4]
    assert all(f"shard {tmp_path / '0.tar'}, key" in reason and reason in text for reason in reasons)


def test_a_damaged_shard_is_named_and_the_others_are_read(messy, tmp_path, capsys):
    data = messy[0].read_bytes()
    cut_off = tmp_path / "cut.tar"
    cut_off.write_bytes(data[: len(data) // 2])
    found, text = report(capsys, [cut_off, messy[1]], tmp_path, code=1)
    assert found["broken_shards"] == 1
    [fault] = found["faults"]["shards"]
    assert fault["shard"] == str(cut_off)
    assert found["samples"] > 4
    assert fault["reason"] in text
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    found, text = report(capsys, [empty], tmp_path / "empty", code=1)
    assert (found["samples"], found["images"], found["image_0_preferred"]) == (0, None, None)
    assert not (tmp_path / "empty" / "inspect.png").exists()


def test_an_index_that_agrees(messy, tmp_path, capsys):
    write_index(str(tmp_path), [index_shard(str(shard)) for shard in messy])
    for patterns in (messy, [tmp_path / INDEX]):
        found, text = report(capsys, patterns, tmp_path)
        assert found["index"] == {"indexed_shards": 2, "differing_shards": 0}
        assert "2 of 2 indexed shards agree with their index" in text
        assert found["samples"] == 8


def test_an_image_that_cannot_be_decoded_is_no_fault_of_the_index(tmp_path, capsys):
    png = picture("red")
    write_shard(tmp_path / "0.tar", [NewPair("a", png, png[: len(png) // 2], 1, "x")])
    index_shard(str(tmp_path / "0.tar"))
    found, _ = report(capsys, [tmp_path / "0.tar"], tmp_path, code=1)
    assert found["broken"] == 1
    assert found["faults"]["index"] == []


def test_a_stale_index_is_described(messy, tmp_path, capsys):
    write_index(str(tmp_path), [index_shard(str(shard)) for shard in messy])
    red, teal = picture("red"), picture("teal")
    write_shard(messy[0], [NewPair("a", red, teal, 0, "two colours"), NewPair("z", red, teal, 0.5, "new")])
    found, text = report(capsys, [tmp_path / INDEX], tmp_path, code=1)
    assert found["index"] == {"indexed_shards": 2, "differing_shards": 1}
    differences = [fault["difference"] for fault in found["faults"]["index"]]
    assert {fault["shard"] for fault in found["faults"]["index"]} == {str(messy[0])}
    assert "samples: index 4, shard 2" in differences
    assert "label_0: 2 rows differ, first at key a: index 1.0, shard 0.0" in differences
    assert "key: 1 rows differ, first at key z: index b, shard z" in differences
    assert "prompt: 1 rows differ, first at key z: index 'two colours', shard new" in differences
    starts = {text.split(" index ")[0].rstrip(":") for text in differences}
    assert starts >= {"bytes", "sha256", "index.json: bytes", "index.json: sha256", "index.json: ties"}
    assert any(text.startswith("content: 2 rows differ") for text in differences)
    assert f"{messy[0]}: samples: index 4, shard 2" in text


def test_a_missing_shard_and_missing_rows_of_an_index(messy, tmp_path, capsys):
    write_index(str(tmp_path), [index_shard(str(shard)) for shard in messy])
    messy[0].unlink()
    (tmp_path / "1.index.parquet").unlink()
    found, _ = report(capsys, [tmp_path / INDEX], tmp_path, code=1)
    assert [fault["shard"] for fault in found["faults"]["shards"]] == [str(messy[0])]
    assert found["faults"]["index"] == [
        {"shard": str(messy[1]), "difference": f"{rows_path(str(messy[1]))}, the shard's index, is missing"}
    ]
    assert found["samples"] == 4


def test_the_command_line_and_its_status(messy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["inspect", "--shards", str(tmp_path / "*.tar"), "--sheet_pairs", "0", "--workers", "1"])
    assert (tmp_path / "inspect/inspect.json").is_file()
    assert not (tmp_path / "inspect/inspect.png").exists()
    (tmp_path / "2.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--shards", str(tmp_path / "*.tar")])
    assert ended.value.code == 1
    assert "1 broken shards" in capsys.readouterr().out
    with pytest.raises(ValueError, match="workers is 0"):
        inspect(str(messy[0]), workers=0)
    with pytest.raises(ValueError, match="sheet_pairs is -1"):
        inspect(str(messy[0]), sheet_pairs=-1)


def test_the_sheet_has_the_chosen_image_left(tmp_path, capsys):
    red, blue = picture("red"), picture("blue", (1024, 512))
    pairs = [
        NewPair("0", red, blue, 1, "chosen is image 0"),
        NewPair("1", blue, red, 0, "chosen is image 1, of a prompt so long that it cannot be shown at all " * 9),
        NewPair("2", blue, red, 1, "chosen is the wide one"),
        NewPair("3", red, blue, 0.5, ""),
        NewPair("4", red, blue, 0, "chosen is the wide one"),
    ]
    write_shard(tmp_path / "0.tar", pairs)
    report(capsys, [tmp_path / "0.tar"], tmp_path)
    sheet = Image.open(tmp_path / "inspect.png")
    assert sheet.size == sheet_size(5)
    assert sheet_size(5)[1] > sheet_size(4)[1]
    for number, left_is_red in enumerate((True, True, False, True, False)):
        left, top = image_position(number)
        at_left, at_right = (sheet.getpixel((left + x, top + BOX // 2)) for x in (BOX // 2, BOX + BOX // 2))
        assert (at_left, at_right) == (((255, 0, 0), (0, 0, 255)) if left_is_red else ((0, 0, 255), (255, 0, 0)))
        wide = left + (BOX // 2 if not left_is_red else BOX + BOX // 2)
        assert sheet.getpixel((wide, top + BOX // 4 + 2)) == (0, 0, 255)  # half as high as wide, in the middle
        assert sheet.getpixel((wide, top + BOX // 4 - 2)) != (0, 0, 255)


def test_small_images_grow_pixel_by_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    large = np.asarray(fit(Image.fromarray(pixels)))
    assert large.shape == (256, 192, 3)
    assert (large[::8, ::8] == pixels).all()
    assert (large[7::8, 7::8] == pixels).all()
    assert fit(Image.new("RGB", (3000, 1000))).size == (256, 85)
    assert fit(Image.new("RGB", (200, 100))).size == (200, 100)


def test_prompts_are_cut_to_fit():
    class Font:  # one pixel a character
        getlength = staticmethod(len)

    assert cut("a short one", Font, 20, 2) == ["a short one"]
    assert cut("words that\nneed two lines", Font, 14, 2) == ["words that", "need two lines"]
    assert cut("words that need many lines", Font, 10, 2) == ["words that", "need many…"]
    assert cut("x" * 30, Font, 10, 2) == ["x" * 10, "x" * 9 + "…"]
    assert cut("", Font, 10, 2) == []
