"""Files that are either complete or absent."""

import os

import pytest
import torch
from PIL import Image

from lit_align.common.files import atomic_path, write_png, write_text
from lit_align.common.pixels import encode_image, from_image, to_image


@pytest.mark.parametrize("one_writer", [False, True])
def test_a_failed_write_leaves_nothing(tmp_path, one_writer):
    path = tmp_path / "new/a.txt"

    def fail():
        with atomic_path(path, one_writer) as part:
            part.write_text("half of it")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(path.parent.iterdir()) == []
    with atomic_path(path, one_writer) as part:
        assert not path.exists()
        part.write_text("all of it")
    assert [file.read_text() for file in path.parent.iterdir()] == ["all of it"]
    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "all of it"


def test_one_writer_overwrites_what_a_killed_process_left(tmp_path):
    names = []
    for one_writer in (True, True, False, False):
        with atomic_path(tmp_path / "a", one_writer) as part:
            names.append(part.name)
            part.touch()
    assert names[:2] == [".a.part", ".a.part"]
    assert len(set(names)) == 3  # writers at the same time do not share a name


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a machine that loses its power may keep the name, and not what is in the file."""
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "x").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_text(tmp_path / "x", "text")
    ((path, named),) = synced
    assert path.startswith(f"{tmp_path}/.x.")
    assert not named


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "a", "füchse\n")
    assert (tmp_path / "a").read_bytes() == b"f\xc3\xbcchse\n"


def test_pixels_survive_a_png(tmp_path):
    pixels = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    write_png(tmp_path / "a.png", to_image(pixels))
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (7, 5)
        assert torch.equal(from_image(image), pixels)
    (tmp_path / "b.webp").write_bytes(encode_image(pixels, "webp", lossless=True))
    with Image.open(tmp_path / "b.webp") as image:
        assert torch.equal(from_image(image), pixels)
