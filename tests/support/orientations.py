"""Images that state their orientation in each of the ways that formats have."""

import io
import struct
import zlib

from PIL import Image

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{}/></rdf:RDF></x:xmpmeta>'
)
FORMS = (' tiff:Orientation="{}"', " tiff:Orientation = '{}'", "><tiff:Orientation>{}</tiff:Orientation")
TAG = 0x0112


def exif(orientation: int) -> bytes:
    """EXIF of an orientation."""
    found = Image.Exif()
    found[TAG] = orientation
    return found.tobytes()


def broken_exif(orientation: int) -> bytes:
    """EXIF with a resolution of -1 / 0, which Pillow reads and cannot write."""
    tags = struct.pack("<HHII", 0x011A, 5, 1, 38) + struct.pack("<HHIHH", TAG, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0) + struct.pack("<iI", -1, 0)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode an image; `options` are those of Pillow's format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_with(data: bytes, name: bytes, content: bytes, behind: bool) -> bytes:
    """Put a chunk into a PNG, before or behind its pixels."""
    at = data.index(b"IEND") - 4 if behind else 33
    return data[:at] + png_chunk(name, content) + data[at:]


def png_chunk(name: bytes, content: bytes) -> bytes:
    """Make a chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_xmp(text: str) -> bytes:
    """Content of an iTXt chunk with an XMP packet."""
    return b"XML:com.adobe.xmp\0\0\0\0\0" + text.encode()


def all_ways(image: Image.Image, orientation: int) -> dict[str, bytes]:
    """Encode an image in every way to state an orientation, by a name for each."""
    options = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    made, tag = {}, exif(orientation)
    for kind in ("JPEG", "WEBP", "AVIF", "TIFF", "PNG"):
        made[f"{kind} EXIF"] = save(image, kind, exif=tag, **options.get(kind, {}))
    made["JPEG broken EXIF"] = save(image, "JPEG", exif=broken_exif(orientation), **options["JPEG"])
    made["PNG broken EXIF"] = save(image, "PNG", exif=broken_exif(orientation))
    for number, form in enumerate(FORMS):
        text = XMP.format(form.format(orientation)).replace(
            "/></rdf:RDF>", "></rdf:Description></rdf:RDF>", number // 2
        )
        for kind in ("JPEG", "WEBP", "AVIF"):
            made[f"{kind} XMP {number}"] = save(image, kind, xmp=text.encode(), **options[kind])
        for behind in (False, True):
            made[f"PNG XMP {number} {behind}"] = png_with(save(image, "PNG"), b"iTXt", png_xmp(text), behind)
    made["TIFF XMP"] = save(image, "TIFF", tiffinfo={700: XMP.format(FORMS[0].format(orientation)).encode()})
    made["TIFF compressed"] = save(image, "TIFF", compression="tiff_deflate", tiffinfo={TAG: orientation})
    made["PNG EXIF behind"] = png_with(save(image, "PNG"), b"eXIf", tag.removeprefix(b"Exif\0\0"), True)
    raw = f"Raw profile type exif\0\nexif\n{len(tag):8}\n{tag.hex()}\n".encode()
    made["PNG raw profile"] = png_with(save(image, "PNG"), b"tEXt", raw, False)
    return made
