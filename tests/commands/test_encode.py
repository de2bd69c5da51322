"""Caches: what is in them is what training would have computed, and training needs no encoders then."""

import io
import json
import pickle
import random
import re
import shutil
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_align.backbones import StableDiffusion, StableDiffusionXL
from lit_align.backbones.loading.model_files import digest_weights
from lit_align.backbones.sampling import generate
from lit_align.callbacks import SampleGrid
from lit_align.cli import main
from lit_align.commands.encode import command as encode_command
from lit_align.commands.encode.encoding import prepare_images
from lit_align.common.hub import ModelLocation
from lit_align.data.cache.format import latents_bytes, names_of, rules
from lit_align.data.cache.pairs import CachedPairReader
from lit_align.data.cache.reader import Cache
from lit_align.data.decoder import decode
from lit_align.data.labels.ordering import OrderedPairs
from lit_align.data.shards.index import content_digest, index_shard, write_index
from lit_align.data.shards.layout import SampleError, parse_sample, read_samples
from lit_align.data.shards.writer import NewPair, write_shard
from lit_align.objectives import MaPO
from lit_align.training.module import AlignmentModule
from lit_align.types import Moments, PairInfo, PreferenceBatch
from tests.support.paths import PAIRS, PIPELINE, ROOT
from tests.support.pipelines import small_sdxl
from tests.support.processes import fork, fork_ranks

SHARDS, PAIRS_EACH = 3, 5


