"""Text on images: no character is a box."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lit_align.callbacks.sample_grid import draw_grid
from lit_align.commands.inspect.contact_sheet import Tile, draw_sheet
from lit_align.common import lettering
from lit_align.common.lettering import Lettering, name_unknown
from lit_align.common.pixels import from_image

SECRET = "\ue123\ue124"  # of private use: no font has them
BOX = ImageFont.load_default(15).getmask("\U0010ffff")


def drawn(letters, text, anchor="lm"):
    image = Image.new("L", (400, 40), "white")
    letters.draw(ImageDraw.Draw(image), (5, 20), text, "black", anchor)
    return np.asarray(image)


@pytest.mark.parametrize("plain", [False, True])
def test_what_no_font_has_is_its_code_points(plain):
    letters = Lettering(15, plain)
    assert letters.readable(f"a {SECRET} cat") == "a U+E123 U+E124 cat"
    assert letters.unknown == set(SECRET)
    assert letters.readable("a cat, déjà vu") == "a cat, déjà vu"
    text = letters.readable(SECRET[0] + "\u0301" + "b")  # an accent goes with its letter
    assert text == "U+E123 U+0301b"
    assert name_unknown(letters.unknown).startswith("No font of this machine has 2 of the prompts' characters (U+E123,")


def test_a_plain_text_is_drawn_as_pillow_draws_it():
    image = Image.new("L", (400, 40), "white")
    ImageDraw.Draw(image).text((5, 20), "base, step 3", "black", anchor="la")
    assert (drawn(Lettering(10, plain=True), "base, step 3", "la") == np.asarray(image)).all()
    assert Lettering(10, plain=True).getlength("base") == ImageDraw.Draw(image).textlength("base")


def test_fontconfig_is_asked_for_what_the_first_fonts_lack(monkeypatch):
    """Pillow's own font has no Cyrillic."""
    cyrillic = ImageFont.truetype("DejaVuSans.ttf", 15)
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ())
    monkeypatch.setattr(lettering, "_system_font", lambda character: cyrillic.path if character > "\u0400" else None)
    letters = Lettering(15)
    assert letters.readable("cat кошка") == "cat кошка"
    assert [font.getname()[0] for font in letters.fonts] == ["Aileron", "DejaVu Sans"]
    wide = letters.fonts[0].getlength("cat ") + cyrillic.getlength("кошка")
    assert letters.getlength("cat кошка") == pytest.approx(wide)
    monkeypatch.setattr(lettering, "_system_font", lambda character: None)
    assert Lettering(15).readable("ко") == "U+043A U+043E"


@pytest.mark.skipif(shutil.which("fc-list") is None, reason="no fontconfig here")
def test_fontconfig_itself():
    path = lettering._system_font("\u043a")
    assert path is None or Path(path).is_file()
    assert lettering._system_font(SECRET[0]) is None


def test_contact_sheet_and_sample_grid_say_what_they_could_not_draw(tmp_path, caplog, capsys):
    """The pictures are those of the code points."""
    image = Image.new("RGB", (8, 8))
    paths = {prompt: tmp_path / f"{number}.png" for number, prompt in enumerate([SECRET, "U+E123 U+E124"])}
    said = [draw_sheet([Tile(image, image, False, prompt, "note")], "title", path) for prompt, path in paths.items()]
    assert [bool(words) for words in said] == [True, False]
    assert len({path.read_bytes() for path in paths.values()}) == 1
    pixels = from_image(Image.new("RGB", (128, 64)))
    grids = [draw_grid([prompt], {"base": [pixels]}) for prompt in paths]
    assert grids[0] == grids[1]
    assert "pictures show them as code points" in caplog.text + "".join(capsys.readouterr())
