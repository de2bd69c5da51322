"""Contact sheet of pairs: the chosen image left, the rejected one right, the prompt below."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from lit_align.common.files import write_png
from lit_align.data.images import decode
from lit_align.data.shards.layout import RawPair

BOX = 256  # side of the square into which an image is fitted, pixels
GAP = 8  # between the images of a pair
PADDING = 12  # around a pair
COLUMNS = 4  # pairs per row
TITLE = 44  # height of the title line
ABOVE, BELOW = 24, 72  # heights of the text above and below the images
FONTS = ("DejaVuSans.ttf", "Arial.ttf")  # Pillow's default font only has ASCII
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


def draw_sheet(tiles: Sequence[Tile], title: str, path: Path) -> None:
    """Draw the pairs and write a PNG atomically."""
    sheet = Image.new("RGB", sheet_size(len(tiles)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((PADDING, TITLE // 2), title, INK, _font(18), anchor="lm")
    for number, tile in enumerate(tiles):
        _draw_tile(sheet, draw, tile, *image_position(number))
    write_png(path, sheet)


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int) -> None:
    width, height = _card_size()
    card = (left - PADDING, top - ABOVE, left - PADDING + width - 1, top - ABOVE + height - 1)
    draw.rounded_rectangle(card, radius=6, fill=CARD)
    words = (("tie", PALE), ("tie", PALE)) if tile.tie else (("chosen", GOOD), ("rejected", BAD))
    for at, image, (word, colour) in zip((left, left + BOX + GAP), (tile.left, tile.right), words, strict=True):
        draw.text((at, top - ABOVE // 2), word, colour, _font(14), anchor="lm")
        draw.rectangle((at, top, at + BOX - 1, top + BOX - 1), fill=EMPTY)
        sheet.paste(image, (at + (BOX - image.width) // 2, top + (BOX - image.height) // 2))
    prompt = cut(tile.prompt or "(empty prompt)", _font(15), width - 2 * PADDING, lines=2)
    for number, line in enumerate(prompt):
        draw.text((left, top + BOX + 14 + 20 * number), line, INK, _font(15), anchor="lm")
    [note] = cut(tile.note, _font(12), width - 2 * PADDING, lines=1)
    draw.text((left, top + BOX + BELOW - 14), note, PALE, _font(12), anchor="lm")


def cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
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


def _longest(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """Count how many characters of the text fit into the width, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, points)
        except OSError:  # not on this machine
            continue
    return ImageFont.load_default(points)
