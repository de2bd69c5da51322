"""Contact sheet of pairs: the chosen image left, the rejected one right, the prompt below."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from lit_align.common.files import write_png
from lit_align.common.lettering import Lettering, name_unknown
from lit_align.data.decoder import decode
from lit_align.data.shards.layout import RawPair

BOX = 256  # side of the square into which an image is fitted, pixels
GAP = 8  # between the images of a pair
PADDING = 12  # around a pair
COLUMNS = 4  # pairs per row
TITLE = 44  # height of the title line
ABOVE, BELOW = 24, 72  # heights of the text above and below the images
PAPER, CARD, EMPTY = "#d9dce1", "#f4f5f7", "#e4e6ea"
INK, PALE, GOOD, BAD = "#1c1f24", "#6b7280", "#15803d", "#b91c1c"


class Tile(NamedTuple):
    """A pair, ready to be drawn: its images are already resized."""

    left: Image.Image  # the chosen image; image 0 of a tie
    right: Image.Image
    tie: bool
    prompt: str
    note: str


def make_tile(pair: RawPair) -> Tile:
    """Decode a pair and resize its images for the sheet."""
    images = [decode(pair.image_0), decode(pair.image_1)]
    shown = images if pair.label_0 >= 0.5 else images[::-1]
    sizes = dict.fromkeys(f"{image.width}x{image.height}" for image in shown)
    shard = pair.shard.rsplit("/", 1)[-1].removesuffix(".tar")
    note = f"{shard}/{pair.key}, label {pair.label_0:g} : {1 - pair.label_0:g}, {' and '.join(sizes)}"
    left, right = (fit(image) for image in shown)
    return Tile(left, right, pair.label_0 == 0.5, pair.prompt, note)


def fit(image: Image.Image) -> Image.Image:
    """Resize to fit the box: small images by a whole factor, without interpolation; keeps the aspect ratio."""
    longer = max(image.size)
    if longer <= BOX:
        times = BOX // longer
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * BOX / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def image_position(number: int) -> tuple[int, int]:
    """Left and top, in pixels, of the left image of the pair with this number."""
    row, column = divmod(number, COLUMNS)
    width, height = _card_size()
    return PADDING + column * (width + PADDING) + PADDING, TITLE + row * (height + PADDING) + ABOVE


def sheet_size(pairs: int) -> tuple[int, int]:
    """Width and height of the sheet in pixels."""
    columns, rows = min(pairs, COLUMNS), -(-pairs // COLUMNS)
    width, height = _card_size()
    return PADDING + columns * (width + PADDING), TITLE + rows * (height + PADDING)


def _card_size() -> tuple[int, int]:
    return 2 * BOX + GAP + 2 * PADDING, ABOVE + BOX + BELOW


def draw_sheet(tiles: Sequence[Tile], title: str, path: Path) -> str:
    """Draw the pairs, write a PNG atomically, and say which characters no font has; empty if all are drawn."""
    sheet = Image.new("RGB", sheet_size(len(tiles)), PAPER)
    pen = Pen(sheet)
    pen.write((PADDING, TITLE // 2), title, INK, 18)
    for number, tile in enumerate(tiles):
        _draw_tile(pen, tile, *image_position(number))
    write_png(path, sheet)
    unknown = {character for letters in pen.letters.values() for character in letters.unknown}
    return name_unknown(unknown) if unknown else ""


class Pen:
    """Writes on a sheet.

    Args:
        sheet: to be drawn on.
    """

    def __init__(self, sheet: Image.Image) -> None:
        self.sheet, self.draw = sheet, ImageDraw.Draw(sheet)
        self.letters = {points: Lettering(points) for points in (12, 14, 15, 18)}

    def write(self, place: tuple[int, int], text: str, colour: str, points: int) -> None:
        """Write a text in one line, its left middle at `place`."""
        self.letters[points].draw(self.draw, place, text, colour, anchor="lm")


def _draw_tile(pen: Pen, tile: Tile, left: int, top: int) -> None:
    width, height = _card_size()
    card = (left - PADDING, top - ABOVE, left - PADDING + width - 1, top - ABOVE + height - 1)
    pen.draw.rounded_rectangle(card, radius=6, fill=CARD)
    words = (("tie", PALE), ("tie", PALE)) if tile.tie else (("chosen", GOOD), ("rejected", BAD))
    for at, image, (word, colour) in zip((left, left + BOX + GAP), (tile.left, tile.right), words, strict=True):
        pen.write((at, top - ABOVE // 2), word, colour, 14)
        pen.draw.rectangle((at, top, at + BOX - 1, top + BOX - 1), fill=EMPTY)
        pen.sheet.paste(image, (at + (BOX - image.width) // 2, top + (BOX - image.height) // 2))
    prompt = pen.letters[15].readable(tile.prompt[:1000] or "(empty prompt)")
    lines = cut(prompt, pen.letters[15], width - 2 * PADDING, lines=2)
    for number, line in enumerate(lines):
        pen.write((left, top + BOX + 14 + 20 * number), line, INK, 15)
    [note] = cut(pen.letters[12].readable(tile.note), pen.letters[12], width - 2 * PADDING, lines=1)
    pen.write((left, top + BOX + BELOW - 14), note, PALE, 12)


def cut(text: str, font: Lettering, width: int, lines: int) -> list[str]:
    """Break a text into at most `lines` lines of `width` pixels; `…` replaces what does not fit."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())
    broken: list[str] = []
    while words:
        fits = _longest(words, font, width)
        if fits == len(words):
            return [*broken, words]
        if len(broken) == lines - 1:
            while fits > 1 and font.getlength(words[:fits] + "…") > width:
                fits -= 1
            return [*broken, words[:fits].rstrip() + "…"]
        space = words.rfind(" ", 1, fits + 1)
        fits = space if space > 0 else fits
        broken.append(words[:fits])
        words = words[fits:].lstrip()
    return broken


def _longest(text: str, font: Lettering, width: int) -> int:
    """Count how many characters of the text fit into the width, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
