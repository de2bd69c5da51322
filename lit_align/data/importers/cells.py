"""Cells of a table that hold an image or a prompt, in the forms of public data sets."""

import base64
import binascii
from typing import Any

from lit_align.data.importers.rejects import Rejected
from lit_align.data.importers.source import check_image, load_image
from lit_align.data.shards.filesystems import is_url, join

ENCODED = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")  # how JPEG, PNG, WebP and GIF begin in base64
REFERENCES = ("image", "image_url", "url", "src", "file_name")  # in a part of a message, or a viewer's JSON


def load_cell(column: str, value: Any, base: str) -> bytes:
    """Load the image of a cell: bytes, a struct with bytes or path, a path, a URL, base64, or a list or message of one.

    Args:
        column: its name, for messages.
        value: of the cell.
        base: folder or URL to which paths are relative.

    Raises:
        Rejected: if there is not exactly one image, or it cannot be decoded.
    """
    found = _references(value)
    if len(found) > 1:
        raise Rejected("more than one image in a cell", f"column {column} has {len(found)}")
    if not found or (isinstance(found[0], str) and not found[0].strip()):
        raise Rejected("image missing", f"column {column} names no file")
    if isinstance(found[0], bytes):
        return check_image(found[0])
    text = found[0].strip()
    if text.startswith("data:") or (text.startswith(ENCODED) and len(text) > 100):
        return check_image(_decode(column, text))
    return load_image(join(base, text))


def image_name(value: Any) -> str | None:
    """Path or URL that a cell names; None if it holds the image itself."""
    found = _references(value)
    named = found[0] if len(found) == 1 else None
    return named if isinstance(named, str) and not named.strip().startswith(("data:", *ENCODED)) else None


def is_remote(value: Any, base: str) -> bool:
    """Whether a cell's image is read from the network."""
    named = image_name(value)
    return named is not None and is_url(join(base, named.strip()))


def prompt_of(value: Any) -> Any:
    """The prompt of a cell: text as it is, or the one text in a list of messages or of their parts.

    Raises:
        Rejected: if messages hold no text or more than one.
    """
    if not isinstance(value, list | tuple | dict):
        return value
    messages = [value] if isinstance(value, dict) else list(value)
    asked = [one for one in messages if not isinstance(one, dict) or one.get("role") in (None, "user", "human")]
    texts = [text for one in asked for text in _texts(one)]
    if len(texts) != 1:
        raise Rejected("prompt is not one text", f"its messages hold {len(texts)} texts")
    return texts[0]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one)]
    if isinstance(value, dict):
        return _texts(next((value[name] for name in ("content", "text", "value") if value.get(name) is not None), None))
    return []


def _references(value: Any) -> list[bytes | str]:
    """Images of a cell, in order; text of messages is no image."""
    if isinstance(value, bytes | str):
        return [value]
    if isinstance(value, bytearray | memoryview):
        return [bytes(value)]
    if isinstance(value, list | tuple):
        answers = [one for one in value if isinstance(one, dict) and one.get("role") == "assistant"]
        return [found for one in answers or value for found in _references(one)]
    if not isinstance(value, dict) or value.get("type") == "text":
        return []
    if value.get("bytes") is not None or value.get("path") is not None:
        return _references(value["bytes"] if value.get("bytes") is not None else value["path"])
    if value.get("content") is not None:
        return _references(value["content"])
    return [found for name in REFERENCES if value.get(name) is not None for found in _references(value[name])]


def _decode(column: str, text: str) -> bytes:
    head, _, body = text.partition(",") if text.startswith("data:") else ("", "", text)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("image cannot be decoded", f"column {column}: {head or 'base64'}: {error}") from error
