"""The data benchmark: both implementations give equal pixels; decoding and resizing are exact to a rounding."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import compare_decoders, compare_ways, make_pairs, released_way
from lit_align.data import decoder
from lit_align.data.decoder import decode, decode_pixels
from lit_align.data.images import PairTransform, resize


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"), 2, 64, 64)


def encoded(pixels, kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def test_the_files_are_the_same_each_time(pairs, tmp_path):
    assert make_pairs(tmp_path, 2, 64, 64) == pairs
    assert len({data for pair in pairs for data in pair}) == 4


@pytest.mark.parametrize(("size", "tolerance"), [(64, 1e-4), (48, 1.01)])
def test_both_ways_give_the_same_pixels(pairs, size, tolerance):
    """Ours resizes in uint8, so a resized pixel may differ by a rounding."""
    flips = set()
    for seed in range(6):
        for pair in pairs:
            theirs = released_way(pair, random.Random(seed), size)
            ours = PairTransform()(pair, random.Random(seed), (size, size))
            assert theirs.pixels.dtype == torch.float32
            assert theirs.pixels.shape == (6, size, size)
            assert torch.cat(ours.images).dtype == torch.uint8
            difference = (theirs.pixels + 1) * 127.5 - torch.cat(ours.images)
            assert difference.abs().max() <= tolerance
            assert ours.time_ids[0].tolist() == [*theirs.original, *theirs.corner, size, size]
            flips.add(ours.flipped)
    assert flips == {False, True}


def test_the_second_image_is_stretched_in_the_released_way_alone(tmp_path):
    wide, square = (make_pairs(tmp_path, 1, width, 64)[0][0] for width in (96, 64))
    theirs = released_way((square, wide), random.Random(0), 64)
    ours = PairTransform()((square, wide), random.Random(0), (64, 64))
    difference = ((theirs.pixels + 1) * 127.5 - torch.cat(ours.images)).abs()
    assert difference[:3].max() < 1e-4
    assert difference[3:].mean() > 2


def test_measuring_gives_a_time_for_each_round_and_way(pairs):
    seconds = compare_ways(pairs, 64, rounds=2)
    assert set(seconds) >= {"released", "lit-align"}
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    rows = compare_decoders(pairs, rounds=1)
    assert rows[0][0] == "Pillow"
    assert all(difference == 0 for _, _, difference in rows)


def test_resizing_is_exact_to_a_rounding():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for height, width in ((64, 96), (20, 30), (60, 45), (200, 300)):
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
        exact = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
        exact = exact[0].permute(1, 2, 0).numpy()
        ours = resize(pixels, height, width)
        pillow = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        assert ours.shape == (height, width, 3)
        assert np.abs(ours - exact).max() <= 1.01  # two directions, each with a rounding
        assert np.abs(ours.astype(int) - pillow).max() <= 2
        assert (ours != pillow).mean() < 0.02


def test_an_image_with_nothing_to_turn_is_not_copied_and_others_are_upright():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert (np.asarray(decode(encoded(pixels, "PNG"))) == pixels).all()
    turned = Image.Exif()
    turned[decoder.ORIENTATION] = 6  # a quarter clockwise
    upright = np.rot90(pixels, -1)
    for data in (encoded(pixels, "PNG", exif=turned), encoded(pixels, "WEBP", lossless=True, exif=turned)):
        assert (np.asarray(decode(data)) == upright).all()
        assert (decode_pixels(data) == upright).all()
    assert decode(encoded(pixels, exif=turned)).size == (20, 30)
    assert decode(encoded(pixels, "PNG", "L")).mode == "RGB"


def test_simplejpeg_decodes_to_the_same_pixels(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    assert decoder.simplejpeg is simplejpeg
    few = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(few).resize((133, 97), Image.Resampling.BICUBIC))
    turned = Image.Exif()
    turned[decoder.ORIENTATION] = 6
    files = [
        encoded(pixels, quality=q, subsampling=s, progressive=p) for q in (40, 95) for s in (0, 1, 2) for p in (0, 1)
    ]
    files += [encoded(pixels, exif=turned), encoded(pixels, mode="L")]
    files += [encoded(pixels, keep_rgb=True), encoded(pixels, "PNG"), encoded(pixels, "WEBP")]
    files.append(files[0] + b"more")  # which Pillow can read
    for data in files:
        assert (decode_pixels(data) == np.asarray(decode(data))).all()
    for data in (files[0][:-2], files[0][: len(files[0]) // 2], b"", b"no image", encoded(pixels, mode="CMYK")):
        with pytest.raises((OSError, ValueError, SyntaxError)) as ours:
            decode_pixels(data)
        with pytest.raises(type(ours.value)):
            decode(data)
    monkeypatch.setattr(decoder, "simplejpeg", None)
    assert (decode_pixels(files[0]) == np.asarray(decode(files[0]))).all()
