"""One decoder: orientation in every form, bounds, and what the index says of an image."""

import io

import numpy as np
import pytest
from PIL import Image

from lit_align.commands.inspect.inspection import inspect_shards
from lit_align.commands.score.scoring import _decode
from lit_align.data.decoder import ImageError, check_header, decode, decode_pixels, upright_size
from lit_align.data.importers.rejects import Rejected
from lit_align.data.importers.source import check_image
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.index import SIZES, scan_rows
from lit_align.data.shards.layout import read_samples
from lit_align.data.shards.writer import NewPair, write_shard
from tests.support.orientations import all_ways, broken_exif, save

STORED = Image.new("RGB", (40, 24), "red")
STORED.paste("blue", (0, 0, 16, 8))
STORED.paste("lime", (0, 16, 16, 24))
PIXELS = np.asarray(STORED)
UPRIGHT = {  # by EXIF's words for the place of row 0 and column 0
    1: PIXELS,  # top, left
    2: PIXELS[:, ::-1],  # top, right
    3: PIXELS[::-1, ::-1],  # bottom, right
    4: PIXELS[::-1],  # bottom, left
    5: PIXELS.transpose(1, 0, 2),  # left, top
    6: PIXELS.transpose(1, 0, 2)[:, ::-1],  # right, top
    7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: PIXELS.transpose(1, 0, 2)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_all_forms(orientation):
    """The header says the size that the decoder makes, and an import takes what training can decode."""
    made = all_ways(STORED, orientation)
    assert len(made) == 26
    for name, data in made.items():
        found = decode_pixels(data)
        assert found.shape == UPRIGHT[orientation].shape, name
        assert np.abs(found.astype(int) - UPRIGHT[orientation]).max() <= 40, name  # JPEG and AVIF have losses
        assert upright_size(data) == check_header(data) == found.shape[:2], name
        assert check_image(data) == data
        assert decode(data).size == found.shape[1::-1]


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"no EXIF", broken_exif(0), broken_exif(9)]
)
def test_an_exif_without_orientation_says_nothing(exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode_pixels(save(STORED, kind, exif=exif)).shape == PIXELS.shape


def test_index_inspect_and_score_say_the_size_that_training_sees(tmp_path, capsys):
    """With an index and without one, where only the front of each JPEG is read."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8))
    ways = [(name, data) for name, data in all_ways(noise, 6).items() if "AVIF" not in name]  # it encodes slowly
    assert max(len(data) for _, data in ways) > 1 << 16
    pairs = [NewPair(f"{n:02d}", data, ways[0][1], 1.0, name) for n, (name, data) in enumerate(ways)]
    write_shard(tmp_path / "0.tar", pairs)
    whole, front = (scan_rows(str(tmp_path / "0.tar"), whole, sizes=True).to_pylist() for whole in (True, False))
    for table in (whole, front):
        assert [row["fault"] for row in table] == [None] * len(ways)
        assert {tuple(row[name] for name in SIZES) for row in table} == {(200, 120, 200, 120)}
    inspect_shards(str(tmp_path / "0.tar"), tmp_path / "report", 0, 0, 1)
    print(capsys.readouterr().out, (tmp_path / "report/inspect.json").read_text())
    for sample in read_samples(str(tmp_path / "0.tar")):
        assert [image.shape for image in _decode(sample, ReadOptions()).images] == [(3, 200, 120)] * 2


def flat(size, mode="1"):
    return save(Image.new(mode, size), "PNG")


BOUNDS = {
    "line": (flat((1000, 1)), "image is too long", "it has 1000 x 1 pixels; a side may be 16 times the other"),
    "column": (flat((1, 60000)), "image is too long", "it has 1 x 60000 pixels"),
    "17 to 1": (flat((170, 10)), "image is too long", "it has 170 x 10"),
    "huge": (flat((10000, 9000)), "image has too many pixels", "it has 10000 x 9000 pixels, and at most 89,478,485"),
    "bomb": (flat((20000, 19000)), "image has too many pixels", "it has more than 178,956,970 pixels"),
    "page": (
        b"<!DOCTYPE html><html></html>",
        "image cannot be decoded",
        "it begins with b'<!DOCTYPE ht', as no",
    ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name, tmp_path):
    """The decoder, the import and the index name the same reason."""
    data, reason, words = BOUNDS[name]
    for check in (decode_pixels, check_header):
        with pytest.raises(ImageError, match=words) as error:
            check(data)
        assert error.value.reason == reason
    with pytest.raises(Rejected, match=words) as rejected:
        check_image(data)
    assert rejected.value.reason == reason
    write_shard(tmp_path / "0.tar", [NewPair("0", save(STORED, "PNG"), data, 1.0, "x")])
    (row,) = scan_rows(str(tmp_path / "0.tar"), True).to_pylist()
    assert row["fault"].startswith(f"shard {tmp_path}/0.tar, key 0: jpg_1: {reason}; {words[:10]}")
    assert row["label_0"] != row["label_0"]


def test_what_is_just_inside_the_bounds():
    assert decode_pixels(flat((160, 10))).shape == (10, 160, 3)
    assert check_header(flat((10, 160))) == (160, 10)


def test_a_draft_is_decoded_to_its_end():
    data = save(STORED.resize((400, 240)), "JPEG")
    assert decode(data, draft=True).size == (50, 30)
    with pytest.raises(ImageError, match="truncated"):
        decode(data[:-40], draft=True)
    assert io.BytesIO(data).read() == check_image(data)
