"""Every pixel format and colour description is converted to sRGB rightly, or refused by name."""

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lit_align.data.decoder import ImageError, check_header, decode_pixels
from lit_align.data.importers.rejects import Rejected
from lit_align.data.importers.source import check_image
from tests.support.orientations import png_chunk, png_with, save
from tests.support.profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    rgb_profile,
    srgb_curve,
    to_srgb_values,
)

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)
RGB = Image.fromarray(COLOURS)
GREY = Image.fromarray(COLOURS[..., 0])
DEEP = RNG.integers(0, 65536, (32, 48), dtype=np.uint16)
CUT = Image.fromarray(np.dstack([COLOURS, RNG.integers(0, 256, (32, 48), dtype=np.uint8)]))


def refused(data):
    """The words of a refusal, which the check of the header, the decoder and an import give alike."""
    with pytest.raises(ImageError) as one:
        decode_pixels(data)
    with pytest.raises(ImageError) as two:
        check_header(data)
    with pytest.raises(Rejected) as three:
        check_image(data)
    assert str(one.value) == str(two.value)
    assert (three.value.reason, three.value.detail) == (one.value.reason, str(one.value)[:200])
    return f"{one.value.reason}: {one.value}"


def rgb16(transparent=b""):
    """A PNG with 16 bits for each of red, green and blue, which are equal."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.stack([DEEP] * 3, -1).astype(">u2"))
    header = struct.pack(">IIBBBBB", 48, 32, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    made = [png_chunk(name, content) for name, content in chunks if content or name == b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


# -- what stays as it is


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_plain_pixels_are_those_of_the_file(kind):
    data = save(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert (decode_pixels(data) == COLOURS).all()
    assert check_header(data) == (32, 48)


def test_variants_of_srgb_keep_their_pixels():
    """A profile, or an sRGB, gAMA, cHRM or cICP chunk, that says sRGB."""
    plain = save(RGB, "JPEG", quality=95)
    assert (decode_pixels(save(RGB, "JPEG", quality=95, icc_profile=rgb_profile(SRGB))) == decode_pixels(plain)).all()
    png = save(RGB, "PNG")
    chromaticity = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    odd = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    chunks = {
        "sRGB": [(b"sRGB", b"\0")],
        "gAMA": [(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", chromaticity)],
        "cICP": [(b"cICP", bytes((1, 13, 0, 1))), (b"gAMA", struct.pack(">I", 100000))],
        "sRGB before others": [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100000)), (b"cHRM", odd)],
    }
    for name, parts in chunks.items():
        data = png
        for part in parts:
            data = png_with(data, *part, False)
        assert (decode_pixels(data) == COLOURS).all(), name


# -- what is converted


@pytest.mark.parametrize(("kind", "values"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<i4")])
def test_grey_of_16_bits(kind, values):
    """A plain conversion would make 255 of all values above it."""
    data = save(Image.fromarray(DEEP.astype(values)), kind)
    assert (decode_pixels(data) == (DEEP >> 8)[..., None]).all()
    assert (decode_pixels(rgb16()) == decode_pixels(data)).all()


@pytest.mark.parametrize(("colorants", "gamma"), [(DISPLAY_P3, None), (ADOBE_RGB, 2.19921875), (SRGB, 1.8)])
def test_profiles_that_are_not_srgb(colorants, gamma):
    values = COLOURS / 255
    light = srgb_curve(values) if gamma is None else values**gamma
    inside = light @ np.array(colorants) @ np.linalg.inv(SRGB)
    wanted = 255 * to_srgb_values(np.clip(inside, 0, 1))
    assert np.abs(wanted - COLOURS).mean() > 5
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = save(RGB, kind, icc_profile=rgb_profile(colorants, gamma), **options)
        assert np.abs(decode_pixels(data) - wanted).max() < 2.5, kind
    jpeg = save(RGB, "JPEG", quality=100, subsampling=0, icc_profile=rgb_profile(colorants, gamma))
    assert np.abs(decode_pixels(jpeg) - wanted).mean() < 3  # also where simplejpeg is installed


def test_profiles_of_grey_pixels():
    wanted = 255 * to_srgb_values((COLOURS[..., :1] / 255) ** 1.8)
    for profile in (grey_profile(1.8), rgb_profile(SRGB, 1.8)):
        assert np.abs(decode_pixels(save(GREY, "PNG", icc_profile=profile)) - wanted).max() < 1.5
        deep = Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257)
        assert np.abs(decode_pixels(save(deep, "PNG", icc_profile=profile)) - wanted).max() < 1.5
    assert (decode_pixels(save(GREY, "PNG", icc_profile=grey_profile())) == COLOURS[..., :1]).all()


def test_cmyk_with_a_profile():
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, 8:16, 3] = 255
    inks[:, 16:, 0] = 255
    for kind in ("JPEG", "TIFF"):  # a JPEG of Pillow is inverted, and says so
        white, black, cyan = (
            decode_pixels(save(Image.fromarray(inks, "CMYK"), kind, icc_profile=cmyk_profile()))[4, at]
            for at in (4, 12, 20)
        )
        assert white.min() > 250, kind
        assert black.max() < 5, kind
        assert cyan[0] < 20 < 100 < cyan[1], kind


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_on_white(mode):
    image = CUT.convert(mode)
    pixels, alpha = (
        np.asarray(image.convert("RGBA"), float)[..., :3],
        np.asarray(image.getchannel("A"))[..., None] / 255,
    )
    assert np.abs(decode_pixels(save(image, "PNG")) - (pixels * alpha + 255 * (1 - alpha))).max() <= 1
    light = (pixels / 255) ** 1.8
    data = save(image, "PNG", icc_profile=rgb_profile(SRGB, 1.8))
    wanted = 255 * to_srgb_values(light) * alpha + 255 * (1 - alpha)
    assert np.abs(decode_pixels(data) - wanted).max() <= 2


def test_transparent_colours_are_white():
    palette = Image.fromarray(COLOURS[..., 0] // 64 * 64)
    for image in (palette, palette.convert("P"), palette.convert("RGB")):
        key = image.getpixel((0, 0))
        found = decode_pixels(save(image, "PNG", transparency=key))
        same = np.asarray(palette) == palette.getpixel((0, 0))
        assert (found[same] == 255).all()
        assert (found[~same] == np.asarray(palette)[~same][:, None]).all()
    assert set(np.unique(decode_pixels(save(GREY.convert("1"), "PNG")))) == {0, 255}


# -- what is refused


def tiff(array):
    return save(Image.fromarray(array), "TIFF")


def with_tag(data, tag, value):
    """A little-endian TIFF with another value of a short tag."""
    at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return data[:at] + struct.pack("<H", value) + data[at + 2 :]


REFUSED = {
    "float": (tiff(DEEP.astype(np.float32) / 65535), r"its pixels \(TIFF, mode F\)"),
    "grey of 32 bits": (tiff(DEEP.astype(np.int32)), r"its grey values \(TIFF, mode I\) have no known white"),
    "white is zero": (with_tag(tiff(DEEP), 262, 0), r"its grey values \(TIFF, mode I;16\) have no known white"),
    "12 bits": (with_tag(tiff(DEEP), 258, 12), r"its grey values \(TIFF, mode I;16\) have no known white"),
    "LAB": (save(RGB.convert("LAB"), "TIFF"), r"mode LAB\) are of no kind that is converted"),
    "CMYK": (save(RGB.convert("CMYK"), "TIFF"), "it is CMYK without a colour profile"),
    "CMYK JPEG": (save(RGB.convert("CMYK"), "JPEG"), "it is CMYK without a colour profile"),
    "no Adobe": (
        save(RGB.convert("CMYK"), "JPEG", icc_profile=cmyk_profile()).replace(b"Adobe", b"Adobf", 1),
        "does not say whether its inks are inverted",
    ),
    "profile of other pixels": (save(RGB, "PNG", icc_profile=grey_profile(1.8)), "is for GRAY, and its pixels are RGB"),
    "profile of inks": (save(RGB, "JPEG", icc_profile=cmyk_profile()), "is for CMYK, and its pixels are RGB"),
    "no profile": (save(RGB, "PNG", icc_profile=b"no profile"), "its colour profile cannot be used: cannot open"),
    "gamma": (png_with(save(RGB, "PNG"), b"gAMA", struct.pack(">I", 100000), False), r"its gamma \(gAMA\) is 1, and"),
    "primaries": (
        png_with(save(RGB, "PNG"), b"cHRM", struct.pack(">8I", *range(0, 80000, 10000)), False),
        r"its primary colours \(cHRM\) are not those of sRGB",
    ),
    "HDR PNG": (png_with(save(RGB, "PNG"), b"cICP", bytes((9, 16, 0, 1)), False), "primaries 9 and transfer 16 .* HDR"),
    "HDR AVIF": (
        save(RGB, "AVIF").replace(b"colrnclx\0\1\0\15", b"colrnclx\0\11\0\22"),
        "primaries 9 and transfer 18 .* HDR",
    ),
    "P3 AVIF": (save(RGB, "AVIF").replace(b"colrnclx\0\1", b"colrnclx\0\14"), "primaries 12 and transfer 13"),
    "16 bits and transparent": (rgb16(b"\1\2\3\4\5\6"), "it has 16 bits and a transparent colour"),
    "16 grey bits and transparent": (
        save(Image.fromarray(DEEP), "PNG", transparency=258),
        "it has 16 bits and a transparent colour",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_colours_are_refused_by_name(name):
    data, words = REFUSED[name]
    assert re.search(words, refused(data)), refused(data)
    assert refused(data).startswith("image's colours are not known to be sRGB: ")
    assert refused(data).endswith(". Save it as sRGB with 8 bits.")


def test_adobe_rgb_of_cameras_is_refused():
    """Cameras state it in EXIF alone: interoperability R03."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    assert "its EXIF says Adobe RGB" in refused(save(RGB, "JPEG", exif=exif))
    exif.get_ifd(0x8769)[0xA005] = {1: "R98"}
    assert decode_pixels(save(RGB, "JPEG", exif=exif)).shape == (32, 48, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_several_frames_are_refused(kind):
    frames = {"save_all": True, "append_images": [RGB.rotate(180)]}
    assert refused(save(RGB, kind, **frames)) == "image has several frames: it has several frames, and a pair needs one"
    assert decode_pixels(save(RGB, "MPO", **frames)).shape == (32, 48, 3)  # a photograph and its preview
