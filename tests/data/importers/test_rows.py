"""Conversion of single rows: labels, images, text."""

import contextlib
import json

import pytest

from lit_align.cli import main
from lit_align.commands.importing.command import folder
from lit_align.data.importers.rejects import Rejected
from lit_align.data.importers.source import check_image, parse_label, parse_labels
from tests.support.imports import BUNDLED, encoded, read_all, rejects


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
    """A lone surrogate in a prompt is rejected; in other columns it is replaced, like NaN."""
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
            assert all(f"\n    {name} " in said for name in ("table", "pick-a-pic", "webdataset", "hpd", "folder"))
    assert "n (n - 1) / 2 pairs" in " ".join(said.split())


def test_captions_are_cleaned_and_long_ones_counted(images, capsys):
    """A byte order mark within a caption would be two tokens more; the import says how many captions are cut."""
    row = {"image_0": "train/0.jpg", "image_1": "train/1.jpg", "label": 1}
    prompts = ["\ufefffox", "a\u200b b", "word " * 90]
    (images / "pairs.jsonl").write_text("\n".join(json.dumps(row | {"prompt": prompt}) for prompt in prompts))
    folder(str(images / "out"), f"{images}/pairs.jsonl", workers=1)
    assert [pair.prompt for pair, _ in read_all(images / "out")] == ["fox", "a b", ("word " * 90).strip()]
    assert (
        "1 captions, at least, are longer than the 75 tokens that CLIP reads; the rest is cut"
        in capsys.readouterr().out
    )
