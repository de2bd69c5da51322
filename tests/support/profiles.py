"""Colour profiles (ICC, version 2) made for a test."""

import struct

import numpy as np

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))  # XYZ of D50
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
WHITE = (0.9642, 1.0, 0.8249)


def srgb_curve(values: np.ndarray) -> np.ndarray:
    """sRGB values in [0, 1] to light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_srgb_values(light: np.ndarray) -> np.ndarray:
    """Light in [0, 1] to sRGB values."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.clip(light, 0.0031308, 1) ** (1 / 2.4) - 0.055)


def rgb_profile(colorants, gamma: float | None = None) -> bytes:
    """Profile with the XYZ of red, green and blue, and a gamma; None: the curve of sRGB, as a table."""
    xyz = {name: _xyz(one) for name, one in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)}
    return _profile(b"RGB ", b"XYZ ", {**xyz, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))})


def grey_profile(gamma: float | None = None) -> bytes:
    """Profile of grey pixels."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """Profile of four inks whose lightness is 100, less 50 for each ink and 100 for black; cyan is green-blue."""
    identity = bytes(range(256))
    nodes = [
        (255 * max(0.0, 1 - 0.5 * (c + m + y) - k), 128 - 64 * c + 64 * m, 128 - 32 * c + 64 * y)
        for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)
    ]  # fmt: skip
    table = bytes(round(value) for node in nodes for value in node)
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + matrix + identity * 4 + table + identity * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut, b"A2B1": lut}, b"prtr")


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve(gamma: float | None) -> bytes:
    if gamma is not None:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    table = (srgb_curve(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + table.tobytes()


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    tags = {b"wtpt": _xyz(WHITE), **tags}
    table, content, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", at, len(value))
        content, at = content + value, at + len(value)
    head = struct.pack(">I4sI4s4s4s", at, b"none", 0x02400000, kind, space, connection)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _xyz(WHITE)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content
