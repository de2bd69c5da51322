"""The cache of `lit-align test`: each image is drawn and scored once, also by killed and concurrent runs."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from threading import RLock
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from lit_align.commands.evaluate import comparison
from lit_align.evaluation.image_store import ImageStore
from tests.support.exports import darker
from tests.support.images import write_red_image
from tests.support.paths import PIPELINE, ROOT
from tests.support.win_rate_tests import NAMES, counting, read_images, run_test, without_options


def test_the_base_is_drawn_and_scored_once(tmp_path, dark, monkeypatch, capsys):
    """A second model costs half; a repeated command draws nothing, or only damaged images."""
    counts = counting(monkeypatch)
    share = {"names": NAMES[:3], "steps": 1}
    first = run_test(tmp_path, dark, **share)
    other = darker(tmp_path / "other")
    unet = UNet2DConditionModel.from_pretrained(other)
    with torch.no_grad():
        unet.conv_out.bias.add_(0.2)
    unet.save_pretrained(other)
    second = run_test(tmp_path, str(other), output="second", **share)
    assert counts == [3, 3, 0, 3]
    assert first["scores"]["clip"]["base"] == second["scores"]["clip"]["base"]
    assert first["scores"]["clip"]["dark"] != second["scores"]["clip"]["dark"]
    before = read_images(tmp_path / "out")
    folder = next(path for path in (tmp_path / "cache").glob("*/*.png") if path.read_bytes() in before.values()).parent
    scored = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("scores/*/*.json")}
    damaged = sorted(folder.glob("*.png"))
    data = bytearray(damaged[0].read_bytes())
    data[len(data) // 2] ^= 1
    for path, content in zip(damaged, (bytes(data), data[:-20]), strict=False):
        path.unlink()  # the results keep their links
        path.write_bytes(content)
    assert without_options(run_test(tmp_path, dark, **share)) == without_options(first)
    assert sum(counts[4:]) == 2
    assert read_images(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("scores/*/*.json")} == scored
    run_test(tmp_path, dark, scorers="colour", output="third", **share)  # other scorers need no new images
    assert counts[6:] == [0, 0]


def test_the_first_of_two_runs_with_a_cache_wins(tmp_path, dark, monkeypatch):
    """An image that another run drew meanwhile stays and counts for both, because that run may have scored it."""
    draw, written = comparison.draw_images, {}

    def overtaken(model, wanted, *rest):
        wanted[0].path.parent.mkdir(parents=True)
        written[wanted[0].path] = write_red_image(wanted[0].path)
        return draw(model, wanted, *rest)

    monkeypatch.setattr(comparison, "draw_images", overtaken)
    found = run_test(tmp_path, dark, NAMES[:2], scorers="colour", steps=1)
    assert {path: path.read_bytes() for path in written} == written
    assert len(written) == 2
    assert found["scores"]["colour"]["base"][0] == found["scores"]["colour"]["dark"][0]
    assert read_images(tmp_path / "out")["images/base/00000.png"] in written.values()
    assert not list((tmp_path / "cache").rglob(".*"))


def test_an_image_that_is_changed_after_it_was_scored_is_an_error(tmp_path, dark, monkeypatch):
    """The process must not end with exit code 0 and without results."""
    score = ImageStore.score

    def then_changed(store, *rest):
        score(store, *rest)
        write_red_image(store.paths[1])

    monkeypatch.setattr(ImageStore, "score", then_changed)
    with pytest.raises(RuntimeError, match=r"cache: 1 images of base in .* have no score by colour.* again"):
        run_test(tmp_path, dark, NAMES[:2], scorers="colour", steps=1)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    run_test(tmp_path, dark, NAMES[:2], scorers="colour", steps=1)


def run_to_be_killed(*arguments, **options):
    """Run a test with a new tqdm lock: the default one is shared with the parent and would stay locked."""
    tqdm.set_lock(RLock())
    run_test(*arguments, **options)


def test_a_killed_run_resumes(tmp_path, dark):
    """A run that is killed while it draws keeps its images."""
    share = {"names": NAMES[:4], "scorers": "colour", "steps": 2}
    process = multiprocessing.get_context("fork").Process(target=run_to_be_killed, args=(tmp_path, dark), kwargs=share)
    process.start()
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("cache/*/*.png"))) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/*.png")}
    assert len(drawn) >= 2
    assert not (tmp_path / "out").exists()
    found = run_test(tmp_path, dark, **share)
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    assert without_options(found) == without_options(
        run_test(tmp_path, dark, output="new", cache=tmp_path / "b", **share)
    )


def test_a_pipeline_with_another_number_draws_other_images(tmp_path, dark, monkeypatch):
    """Equal weights draw other images if the VAE's scale or the conditioning of the empty prompt differs."""
    counts = counting(monkeypatch)
    share = {"names": NAMES[:2], "scorers": "colour", "steps": 1}
    changes = {"vae/config.json": ("scaling_factor", 0.5), "model_index.json": ("force_zeros_for_empty_prompt", False)}
    changes["unet/config.json"] = ("flip_sin_to_cos", False)
    models = {}
    for number, (file, (key, value)) in enumerate(changes.items()):
        models[f"m{number}"] = str(shutil.copytree(PIPELINE, tmp_path / f"m{number}"))
        config = json.loads((tmp_path / f"m{number}" / file).read_text())
        assert config.get(key, True) != value
        (tmp_path / f"m{number}" / file).write_text(json.dumps(config | {key: value}))
    found = run_test(tmp_path, dark, models=models, **share)
    assert counts == [2, 2, 2, 2]
    assert len({about["fingerprint"] for about in found["models"].values()}) == 4
    before = read_images(tmp_path / "out")
    assert len(set(before.values())) == len(before)
    for name, version in (("SAMPLING_VERSION", 2), ("transformers", SimpleNamespace(__version__="0"))):
        monkeypatch.setattr(comparison, name, version)
        run_test(tmp_path, dark, models={"m0": models["m0"]}, output=name, **share)
    assert counts[4:] == [2, 2, 2, 2]
