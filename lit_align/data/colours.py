"""Convert decoded images of any pixel format and colour description to 8-bit sRGB, or refuse them by name.

What is sRGB, or says nothing of its colours, keeps its pixels; transparency goes on white.
"""

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
SRGB_GAMMA = 0.45455
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x, y of white, red, green, blue
SRGB_PRIMARIES, SRGB_TRANSFERS = (1, 2), (1, 2, 6, 13, 14, 15)  # of ITU-T H.273; 2 says nothing, 16 and 18 are HDR
SAME = 3  # largest difference, of 255, that makes a profile a variant of sRGB
Transform = Callable[[Image.Image], Image.Image]


class ImageError(ValueError):
    """Raised for bytes that cannot be decoded to an image of known colours.

    Args:
        detail: what is wrong with this image.
        reason: its kind, to be counted.
    """

    def __init__(self, detail: str, reason: str = "image cannot be decoded") -> None:
        super().__init__(detail)
        self.detail, self.reason = detail, reason


def refuse_colours(detail: str) -> ImageError:
    """Make the error of an image whose colours a plain conversion would change."""
    return ImageError(f"{detail}. Save it as sRGB with 8 bits.", "image's colours are not known to be sRGB")


def check_colours(image: Image.Image, data: bytes) -> Transform | None:
    """Find what brings an opened image's colours to sRGB; None if they are sRGB.

    Args:
        image: its pixels need not be loaded.
        data: its bytes.

    Raises:
        ImageError: if the colours cannot be converted rightly.
    """
    _check_mode(image, data)
    profile = image.info.get("icc_profile")
    if profile:
        return _transform(profile, "CMYK" if image.mode == "CMYK" else "L" if _is_grey(image) else "RGB")
    if image.mode == "CMYK":
        raise refuse_colours("it is CMYK without a colour profile")
    _check_description(image, data)
    return None


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "I", *GREY_16)


def _check_mode(image: Image.Image, data: bytes) -> None:
    mode, kind, deep = image.mode, image.format, image.mode in ("I", *GREY_16)
    if deep and not _has_16_bits(image):
        raise refuse_colours(f"its grey values ({kind}, mode {mode}) have no known white")
    if not deep and mode not in (*PLAIN, "CMYK"):
        raise refuse_colours(f"its pixels ({kind}, mode {mode}) are of no kind that is converted")
    if "transparency" in image.info and (deep or (kind == "PNG" and data[24] == 16)):
        raise refuse_colours("it has 16 bits and a transparent colour")
    if mode == "CMYK" and kind in ("JPEG", "MPO") and "adobe" not in image.info:
        raise refuse_colours("it is a CMYK JPEG that does not say whether its inks are inverted")
    palette = getattr(image, "palette", None)
    if palette is not None and palette.mode not in ("RGB", "RGBA", "L", "LA"):
        raise refuse_colours(f"its palette is {palette.mode}")


def _has_16_bits(image: Image.Image) -> bool:
    """Whether white is 65535 by the rules of the format."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return image.mode != "I" and tags.get(258) == (16,) and tags.get(262) == 1
    return image.format in ("PNG", "PPM")


def _check_description(image: Image.Image, data: bytes) -> None:
    """Refuse what formats say of colours elsewhere than in a profile, unless it is sRGB."""
    info = image.info
    codes = _codes(image.format or "", data)
    if codes is not None and (codes[0] not in SRGB_PRIMARIES or codes[1] not in SRGB_TRANSFERS):
        hdr = {16: ", HDR", 18: ", HDR"}.get(codes[1], "")
        raise refuse_colours(f"its colours have primaries {codes[0]} and transfer {codes[1]} of H.273{hdr}")
    if codes is None and "srgb" not in info:
        if abs(info.get("gamma", SRGB_GAMMA) - SRGB_GAMMA) > 0.01:
            raise refuse_colours(f"its gamma (gAMA) is {info['gamma']:g}, and that of sRGB {SRGB_GAMMA:g}")
        if np.abs(np.subtract(info.get("chromaticity", SRGB_CHROMATICITY), SRGB_CHROMATICITY)).max() > 0.01:
            raise refuse_colours("its primary colours (cHRM) are not those of sRGB")
    if image.format == "BMP" and data[70:74] in (b"DEBM", b"KNIL") and data[14] == 124:
        raise refuse_colours("it is a BMP with a colour profile")
    if image.format in ("JPEG", "MPO", "TIFF") and _is_adobe_rgb(image):
        raise refuse_colours("its EXIF says Adobe RGB")


def _codes(kind: str, data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer of H.273 in a PNG (cICP) or AVIF (nclx); None if there are none."""
    if kind == "AVIF":
        begin = data.find(b"colrnclx") + 8
        return (
            None
            if begin < 8
            else (int.from_bytes(data[begin : begin + 2]), int.from_bytes(data[begin + 2 : begin + 4]))
        )
    if kind == "PNG":
        at = 8
        while data[at + 4 : at + 8] not in (b"IDAT", b""):
            if data[at + 4 : at + 8] == b"cICP":
                return data[at + 8], data[at + 9]
            at += 12 + int.from_bytes(data[at : at + 4])
    return None


def _is_adobe_rgb(image: Image.Image) -> bool:
    try:
        exif = image.getexif()
        return exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03" or exif.get_ifd(ExifTags.IFD.Exif).get(0xA001) == 2
    except Exception:  # a broken EXIF says nothing
        return False


@lru_cache(maxsize=16)  # of profiles, up to 2 MB each
def _transform(profile: bytes, mode: str) -> Transform | None:
    """Make the conversion of a profile's colours to sRGB; None if they are sRGB.

    Raises:
        ImageError: if the profile cannot be read, or is for another kind of pixels than `mode`, and grey is no RGB.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        found = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space, space)
        if found != mode and (found, mode) != ("RGB", "L"):  # equal values of red, green and blue are grey
            raise refuse_colours(f"its colour profile is for {space}, and its pixels are {mode}")
        made: Any = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            found,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise refuse_colours(f"its colour profile cannot be used: {error}") from error

    def convert(image: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(image.convert(found), made)
        assert converted is not None
        return converted

    return None if found != "CMYK" and _keeps_pixels(convert, found) else convert


def _keeps_pixels(convert: Transform, mode: str) -> bool:
    """Whether a conversion changes colours by no more than variants of sRGB differ."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    image = Image.fromarray(colours)
    return np.abs(np.asarray(convert(image), np.int16) - colours).max() <= SAME


def to_srgb(image: Image.Image, transform: Transform | None) -> Image.Image:
    """Convert a loaded image to RGB; `transform` is that of `check_colours`."""
    if image.mode in ("I", *GREY_16):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # as Pillow does with 16-bit RGB
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        if transform is not None:
            alpha = layer.getchannel("A")
            layer = transform(image)
            layer.putalpha(alpha)
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if transform is not None:
        return transform(image)
    return image if image.mode == "RGB" else image.convert("RGB")
