"""Training on a cache: the same pairs and, within float16's rounding, the same errors, without VAE or text encoders."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.cli import main
from lit_align.data.cache.reader import Cache
from lit_align.data.shards.index import index_shard
from tests.support.paths import PAIRS, PIPELINE, ROOT
from tests.support.runs import Losses, Recorder, equal, fit, keep_all, make_data, make_module, weights
from tests.support.shards import read_dicts, write_dicts

CONFIG = str(ROOT / "configs/quickstart.yaml")
TRAIN = [str(PAIRS / f"train/0000{i}.tar") for i in range(2)]  # those of `make_data`
VAL = str(PAIRS / "held_out/00002.tar")


def encode(output, *options, shards=TRAIN):
    words = [f"--data.train_shards=[{','.join(shards)}]", f"--data.val_shards={VAL}", "--accelerator=cpu"]
    words += ["--data.flip_probability=0.5", f"--model.backbone.repo={PIPELINE}"]
    main(["encode", f"--config={CONFIG}", *words, f"--output={output}", *options])


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    encode(folder / "train")
    encode(folder / "val", "--split=val")
    return {"train_cache": str(folder / "train"), "val_cache": str(folder / "val")}


@pytest.fixture
def no_encoders(monkeypatch):
    """Whoever loads a VAE or a text encoder fails."""

    def refuse(*_, **__):
        raise AssertionError("an encoder is loaded")

    for kind in (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(kind, "from_pretrained", refuse)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_run_on_a_cache_is_the_run_on_images(tmp_path, caches, lora, request):
    """Flips, caption dropout, sampling of the posterior and validation included."""
    data = {"batch_size": 4, "num_workers": 2}
    runs = []
    for options in ({}, caches):
        module, seen = make_module(lora=lora, caption_dropout=0.3), Losses()
        if options:
            request.getfixturevalue("no_encoders")
        trainer = fit(
            module,
            make_data(**data, **options),
            tmp_path,
            6,
            callbacks=[seen],
            limit_val_batches=None,
            val_check_interval=3,
        )
        runs.append((seen, trainer.callback_metrics))
    (images, shown), (cached, shown_cached) = runs
    assert cached.pairs == images.pairs
    assert cached.losses == pytest.approx(images.losses, rel=2e-3)
    assert cached.losses != images.losses  # float16 rounds
    for name in ("val/chosen_error", "val/rejected_error"):
        assert shown_cached[name].item() == pytest.approx(shown[name].item(), rel=2e-3)


def test_held_out_pairs_are_cached_as_they_are_and_training_pairs_mirrored_too(caches):
    """Validation never flips, so that mirrored images would only cost time and space."""
    train, val = (Cache.open(caches[f"{split}_cache"]) for split in ("train", "val"))
    assert (train.fingerprint["flips"], val.fingerprint["flips"]) == ("both", "none")
    with pytest.raises(ValueError, match="has no mirrored images"):
        val.latents(VAL, 0, flipped=True)
    plain, mirrored = (train.latents(TRAIN[0], 0, flipped=flip) for flip in (False, True))
    assert plain.shape == mirrored.shape == val.latents(VAL, 0, flipped=False).shape
    assert not torch.equal(plain, mirrored)


@pytest.mark.usefixtures("no_encoders")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_cache_resumes_exactly(tmp_path, caches, workers):
    data = {"batch_size": 4, "num_workers": workers, **caches}
    whole, recorder = make_module(caption_dropout=0.3), Recorder()
    fit(whole, make_data(**data), tmp_path, 5, callbacks=[recorder])
    fit(make_module(caption_dropout=0.3), make_data(**data), tmp_path, 3, callbacks=[keep_all(tmp_path)])
    resumed, rest = make_module(caption_dropout=0.3), Recorder()
    fit(resumed, make_data(**data), tmp_path, 5, ckpt_path=tmp_path / "step=3.ckpt", callbacks=[rest])
    assert rest.pairs == recorder.pairs[3:]
    assert equal(weights(resumed), weights(whole))


def test_what_does_not_fit_the_cache_is_named(tmp_path, caches):
    def refused(message, backbone=None, **options):
        module = make_module()
        if backbone is not None:
            module.backbone = backbone
        with pytest.raises(ValueError, match=message):
            fit(module, make_data(**{**caches, **options}), tmp_path, 1)

    refused(r"does not fit this run: resolution was 32, is 64", resolution=64)
    refused(r"does not fit this run: .*aspect_buckets was false, is true", aspect_buckets=True)
    refused(r"vae_precision was .*fp32.*, is .*bf16", StableDiffusionXL(str(PIPELINE), vae_precision="bf16"))
    other = shutil.copytree(PIPELINE, tmp_path / "other")
    vae = AutoencoderKL.from_pretrained(other / "vae")
    torch.nn.init.zeros_(vae.quant_conv.bias)
    vae.save_pretrained(other / "vae")
    refused(r"encoders\.vae was \"\w+\", is \"\w+\"", StableDiffusionXL(str(other)))
    refused(r"data\.train_cache .* lacks 2 of 2 shards", train_cache=caches["val_cache"])
    with pytest.raises(FileNotFoundError, match="is not a cache"):
        fit(make_module(), make_data(**caches | {"train_cache": str(tmp_path)}), tmp_path, 1)
    with pytest.raises(ValueError, match=r"data\.crop is random; a cache holds the centre"):
        make_data(**caches, crop="random")


def test_a_changed_pair_is_not_taken_from_the_cache(tmp_path, caches):
    """The index says what the shard holds now."""
    shard = str(shutil.copy(TRAIN[0], tmp_path))
    encode(tmp_path / "cache", shards=[shard])
    samples = read_dicts(shard)
    samples[3]["jpg_0.png"] = samples[4]["jpg_0.png"]
    write_dicts(shard, samples)
    index_shard(shard)
    data = make_data(train_cache=str(tmp_path / "cache"))
    data.train.patterns = [shard]
    with pytest.raises(ValueError, match=r"sample 3: the cache .* is stale"):
        fit(make_module(), data, tmp_path, 13)


@pytest.mark.usefixtures("no_encoders")
def test_indexed_shards_need_not_be_there(tmp_path, caches):
    """A cache and the index of its shards are enough to train on."""
    shards = [str(shutil.copy(shard, tmp_path)) for shard in TRAIN]
    for shard in shards:
        index_shard(shard)
    data = make_data(**caches, on_error="skip")
    data.train.patterns = shards
    for shard in shards:
        (tmp_path / shard).unlink()
    recorder, images = Recorder(), Recorder()
    fit(make_module(), data, tmp_path, 2, callbacks=[recorder])
    fit(make_module(), make_data(**caches), tmp_path, 2, callbacks=[images])
    assert recorder.pairs == images.pairs