def bundled(count):
    pairs = map(parse_sample, read_samples(str(PAIRS / "train/00000.tar")))
    return [
        NewPair(p.key, p.image_0, p.image_1, p.label_0, p.prompt) for p, _ in zip(pairs, range(count), strict=False)
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three small shards of bundled pairs; the last prompt comes twice and one is empty."""
    folder = tmp_path_factory.mktemp("shards")
    pairs = bundled(SHARDS * PAIRS_EACH)
    pairs[-1] = pairs[-1]._replace(prompt=pairs[0].prompt)
    pairs[6] = pairs[6]._replace(prompt="")
    for number in range(SHARDS):
        write_shard(folder / f"{number:05d}.tar", pairs[number * PAIRS_EACH : (number + 1) * PAIRS_EACH])
    return folder


def words(shards, output, *more, config=ROOT / "configs/quickstart.yaml"):
    return [
        "encode",
        f"--config={config}",
        f"--data.train_shards={shards}/*.tar",
        f"--output={output}",
        "--accelerator=cpu",
        "--devices=1",
        "--flips=both",
        "--batch_size=4",
        *more,
    ]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def _in_project():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache") / "sdxl"
    main(words(shards, folder))
    return folder


@pytest.fixture(scope="module")
def sd15_folder(shards, sd15, tmp_path_factory):
    """From another config, with its own kind of backbone, and one sample of the posterior."""
    torch.set_num_threads(1)
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    config["model"]["backbone"] = {"class_path": "StableDiffusion", "init_args": {"repo": str(sd15)}}
    config |= {"ckpt_path": "last", "weights_only": True}  # as the config.yaml of a run
    (path := tmp_path_factory.mktemp("config") / "sd15.yaml").write_text(yaml.safe_dump(config))
    folder = tmp_path_factory.mktemp("cache") / "sd15"
    main(words(shards, folder, "--posterior=sample", config=path))
    return folder


@pytest.fixture(scope="module")
def backbone():
    return StableDiffusionXL(str(PIPELINE))


def batches(shards, cache, flipped):
    """The pairs of a shard as training reads them: pixels, and what the cache has of them."""
    shard = str(shards / "00001.tar")
    pairs = [parse_sample(sample) for sample in read_samples(shard)]
    prepared = [prepare_images(pair, (32, 32), [flipped]) for pair in pairs]
    images = torch.stack([images[0] for images, _ in prepared])  # (batch, 2, 3, height, width)
    time_ids = torch.stack([time_ids for _, time_ids in prepared])
    count, prompts = len(pairs), [pair.prompt for pair in pairs]
    info = PairInfo(
        list(range(count)), torch.ones(count), torch.full((count,), flipped), torch.ones(count, dtype=torch.int64),
        torch.zeros(count), torch.zeros(count), voted=False,
    )  # fmt: skip
    reader = CachedPairReader(cache, float(flipped))
    stored = torch.stack([cache.latents(shard, row, flipped) for row in range(count)])
    sizes = torch.stack([cache.time_ids(shard, row) for row in range(count)])
    cached_prompts = [cache.prompt(shard, row) for row in range(count)]
    assert cached_prompts == prompts
    cached = reader.batch(OrderedPairs(stored, sizes, info), cached_prompts)
    return PreferenceBatch(images, time_ids, prompts, info), cached


@pytest.mark.parametrize("flipped", [False, True])
def test_cached_values_are_those_of_the_encoders_in_half_precision(shards, folder, backbone, flipped):
    cache = Cache.open(folder)
    pixels, cached = batches(shards, cache, flipped)
    assert "" in pixels.prompts
    assert torch.equal(cached.time_ids, pixels.time_ids)
    stored = cached.moments.values
    assert stored.dtype == torch.float16
    assert stored.shape == (PAIRS_EACH, 2, 2, 4, 16, 16)
    noise = torch.randn(PAIRS_EACH, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    encoded = backbone.encode(pixels)
    assert encoded.latents_shape == cached.latents_shape == (4, 16, 16)
    for side, images in enumerate((pixels.chosen, pixels.rejected)):
        torch.testing.assert_close(stored[:, side].float(), backbone.posterior(images), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(encoded.moments.values[:, side], backbone.posterior(images), rtol=1e-4, atol=1e-5)
        for drawn in (None, noise):
            latents = backbone.latent_space.sample(stored[:, side], drawn)
            torch.testing.assert_close(latents, backbone.encode_images(images, drawn), rtol=1e-3, atol=2e-3)
    assert cached.conditioning.keys() == cached.empty.keys() == encoded.conditioning.keys() == {"hidden", "pooled"}
    for key, value in backbone.encode_prompts([*pixels.prompts, ""]).items():
        torch.testing.assert_close(encoded.conditioning[key], value[:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoded.empty[key], value[-1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cached.conditioning[key].float(), value[:-1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(cached.empty[key].float(), value[-1:], rtol=1e-3, atol=1e-3)
    mirrored = torch.stack([cache.latents(str(shards / "00001.tar"), row, not flipped) for row in range(PAIRS_EACH)])
    assert not torch.equal(mirrored, stored)


def test_one_sample_of_the_posterior_and_another_backbone(shards, sd15_folder, sd15):
    backbone, cache = StableDiffusion(str(sd15)), Cache.open(sd15_folder)
    pixels, cached = batches(shards, cache, True)
    stored = cached.moments.values
    assert stored.shape == (PAIRS_EACH, 2, 1, 4, 16, 16)
    contents = [cache.content(str(shards / "00001.tar"), row) for row in range(PAIRS_EACH)]
    noise = [  # of both images; the first is for the unmirrored ones
        torch.randn(2, 1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(int(content, 16) >> 1))[1, 0, 0]
        for content in contents
    ]
    for side, images in enumerate((pixels.chosen, pixels.rejected)):
        mean, deviation = backbone.posterior(images).unbind(1)
        sample = mean + deviation * torch.stack(noise)
        torch.testing.assert_close(stored[:, side, 0].float(), sample, rtol=1e-3, atol=1e-5)
        nothing, space = torch.full_like(mean, torch.nan), backbone.latent_space
        assert torch.equal(space.sample(stored[:, side], nothing), space.sample(stored[:, side], None))
    conditioning = backbone.encode_prompts(pixels.prompts)
    torch.testing.assert_close(cached.conditioning["hidden"].float(), conditioning["hidden"], rtol=1e-3, atol=2e-3)
    dropped = cached.drop_prompts(torch.arange(PAIRS_EACH) == 0).conditioning["hidden"]
    assert torch.equal(dropped[0], cached.empty["hidden"][0])
    assert torch.equal(dropped[1:], cached.conditioning["hidden"][1:])


@pytest.mark.parametrize("dropped", [False, True])
def test_errors_on_cached_pairs_are_those_on_pixels(shards, folder, backbone, dropped):
    module = AlignmentModule(backbone, MaPO())
    pixels, cached = batches(shards, Cache.open(folder), False)
    encoded = backbone.encode(pixels)
    draw = module.validation_draw(encoded, 0)
    assert torch.equal(draw.noise, module.validation_draw(cached, 0).noise)
    draw = draw._replace(posterior_noise=torch.randn_like(draw.noise))
    without = torch.full((PAIRS_EACH,), dropped)
    with torch.no_grad():
        theirs = backbone.pair_errors(encoded.drop_prompts(without), draw)
        ours = backbone.pair_errors(backbone.encode(cached).drop_prompts(without), draw)
    torch.testing.assert_close(ours.chosen, theirs.chosen, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(ours.rejected, theirs.rejected, rtol=2e-3, atol=1e-4)


def test_a_cache_knows_its_pairs_and_goes_to_other_processes(shards, folder):
    cache = Cache.open(folder)
    shard = str(shards / "00002.tar")
    first = cache.latents(shard, 0, False)
    for row, sample in enumerate(read_samples(shard)):
        assert cache.content(shard, row) == content_digest(parse_sample(sample))
        assert cache.prompt(shard, row) == parse_sample(sample).prompt
    sent = pickle.loads(pickle.dumps(cache))
    assert torch.equal(sent.latents("elsewhere/00002.tar", 0, False), first)
    assert cache.has("https://example.org/a/00002.tar")
    assert not cache.has("00007.tar")
    with pytest.raises(SampleError, match=r"shard 00007.tar is not in the cache"):
        cache.latents("00007.tar", 0, False)
    with pytest.raises(SampleError, match="lacks the prompt 'never seen'"):
        cache.conditioning(["never seen"])
    fingerprint = json.loads((folder / "fingerprint.json").read_text())
    assert fingerprint["prompts"]["count"] == SHARDS * PAIRS_EACH - 1  # one comes twice
    assert fingerprint["shards"][0] == {"name": "00000", "samples": PAIRS_EACH, "pairs": PAIRS_EACH}


def test_shards_of_one_name_keep_their_folders(tmp_path):
    assert names_of(["a/x/00000.tar", "a/x/00001.tar"]) == ["00000", "00001"]
    assert names_of(["a/x/00000.tar", "b/x/00000.tar", "b/x/00001.tar"]) == ["a/x/00000", "b/x/00000", "b/x/00001"]
    assert names_of(["s3://one/00000.tar", str(tmp_path / "00001.tar")]) == ["00000", "00001"]
    with pytest.raises(ValueError, match=r"a/00000.tar is named twice"):
        names_of(["a/00000.tar", "a/00000.tar"])
    pairs = bundled(4)
    for number, name in enumerate(("one", "two")):
        write_shard(tmp_path / name / "train/00000.tar", pairs[2 * number : 2 * number + 2])
    main(words(tmp_path / "*/train", tmp_path / "cache"))
    cache = Cache.open(tmp_path / "cache")
    assert (tmp_path / "cache/two/train/00000.latents.safetensors").is_file()
    assert [cache.prompt(f"{tmp_path}/{name}/train/00000.tar", 1) for name in ("one", "two")] == [
        pairs[1].prompt,
        pairs[3].prompt,
    ]


def test_a_killed_run_resumes(shards, folder, tmp_path):
    killed, first = fork(lambda: main(words(shards, tmp_path))), tmp_path / "00000.latents.safetensors"
    while not first.exists() and killed.is_alive():
        time.sleep(0.002)
    killed.kill()
    killed.join()
    assert first.exists()
    assert set(files(tmp_path)) < set(files(folder)) | {".00001.latents.safetensors.part", ".encode.lock"}
    with pytest.raises(ValueError, match=r"of 5 files are missing, first 0000\d.latents.safetensors. Run lit-align"):
        Cache.open(tmp_path)
    written = first.stat().st_mtime_ns
    (tmp_path / ".00002.latents.safetensors.part").write_bytes(b"half of it")
    main(words(shards, tmp_path))
    assert files(tmp_path) == files(folder)
    assert first.stat().st_mtime_ns == written


def test_processes_share_the_work(shards, folder, tmp_path, capfd):
    fork_ranks(lambda: main(words(shards, tmp_path)))
    assert files(tmp_path) == files(folder)
    said = capfd.readouterr().out
    assert "process 1 of 2, cpu: encoded 2 shards" in said
    assert "process 2 of 2, cpu: encoded 1 shards" in said


def test_the_size_that_is_announced_is_the_size(shards, folder, tmp_path, capsys):
    """From an index as from the shards; files are as readable as any other."""
    entries = [index_shard(str(shard), str(tmp_path)) for shard in sorted(shards.glob("*.tar"))]
    write_index(str(tmp_path), entries)
    output = tmp_path / "cache"
    main([*words(shards, output), f"--data.train_shards={tmp_path}/index.json"])
    assert files(output) == files(folder)
    said = capsys.readouterr().out
    assert "15 pairs in 3 shards as 60 images, 14 prompts" in said
    assert re.search(r"about \d+ s, by the first batch", said)
    announced = float(re.search(r"cache: ([\d.]+) kB", said).group(1))
    assert announced == pytest.approx(sum(map(len, files(output).values())) / 1e3, abs=6)
    rows = dict.fromkeys(range(PAIRS_EACH), (2, 2, 2, 4, 16, 16))
    actual = (output / "00000.latents.safetensors").stat().st_size
    assert latents_bytes(PAIRS_EACH, rows) == pytest.approx(actual, rel=1e-3)
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1


def test_another_fingerprint_is_refused_and_named(shards, folder, backbone, tmp_path):
    with pytest.raises(
        ValueError, match=r"with other values: resolution was 32, is 64; flips was \"both\", is \"none\"\."
    ):
        main(words(shards, folder, "--data.resolution=64", "--flips=none"))
    with pytest.raises(ValueError, match=r"prompts.count was 14, is 10; .*; shards: 00002 is gone\."):
        main([*words(shards, folder), f"--data.train_shards={shards}/0000{{0,1}}.tar"])
    shutil.copytree(PIPELINE / "vae", tmp_path / "same")
    config = json.loads((tmp_path / "same/config.json").read_text()) | {"_name_or_path": "x", "_diffusers_version": "1"}
    (tmp_path / "same/config.json").write_text(json.dumps(config))
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    vae.quant_conv.bias.data += 1e-6
    vae.save_pretrained(tmp_path / "other")
    known = backbone.encoders_identity()
    same = StableDiffusionXL.without_denoiser(repo=str(PIPELINE), vae_repo=str(tmp_path / "same"))
    assert same.encoders_identity() == known
    assert set(same._modules) == set()  # nothing was loaded for it
    other = StableDiffusionXL(str(PIPELINE), vae_repo=str(tmp_path / "other"), vae_precision="bf16").encoders_identity()
    assert {name for name in known if known[name] != other[name]} == {"vae", "vae_precision"}
    cache = Cache.open(folder)
    cache.check(rules(known, 32, False, "both", "moments"))
    with pytest.raises(
        ValueError, match=r"does not fit this run: encoders.vae was \"\w+\", is \"\w+\"; encoders.vae_pre"
    ):
        cache.check({"encoders": other, "resolution": 32})


def test_identity_follows_variant_and_hub_cache(sd15, tmp_path, monkeypatch):
    whole = StableDiffusion.without_denoiser(repo=str(sd15)).encoders_identity()
    snapshot = tmp_path / "models--someone--sd15/snapshots/0123456789"
    shutil.copytree(sd15, snapshot)
    (refs := tmp_path / "models--someone--sd15/refs").mkdir()
    (refs / "main").write_text("0123456789")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def hub(revision=None):
        return digest_weights(ModelLocation("someone/sd15", "vae", revision), "diffusion_pytorch_model")

    assert hub() == hub("main") == whole["vae"]
    with pytest.raises(FileNotFoundError, match=r"someone/sd15/vae holds no config\.json"):
        hub("other")
    half = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(sd15, dtype=torch.float16).save_pretrained(half, variant="fp16")
    identity = StableDiffusion.without_denoiser(repo=str(half), variant="fp16").encoders_identity()
    assert identity["vae"] != whole["vae"]
    assert identity["tokenizers"] == whole["tokenizers"]
    with pytest.raises(FileNotFoundError, match=r"vae holds no diffusion_pytorch_model\.safetensors"):
        StableDiffusion.without_denoiser(repo=str(half)).encoders_identity()


def test_pairs_keep_their_aspect_ratio_in_buckets(tmp_path):
    """The last pair is wide: its images are turned into ones of twice the width."""
    pairs = bundled(3)
    wide = []
    for data in (pairs[2].image_0, pairs[2].image_1):
        image = decode(data)
        image.resize((2 * image.width, image.height)).save(buffer := io.BytesIO(), "PNG")
        wide.append(buffer.getvalue())
    pairs[2] = pairs[2]._replace(image_0=wide[0], image_1=wide[1])
    write_shard(tmp_path / "00000.tar", pairs)
    main(words(tmp_path, tmp_path / "cache", "--data.resolution=64", "--data.aspect_buckets=true"))
    cache, shard = Cache.open(tmp_path / "cache"), str(tmp_path / "00000.tar")
    shapes = [tuple(cache.latents(shard, row, True).shape[-2:]) for row in range(3)]
    assert shapes == [(32, 32), (32, 32), (24, 48)]
    assert cache.time_ids(shard, 2)[0, -2:].tolist() == [48, 96]  # of 1 to 2
    cache.check({"aspect_buckets": True, "resolution": 64})


def test_broken_samples_are_skipped_or_stop_it(tmp_path, capsys):
    pairs = bundled(4)
    pairs[1] = pairs[1]._replace(image_0=b"no image")
    pairs[2] = pairs[2]._replace(label_0=0.7)  # a label that is none
    write_shard(tmp_path / "00000.tar", pairs)
    with pytest.raises(SampleError, match=f"key {pairs[2].key}: label_0.txt is '0.7'"):
        main(words(tmp_path, tmp_path / "cache"))
    main(words(tmp_path, tmp_path / "cache", "--data.on_error=skip"))
    assert "skipped 2 samples" in capsys.readouterr().out
    cache, shard = Cache.open(tmp_path / "cache"), str(tmp_path / "00000.tar")
    assert cache.latents(shard, 3, True).isfinite().all()
    for row in (1, 2, 4):
        with pytest.raises(SampleError, match=f"sample {row}: .* has no latents of it: it was broken"):
            cache.latents(shard, row, False)


def test_what_cannot_be_cached_is_refused(shards, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data.crop is random, of which a cache would keep one draw"):
        main(words(shards, tmp_path / "random", "--data.crop=random"))
    with pytest.raises(FileNotFoundError, match="is not a cache"):
        Cache.open(tmp_path)
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    vae.quant_conv.weight.data *= 1e6
    vae.save_pretrained(tmp_path / "vae")
    other = f"--model.backbone.init_args.vae_repo={tmp_path}/vae"
    with pytest.raises(ValueError, match=r"00000.tar, key \S+: its latents are not finite in float16; .* is fp32\."):
        main(words(shards, tmp_path / "huge", other))
    monkeypatch.setattr(encode_command.shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000))
    with pytest.raises(OSError, match=r"needs 3\d\d\.\d kB more, and its disk has 300\.0 kB free"):
        main(words(shards, tmp_path / "full"))
    main(words(shards, tmp_path / "full", "--flips=none", "--posterior=sample"))
    cache = Cache.open(tmp_path / "full")
    with pytest.raises(ValueError, match="has no mirrored images"):
        cache.latents("00000.tar", 0, True)


@pytest.fixture
def no_encoders(monkeypatch):
    """Nothing may load an encoder."""

    def refuse(*args, **options):
        raise AssertionError("an encoder was loaded")

    for kind in (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", refuse)


def first_pair(batch):
    """A batch of one: half precision is slow on the CPU."""
    info = {name: value[:1] for name, value in batch.pairs._asdict().items() if isinstance(value, torch.Tensor)}
    if isinstance(batch, PreferenceBatch):
        pairs = batch.pairs._replace(**info)
        return PreferenceBatch(batch.images[:1], batch.time_ids[:1], batch.prompts[:1], pairs)
    return batch._replace(
        moments=Moments(batch.moments.values[:1]),
        time_ids=batch.time_ids[:1],
        conditioning={key: value[:1] for key, value in batch.conditioning.items()},
        pairs=batch.pairs._replace(**info),
    )


class Batches(L.LightningDataModule):
    def __init__(self, batches, encoded):
        super().__init__()
        self.batches, self.encoded, self.batch_size = batches, encoded, PAIRS_EACH

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


def fit(module, data, folder, callbacks=(), **options):
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), max_epochs=1, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_on_cached_pairs_loads_no_encoders(shards, folder, tmp_path, no_encoders, precision):
    _, cached = batches(shards, Cache.open(folder), True)
    module = AlignmentModule(StableDiffusionXL(str(small_sdxl())), MaPO(), caption_dropout=0.5)
    seen = []
    module.backbone.denoiser.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    before = {name: value.clone() for name, value in module.backbone.trainable_parameters().items()}
    fit(module, Batches([first_pair(cached)], encoded=True), tmp_path, precision=precision)
    assert len(seen) == 1
    assert all(latents.isfinite().all() for latents in seen)
    assert any(not torch.equal(before[name], value) for name, value in module.backbone.trainable_parameters().items())
    assert set(module.backbone._modules) == {"denoiser", "schedule"}


def test_training_on_pixels_misses_encoders_before_the_first_step(shards, folder, tmp_path, no_encoders):
    pixels, _ = batches(shards, Cache.open(folder), False)
    module = AlignmentModule(StableDiffusionXL(str(PIPELINE)), MaPO())
    module.on_before_optimizer_step = lambda optimizer: pytest.fail("a step was taken")
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        fit(module, Batches([pixels], encoded=False), tmp_path)


def test_a_late_vae_keeps_its_precision_where_the_trainer_rounds_all_weights(shards, folder, tmp_path, backbone):
    pixels, _ = batches(shards, Cache.open(folder), False)
    module = AlignmentModule(StableDiffusionXL(str(small_sdxl())), MaPO())
    fit(module, Batches([first_pair(pixels)], encoded=False), tmp_path, precision="bf16-true")
    assert torch.equal(module.backbone.vae.quant_conv.weight, backbone.vae.quant_conv.weight)
    assert {p.dtype for p in module.backbone.text_encoders.parameters()} == {torch.bfloat16}


def test_borrowed_encoders_are_freed(shards, folder, tmp_path):
    backbone = StableDiffusionXL(str(PIPELINE))
    backbone.cast_frozen(torch.bfloat16)
    with backbone.borrowed_encoders():
        parts = [weakref.ref(backbone.vae), weakref.ref(backbone.text_encoders[1])]
        assert parts[1]().dtype == torch.bfloat16
        assert not any(p.requires_grad for part in parts for p in part().parameters())
    assert [part() for part in parts] == [None, None]
    backbone.cast_frozen(torch.float32)
    random.seed(0)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    alone = generate(backbone, ["fox"], [3], 32, 32, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(backbone._modules) == {"denoiser", "schedule"}
    vae = backbone.vae
    assert torch.equal(generate(backbone, ["fox"], [3], 32, 32, steps=2), alone)
    assert backbone.vae is vae  # it was there before
    _, cached = batches(shards, Cache.open(folder), False)
    module = AlignmentModule(StableDiffusionXL(str(small_sdxl())), MaPO())
    grid = SampleGrid(["fox", "tulip"], every_n_steps=0, height=32, width=32, steps=1)
    fit(module, Batches([first_pair(cached)], encoded=True), tmp_path, callbacks=[grid])
    assert len(list(tmp_path.rglob("step-*.png"))) == 1
    assert set(module.backbone._modules) == {"denoiser", "schedule"}
