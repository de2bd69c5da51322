"""Text on images in any script: each character in a font that has it, or else as its code point, never as a box."""

import shutil
import subprocess
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

# The first ones that are found: of Linux, macOS and Windows. Pillow's own font has Latin letters alone.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "msgothic.ttc",
    "malgun.ttf",
    "Nirmala.ttf",
)
NO_CHARACTER = "\U0010ffff"  # whose picture is the box of a missing character
Font = ImageFont.FreeTypeFont


class Lettering:
    """Measures and draws text of one size.

    Args:
        points: size of the letters.
        plain: use Pillow's own font for what it has, and others only for the rest.
    """

    def __init__(self, points: int, plain: bool = False) -> None:
        self.points = points
        own = ImageFont.load_default(points)
        assert isinstance(own, Font), "Pillow was built without FreeType"
        found = [font for name in SYSTEM_FONTS if (font := _open(name, points)) is not None]
        self.fonts = [own, *found] if plain else [*found[:1], own, *found[1:]]
        self.unknown: set[str] = set()  # characters that no font has

    def readable(self, text: str) -> str:
        """Replace characters that no font has by code points such as U+4E00."""
        runs = groupby(zip(self._fonts_of(text), text, strict=True), key=lambda pair: pair[0] is None)
        return "".join(_code_points(run) if missing else "".join(c for _, c in run) for missing, run in runs)

    def getlength(self, text: str) -> float:
        """Width of a text in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: str, anchor: str) -> None:
        """Draw a readable text; `anchor` is Pillow's, of a text's left side."""
        left, top = place
        for font, run in self._runs(text):
            pen.text((left, top), run, colour, font, anchor=anchor)
            left += font.getlength(run)

    def _runs(self, text: str) -> list[tuple[Font, str]]:
        """Divide a text into runs of one font."""
        fonts = [font or self.fonts[0] for font in self._fonts_of(text)]
        runs = [list(run) for _, run in groupby(zip(fonts, text, strict=True), key=lambda pair: id(pair[0]))]
        return [(run[0][0], "".join(character for _, character in run)) for run in runs]

    def _fonts_of(self, text: str) -> list[Font | None]:
        """The font of each character; accents and spaces have that of the letter before them."""
        fonts: list[Font | None] = []
        for character in text:
            before = fonts[-1] if fonts else None
            mark = unicodedata.category(character).startswith("M") and bool(fonts)
            fonts.append(before if mark or (before and character.isspace()) else self._font_of(character))
        return fonts

    def _font_of(self, character: str) -> Font | None:
        known = next((font for font in self.fonts if _has(font, character)), None)
        if known is not None:
            return known
        path = _system_font(character)
        font = None if path is None else _open(path, self.points)
        if font is not None and _has(font, character):
            self.fonts.append(font)
            return font
        self.unknown.add(character)
        return None


def _code_points(run: Iterable[tuple[Font | None, str]]) -> str:
    return " ".join(f"U+{ord(character):04X}" for _, character in run)


def _open(name: str, points: int) -> Font | None:
    try:
        return ImageFont.truetype(name, points)
    except OSError:  # not on this machine
        return None


@lru_cache(maxsize=1 << 16)
def _has(font: Font, character: str) -> bool:
    """Whether a font has a character: its picture is not that of a missing one."""
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(NO_CHARACTER))


@lru_cache(maxsize=1 << 12)
def _system_font(character: str) -> str | None:
    """Ask fontconfig for the file of a font with a character; None where there is none."""
    if shutil.which("fc-list") is None:
        return None
    words = ["fc-list", "--format=%{file}\n", f":charset={ord(character):x}"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next((path for path in sorted(listed.splitlines()) if Path(path).suffix in (".ttf", ".otf", ".ttc")), None)


def name_unknown(unknown: set[str]) -> str:
    """Say which characters were written as code points, and how to see them."""
    some = ", ".join(f"U+{ord(character):04X}" for character in sorted(unknown)[:5])
    return (
        f"No font of this machine has {len(unknown)} of the prompts' characters ({some}"
        f"{', ...' if len(unknown) > 5 else ''}); pictures show them as code points. Install a font that has them, "
        "such as those of Noto."
    )
