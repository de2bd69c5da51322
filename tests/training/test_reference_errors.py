"""Errors of a static reference, computed before a run: equal to those of one in memory, and of no other pair."""

import itertools
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from safetensors.torch import load_file

from lit_align.backbones import LoRA
from lit_align.callbacks import ReferenceUpdate, StartBanner
from lit_align.callbacks.known_pairs import KnownPairs
from lit_align.cli import main
from lit_align.commands import static_reference
from lit_align.objectives import DiffusionDPO, MaPO
from lit_align.training.reference_source import LiveReference
from lit_align.training.step_draws import draw_by_pair
from lit_align.training.steps import total_epochs
from lit_align.types import EncodedBatch, Moments, PairInfo, PreferenceBatch
from tests.support.paths import PAIRS, PIPELINE, ROOT
from tests.support.runs import Losses, Recorder, equal, fit, keep_all, make_data, make_module, weights
from tests.support.shards import read_dicts, write_dicts

TRAIN = [str(PAIRS / f"train/0000{i}.tar") for i in range(2)]  # those of `make_data`
VAL = str(PAIRS / "held_out/00002.tar")
CROP = {"crop": "random"}
CPU = torch.device("cpu")


def compute(output, *options, epochs=2, command="reference-errors"):
    words = [f"--data.train_shards=[{','.join(TRAIN)}]", f"--data.val_shards={VAL}", "--accelerator=cpu"]
    words += ["--data.flip_probability=0.5", "--data.crop=random", f"--model.backbone.repo={PIPELINE}"]
    words += ["--model.objective=lit_align.objectives.DiffusionDPO", "--model.objective.beta_dpo=100"]
    words += ["--model.caption_dropout=0.3", "--model.validation_draws=2"]
    words += [] if epochs is None else [f"--epochs={epochs}"]
    main([command, f"--config={ROOT / 'configs/quickstart.yaml'}", *words, f"--output={output}", *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Errors of two epochs, computed three pairs at a time and written in files of six pairs."""
    before, static_reference.PAIRS = static_reference.PAIRS, 6
    output = tmp_path_factory.mktemp("reference") / "errors"
    compute(output, "--batch_size=3")
    static_reference.PAIRS = before
    return output


def make(folder=None, **options):
    options = {"objective": DiffusionDPO(100.0), "repo": PIPELINE, "caption_dropout": 0.3, **options}
    return make_module(reference_errors=None if folder is None else str(folder), validation_draws=2, **options)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_run_on_computed_errors_is_the_run_with_a_reference(tmp_path, folder, lora):
    """Into a second epoch: flips, random crops, dropped prompts and validation included, by batches of another size."""
    runs, steps = [], 16  # an epoch has 13 batches
    for known in (None, folder):
        module, seen = make(known, lora=lora), Losses()
        if known is None:
            assert isinstance(module.reference, LiveReference)
            module.reference.draws_by_pair = True
        data = make_data(batch_size=4, **CROP)
        trainer = fit(module, data, tmp_path, steps, callbacks=[seen], limit_val_batches=None, val_check_interval=8)
        runs.append((module, seen, trainer.callback_metrics))
    (live, live_seen, live_metrics), (known, known_seen, known_metrics) = runs
    assert known.backbone.reference is None
    assert live.backbone.reference is not None
    assert known_seen.pairs == live_seen.pairs
    assert known_seen.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert known_seen.losses == pytest.approx(live_seen.losses, rel=1e-4)
    assert max(abs(loss - math.log(2)) for loss in known_seen.losses) > 0.01  # it has learned
    for name in ("val/loss", "val/accuracy", "val/chosen_error"):
        assert known_metrics[name].item() == pytest.approx(live_metrics[name].item(), rel=1e-4)
    for name, weight in weights(known).items():
        torch.testing.assert_close(weight, weights(live)[name], rtol=0, atol=4e-4)  # of 16 steps of 1e-4


def test_a_run_on_computed_errors_resumes_exactly(tmp_path, folder):
    whole, recorder = make(folder), Recorder()
    fit(whole, make_data(batch_size=4, **CROP), tmp_path, 15, callbacks=[recorder])
    fit(make(folder), make_data(batch_size=4, **CROP), tmp_path, 11, callbacks=[keep_all(tmp_path)])
    saved = torch.load(tmp_path / "step=11.ckpt", weights_only=True)["state_dict"]
    assert not any("reference" in name for name in saved)
    resumed, rest = make(folder), Recorder()
    fit(resumed, make_data(batch_size=4, **CROP), tmp_path, 15, ckpt_path=tmp_path / "step=11.ckpt", callbacks=[rest])
    assert rest.pairs == recorder.pairs[11:]
    assert equal(weights(resumed), weights(whole))
    with pytest.raises(ValueError, match=r"model\.reference_errors was .*, is None: refused"):
        fit(make(), make_data(batch_size=4, **CROP), tmp_path, 15, ckpt_path=tmp_path / "step=11.ckpt")


def test_errors_of_a_cache_belong_to_runs_on_it(tmp_path):
    """Latents in float16 give other errors, so that a run on images is refused."""
    caches = {f"{split}_cache": str(tmp_path / split) for split in ("train", "val")}
    center = ("--data.crop=center",)
    for split in ("train", "val"):
        compute(caches[f"{split}_cache"], *center, f"--split={split}", command="encode", epochs=None)
    options = [f"--data.{name}={path}" for name, path in caches.items()]
    compute(tmp_path / "errors", *center, *options, "--batch_size=16", epochs=1)
    module, seen = make(tmp_path / "errors"), Losses()
    data = make_data(batch_size=4, **caches)
    fit(module, data, tmp_path, 2, callbacks=[seen], limit_val_batches=None, val_check_interval=2)
    assert seen.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(ValueError, match=r"pair \d+ of epoch 0 as this run sees it: with .* use of a cache"):
        fit(make(tmp_path / "errors"), make_data(batch_size=4), tmp_path, 1)


def test_a_killed_command_goes_on_with_what_is_missing(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(static_reference, "PAIRS", 6)
    rest = shutil.copytree(folder, tmp_path / "errors")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert len(files) == 9 + 9 + 4  # 52 pairs in each of two epochs, 20 held-out pairs
    lost = files[4], files[20]
    for file in lost:
        (rest / file).unlink()
    kept = {file: (rest / file).stat().st_mtime_ns for file in files if file not in lost}
    compute(rest, "--batch_size=3")
    assert f"--model.reference_errors {rest}" in capsys.readouterr().out
    assert {file: (rest / file).stat().st_mtime_ns for file in kept} == kept
    for file in files:
        assert (rest / file).read_bytes() == (folder / file).read_bytes()
    with pytest.raises(ValueError, match=r"was begun with other values: .*caption_dropout was 0\.3, is 0\.2"):
        compute(rest, "--batch_size=3", "--model.caption_dropout=0.2")


def test_files_hold_the_errors_of_the_untrained_model(folder):
    found = [load_file(path) for path in sorted((folder / "epoch-00001").iterdir())]
    numbers = torch.cat([part["numbers"] for part in found])
    errors = torch.cat([part["errors"] for part in found])
    assert numbers.tolist() == list(range(52))
    assert errors.shape == (52, 1, 2)
    module, data = make(folder, lora=LoRA(rank=2)), make_data(**CROP, batch_size=4)
    data.setup("fit")
    order = data.order(data.train, 0, 0, 1)
    batch = data.dataset(data.train, order)[order.epoch(1)[3]]
    encoded = module.backbone.encode(batch)
    draw, dropped = module.draw_by_pair(encoded, 1)
    assert 0 < dropped.sum() < 4
    with torch.no_grad():
        expected = torch.stack(module.backbone.pair_errors(encoded.drop_prompts(dropped), draw), 1)
    torch.testing.assert_close(errors[batch.pairs.numbers, 0], expected, rtol=1e-5, atol=0)


def test_other_models_runs_and_pairs_are_refused(tmp_path, folder):
    def refused(message, data=None, steps=3, trainer=None, callbacks=(), **options):
        with pytest.raises(ValueError, match=message):
            fit(
                make(folder, **options), make_data(batch_size=4, **(CROP if data is None else data)), tmp_path, steps,
                callbacks=callbacks, **(trainer or {}),
            )  # fmt: skip

    refused(r"does not fit this run: seed was 0, is 1", seed=1)
    refused(r"does not fit this run: caption_dropout was 0\.3, is 0\.0", caption_dropout=0.0)
    refused(r"weights in was \"torch\.float32\", is \"nf4\"", lora=LoRA(rank=2, base="nf4"))
    refused(r"precision was \"32-true\", is \"bf16-mixed\"", trainer={"precision": "bf16-mixed"})
    refused(r"trainer\.precision is bf16-true, in which", trainer={"precision": "bf16-true"})
    refused(r"holds 2 whole epochs, and the run takes 3", steps=27)
    refused(r"holds 2 whole epochs, and the run has no end", steps=-1, trainer={"max_epochs": -1})
    refused(r"pair \d+ of epoch 0 as this run sees it", data=CROP | {"seed": 1})
    refused(r"pair \d+ of epoch 0 as this run sees it", data=CROP | {"flip_probability": 0.0})
    refused(r"ReferenceUpdate has nothing to move: model\.reference_errors", callbacks=[ReferenceUpdate(1)])
    refused(r"model\.reference_errors is .*, but MaPO has no reference", objective=MaPO())
    refused(r"overfit_batches repeats the pairs of epoch 0", trainer={"overfit_batches": 2})
    refused(r"train\.seed was 0, is 1", data=CROP | {"seed": 1}, callbacks=[KnownPairs()])
    refused(r"train\.augmentation was .*, is", data=CROP | {"flip_probability": 0.0}, callbacks=[KnownPairs()])
    other = shutil.copytree(folder, tmp_path / "other")
    next((other / "held-out").iterdir()).unlink()
    with pytest.raises(ValueError, match="does not hold all held-out pairs"):
        fit(make(other), make_data(batch_size=4, **CROP), tmp_path, 2, limit_val_batches=None, val_check_interval=1)
    with pytest.raises(FileNotFoundError, match=r"has no reference_errors\.json"):
        fit(make(tmp_path / "none"), make_data(batch_size=4, **CROP), tmp_path, 2)
    with pytest.raises(ValueError, match="ReferenceUpdate moves the reference"):
        compute(
            tmp_path / "moving",
            "--trainer.callbacks+=lit_align.callbacks.ReferenceUpdate", "--trainer.callbacks.every_n_steps=2",
        )  # fmt: skip
    with pytest.raises(ValueError, match="epochs is 0; it must be at least 1"):
        compute(tmp_path / "zero", epochs=0)


def test_runs_that_end_by_their_steps_are_counted_in_epochs(tmp_path, folder):
    """An accumulation that changes: 13 batches are 7 steps of two, then 5 steps of three."""
    changing = GradientAccumulationScheduler({0: 2, 1: 3})
    module = make(folder)
    trainer = fit(module, make_data(batch_size=4, **CROP), tmp_path, 9, callbacks=[changing], max_epochs=-1)
    assert total_epochs(trainer) == 2
    with pytest.raises(ValueError, match="holds 2 whole epochs, and the run takes 3"):
        fit(make(folder), make_data(batch_size=4, **CROP), tmp_path, 13, callbacks=[changing], max_epochs=-1)


def test_a_broken_pair_ends_the_command_with_its_name(tmp_path):
    """Its workers too, which survive signals: a hang would meet the limit."""
    broken = tmp_path / "00000.tar"
    samples = read_dicts(TRAIN[0])
    samples[7]["jpg_0.png"] = b"no image"
    write_dicts(broken, samples)
    words = ["reference-errors", f"--config={ROOT / 'configs/quickstart.yaml'}", f"--data.train_shards={broken}"]
    words += ["--data.val_shards=null", f"--model.backbone.repo={PIPELINE}", "--accelerator=cpu", "--epochs=1"]
    words += ["--model.objective=lit_align.objectives.DiffusionDPO", "--data.num_workers=2", "--data.batch_size=2"]
    done = subprocess.run(
        [sys.executable, "-m", "lit_align", *words, f"--output={tmp_path / 'errors'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search(rf"{re.escape(str(broken))}, key paintbrush: an image cannot be decoded", done.stderr), (
        done.stderr[-2000:]
    )
    assert "Traceback" not in done.stderr


def test_the_banner_says_where_the_reference_is(tmp_path, folder, caplog):
    fit(make(folder), make_data(batch_size=4, **CROP), tmp_path, 1, callbacks=[StartBanner()])
    assert f"  reference   errors computed before, {folder}; static" in caplog.text.splitlines()


def test_a_pairs_draw_depends_on_seed_epoch_and_pair_alone():
    shape, steps, share = (4, 8, 8), 1000, 0.5

    def draw(seed, epoch, numbers):
        made, dropped = draw_by_pair(seed, epoch, numbers, shape, steps, share, CPU)
        return [*made, dropped]

    several, alone = draw(0, 1, [5, 9, 7]), draw(0, 1, [7])
    assert all(torch.equal(a[2], b[0]) for a, b in zip(several, alone, strict=True))
    drawn = [draw(*place) for place in [(0, 0, range(64)), (1, 0, range(64)), (0, 1, range(64))]]
    for first, second in itertools.combinations(drawn, 2):
        for a, b in zip(first, second, strict=True):
            assert not torch.equal(a, b)
        for a, b in zip(first[:2], second[:2], strict=True):
            if a.is_floating_point():
                assert torch.isin(a, b).float().mean() < 0.01
    noise, times, posterior, dropped = drawn[0]
    assert noise.mean() == pytest.approx(0, abs=0.04)
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert (noise * posterior).mean() == pytest.approx(0, abs=0.04)
    assert len(set(times.tolist())) > 50
    assert 16 < dropped.sum() < 48


def test_checksums_tell_images_their_order_flips_and_prompts_apart():
    torch.manual_seed(0)
    images, ids = torch.randint(256, (2, 2, 3, 16, 16), dtype=torch.uint8), torch.zeros(2, 2, 6).long()
    ones = torch.ones(2)

    def info(flipped=(False, False)):
        return PairInfo([0, 1], ones, torch.tensor(flipped), ones.long(), ones, ones, voted=False)

    batch = PreferenceBatch(images, ids, ["red fox", "fox red"], info())
    latents = torch.randn(2, 2, 2, 4, 8, 8).half()
    cached = EncodedBatch(Moments(latents), ids, {"text": torch.randn(2, 5, 3).half()}, {}, info())
    changed = {
        "order": [batch._replace(images=images.flip(1)), cached._replace(moments=Moments(latents.flip(1)))],
        "flip": [batch._replace(pairs=info((True, False))), cached._replace(pairs=info((True, False)))],
        "prompt": [
            batch._replace(prompts=["fox red", "fox red"]),
            cached._replace(conditioning={"text": cached.conditioning["text"].flip(0)}),
        ],
    }
    for whole, name in itertools.product((batch, cached), changed):
        assert whole.checksums().dtype == torch.int64
        assert not torch.eq(whole.checksums(), whole._replace(time_ids=ids + 1).checksums()).any()
        other = changed[name][whole is cached]
        assert not torch.equal(whole.checksums()[0], other.checksums()[0]), name
    one = images.clone()
    one[0, 1, 0, 0, 0] ^= 1
    differs = batch._replace(images=one).checksums() != batch.checksums()
    assert differs.tolist() == [[False, True], [False, False]]
    shifted = batch._replace(images=images.roll(4, -1))  # the words are the same, at other places
    assert not torch.eq(shifted.checksums(), batch.checksums()).any()
