"""Image store: which image a score belongs to, and what a killed run leaves."""

import pytest
import torch
from PIL import Image

from lit_align.common.files import write_if_absent
from lit_align.evaluation import image_store
from lit_align.evaluation.image_store import ImageStore
from tests.support.images import write_red_image

NAMES = ["anchor", "bacon", "fox", "tulip", "bell", "red apple", "axe", "cactus"]


def test_a_score_is_of_the_bytes_that_were_read(tmp_path):
    """The file may change while a scorer works."""
    store = ImageStore(tmp_path, ["fox"], 0)
    first = write_red_image(store.paths[0])
    (key,) = store.keys([0])

    class Slow:
        def score(self, images, prompts):
            Image.new("RGB", (32, 32), "blue").save(store.paths[0])
            return torch.tensor([float(images[0][0].sum())])

    store.score(Slow(), "slow", [0], 1, lambda count: None)
    assert store.scores("slow") == {key: 255.0 * 32 * 32}
    assert store.keys([0]) != [key]
    store.paths[0].write_bytes(first)
    assert store.keys([0]) == [key]


def test_a_killed_run_keeps_its_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "KEPT_AT_A_TIME", 2)
    store, seen = ImageStore(tmp_path, NAMES, 0), []
    for path in store.paths:
        write_red_image(path)

    class Dies:
        def score(self, images, prompts):
            if len(seen) == 5:
                raise KeyboardInterrupt
            seen.extend(prompts)
            return torch.tensor([float(len(seen))])

    with pytest.raises(KeyboardInterrupt):
        store.score(Dies(), "dies", range(8), 1, lambda count: None)
    assert store.scores("dies") == dict(zip(store.keys(range(4)), [1.0, 2.0, 3.0, 4.0], strict=True))


def test_the_first_of_two_writers_wins(tmp_path, monkeypatch):
    """The first file stays even if the second writer saw none; without hard links the last file stays."""
    path = tmp_path / "new" / "a.png"
    write_if_absent(path, b"first")
    write_if_absent(path, b"second")
    assert path.read_bytes() == b"first"

    def no_links(*_):
        raise PermissionError

    monkeypatch.setattr(type(path), "hardlink_to", no_links)
    write_if_absent(path, b"third")
    assert path.read_bytes() == b"third"
    assert list(path.parent.iterdir()) == [path]
