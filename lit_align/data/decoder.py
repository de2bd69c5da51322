"""The decoder of import, inspect, score, encode and fit: bytes to upright sRGB pixels."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lit_align.data.colours import ImageError, check_colours, to_srgb
from lit_align.data.shards.layout import JPEG

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 89_478_485  # Pillow's own limit, above which it warns
LONGEST = 16  # times the shorter side; of a longer image a square keeps less than 1 / 16
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")  # of an object in memory; meaningless to a reader
ORIENTATION = 0x0112  # in EXIF and TIFF
XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")
PNG_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")  # may stand behind the pixels
UPRIGHT = {  # how to turn what an orientation says
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
simplejpeg: Any = import_module("simplejpeg") if find_spec("simplejpeg") else None  # the extra `fast`


def decode_pixels(data: bytes) -> NDArray[np.uint8]:
    """Decode an image to (height, width, 3), equal to `decode`; simplejpeg, if installed, is faster on JPEG files.

    Raises:
        ImageError: as `decode` does.
    """
    if simplejpeg is not None and data.startswith(JPEG):
        with suppress(Exception):  # Pillow decides whether a damaged file is readable
            image = _open(data)
            if image.mode == "RGB" and check_colours(image, data) is None and orientation(image, data) == 1:
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
                return pixels
    image = decode(data)
    with _named():
        return np.array(image)


def decode(data: bytes, draft: bool = False) -> Image.Image:
    """Decode an image to RGB: upright, in sRGB, transparency on white.

    Args:
        data: its bytes.
        draft: decode a JPEG at an eighth of its size, which reads all bytes and computes little.

    Raises:
        ImageError: if it cannot be decoded, is too large or too long, has several frames, or its colours are unknown.
    """
    with _named():
        image = _open(data)
        transform = check_colours(image, data)
        if draft:
            image.draft(image.mode, (max(image.width // 8, 1), max(image.height // 8, 1)))
        image.load()
        turn = UPRIGHT.get(orientation(image, data))
        return to_srgb(image if turn is None else image.transpose(turn), transform)


def check_header(data: bytes) -> tuple[int, int]:
    """Return an image's height and width, upright, if nothing in front of its pixels forbids to train on it.

    Raises:
        ImageError: as `decode` does.
    """
    with _named():
        image = _open(data)
        check_colours(image, data)
        return _upright_size(image, data)


def upright_size(data: bytes) -> tuple[int, int]:
    """Read an encoded image's height and width, as `decode` makes them, from its header; (0, 0) if unreadable."""
    with suppress(ImageError), _named():
        return _upright_size(_open(data), data)
    return 0, 0


@contextmanager
def _named() -> Iterator[None]:
    """Turn any error into an `ImageError`: on damaged files Pillow raises errors of any class."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        words = ADDRESS.sub("it", str(error))
        raise ImageError(f"{type(error).__name__}: {words}") from error


def _open(data: bytes) -> Image.Image:
    """Open an image, and refuse sizes and frames on which nothing can be trained; its pixels are not loaded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"it begins with {data[:12]!r}, as no undamaged {', '.join(FORMATS)} does") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"it has more than {2 * MOST_PIXELS:,} pixels", "image has too many pixels") from error
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > MOST_PIXELS:
        raise ImageError(f"it has {size}, and at most {MOST_PIXELS:,} are read", "image has too many pixels")
    if max(image.size) > LONGEST * min(image.size):
        raise ImageError(f"it has {size}; a side may be {LONGEST} times the other", "image is too long")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # whose further frames are previews
        raise ImageError("it has several frames, and a pair needs one", "image has several frames")
    return image


def orientation(image: Image.Image, data: bytes) -> int:
    """Read how an opened image must be turned, 1 to 8, from EXIF, TIFF tag or XMP; 1 where none says it.

    Args:
        image: an opened image. A TIFF that is loaded has been turned already.
        data: its bytes.
    """
    if image.format == "PNG" and "exif" not in image.info and not _has_metadata(data):
        return 1  # `getexif` would load the pixels
    found: Any = None
    with suppress(Exception):  # a broken EXIF says nothing
        found = image.getexif().get(ORIENTATION)
    if found not in range(1, 9) and image.format != "TIFF":
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp", b"")
        said = XMP_ORIENTATION.search(packet.encode() if isinstance(packet, str) else packet)
        found = int(said[1]) if said else 1
    return int(found) if found in range(1, 9) else 1


def _has_metadata(data: bytes) -> bool:
    """Whether a chunk of a PNG, also behind the pixels, may hold an orientation."""
    at = 8
    while at + 8 < len(data):
        if data.startswith(PNG_METADATA, at + 4) or data.startswith(PNG_METADATA, at + 8):
            return True
        at += 12 + int.from_bytes(data[at : at + 4])
    return False


def _upright_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    width, height = image.size
    known = ORIENTATION in getattr(image, "tag_v2", ())  # then Pillow has exchanged the sides of a TIFF
    return (width, height) if orientation(image, data) >= 5 and not known else (height, width)
