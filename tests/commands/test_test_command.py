"""`lit-align test`: the same numbers whatever the batch and the processes, drawn once, from any kind of model."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import RLock
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tqdm import tqdm

from lit_align.backbones import LoRA, StableDiffusion, StableDiffusionXL, sampling
from lit_align.backbones.loading.denoisers import load_denoiser
from lit_align.backbones.reference import FrozenAdapter
from lit_align.cli import main
from lit_align.commands.evaluate import comparison as contest
from lit_align.commands.evaluate.test import test as run_test
from lit_align.commands.export import export
from lit_align.commands.shared import image_files as drawing
from lit_align.commands.shared import process_group as place_module
from lit_align.commands.shared.models import find_base, is_pipeline
from lit_align.data.images import decode_pixels
from lit_align.evaluation.image_store import Gallery
from lit_align.evaluation.noise import prompt_seed
from lit_align.evaluation.prompts import read_prompts
from lit_align.evaluation.win_rates import compare
from lit_align.scoring import load_scorers
from tests.support.exports import darker
from tests.support.images import write_red_image
from tests.support.paths import PIPELINE, ROOT
from tests.support.runs import fit, make_data, make_module

make_bundled = partial(make_module, repo=PIPELINE)  # whose pictures mean something

NAMES = ["anchor", "bacon", "fox", "tulip", "bell", "red apple", "axe", "cactus"]
SCORERS = ["clip", "style", "colour"]
SAMPLERS = ["euler", "ddim", "dpm++"]
TOLERANCES = {"clip": 0.01}


@pytest.fixture(autouse=True)
def _in_project(monkeypatch):
    monkeypatch.chdir(ROOT)  # the scorers' folders are relative


@pytest.fixture(scope="module")
def dark(tmp_path_factory):
    return str(darker(tmp_path_factory.mktemp("models") / "dark"))


def write_prompts(folder, names=NAMES):
    path = folder / "prompts.txt"
    path.write_text("\n".join(names) + "\n")
    return str(path)


def run(folder, model, names=NAMES, output="out", **options):
    """Results, with a cache of the folder's own."""
    options = {
        "models": {"dark": model},
        "scorers": SCORERS,
        "base": str(PIPELINE),
        "presets": ROOT / "assets/emoji/scorers/scorers.yaml",
        "steps": 2,
        "cache": folder / "cache",
        "accelerator": "cpu",
        "devices": 1,
        **options,
    }
    run_test(output=folder / output, prompts=write_prompts(folder, names), **options)
    return read(folder / output)


def read(folder):
    return json.loads((folder / "results.json").read_text())


def images(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("images/*/*.png"))}


def without_options(results):
    return {name: value for name, value in results.items() if name != "made_with"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dark):
    """A folder with results, drawn one by one."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run(folder, dark, steps=6, tolerances=TOLERANCES, batch_size=1)
    return folder


def test_results_are_what_sampler_and_scorers_say(whole, dark):
    found = read(whole / "out")
    backbone = StableDiffusionXL(str(PIPELINE))
    scorers = load_scorers(SCORERS, ROOT / "assets/emoji/scorers/scorers.yaml")
    denoisers = {"base": backbone.denoiser, "dark": load_denoiser(backbone, dark)}
    assert list(found["models"]) == ["base", "dark"]
    assert found["models"]["base"] | {"fingerprint": ""} == {"repo": str(PIPELINE), "weights": None, "fingerprint": ""}
    assert found["models"]["dark"]["weights"] == dark
    assert found["prompts"] == [{"prompt": name, "seed": prompt_seed(name, 0)} for name in NAMES]
    assert found["sampling"] == {
        "sampler": "euler",
        "steps": 6,
        "guidance_scale": 5.0,
        "height": 32,
        "width": 32,
        "precision": "fp32",
        "seed": 0,
    }
    for model, denoiser in denoisers.items():
        backbone.denoiser = denoiser
        for number in (0, 5):
            seed = prompt_seed(NAMES[number], 0)
            (drawn,) = sampling.generate(backbone, [NAMES[number]], [seed], 32, 32, 6, 5.0)
            stored = decode_pixels((whole / f"out/images/{model}/{number:05d}.png").read_bytes())
            assert torch.equal(drawn, torch.from_numpy(stored).permute(2, 0, 1))
            for name, scorer in scorers.items():
                assert found["scores"][name][model][number] == scorer.score([drawn], [NAMES[number]]).item()
    assert len(images(whole / "out")) == 2 * len(NAMES)
    tensors = {
        model: {name: torch.tensor(found["scores"][name][model], dtype=torch.float64) for name in SCORERS}
        for model in denoisers
    }
    wanted = compare(tensors["dark"], tensors["base"], TOLERANCES)
    (comparison,) = found["comparisons"]
    assert (comparison["model"], comparison["against"], comparison["macro"]) == ("dark", "base", wanted.macro)
    for name, outcome in comparison["scorers"].items():
        assert outcome["wins"] + outcome["ties"] + outcome["losses"] == len(NAMES)
        assert outcome["win_rate"] == wanted.scorers[name].win_rate
        assert outcome["interval"] == list(wanted.scorers[name].interval)
        assert outcome["sign_test"] == wanted.scorers[name].sign_test
    assert found["scorers"]["clip"] == {"fingerprint": scorers["clip"].fingerprint(), "tie_tolerance": 0.01}
    assert found["made_with"]["torch"] == torch.__version__
    assert found["made_with"]["options"]["scorers"] == SCORERS


def test_batch_size_does_not_matter(whole, tmp_path, dark):
    """8 finds what 1 does, to the last bit of every image and score."""
    again = run(tmp_path, dark, steps=6, tolerances=TOLERANCES, batch_size=8)
    assert without_options(again) == without_options(read(whole / "out"))
    assert images(tmp_path / "out") == images(whole / "out")


def test_larger_batches_find_nearly_the_same(whole, tmp_path, dark, monkeypatch):
    """As on a GPU, where images and scores are computed in batches: here by 3, of 8."""
    for module in (contest, drawing):
        monkeypatch.setattr(module, "at_a_time", lambda *_: 3)
    again, single = run(tmp_path, dark, steps=6, tolerances=TOLERANCES), read(whole / "out")
    drawn, alone = images(tmp_path / "out"), images(whole / "out")
    assert drawn.keys() == alone.keys()
    for name, data in drawn.items():
        difference = decode_pixels(data).astype(int) - decode_pixels(alone[name])
        assert abs(difference).max() <= 1
    for name in SCORERS:
        for model, values in again["scores"][name].items():
            for number, (value, wanted) in enumerate(zip(values, single["scores"][name][model], strict=True)):
                key = f"images/{model}/{number:05d}.png"
                near = 1e-4 if drawn[key] == alone[key] else 1e-3  # one step of a pixel moves a score further
                assert value == pytest.approx(wanted, rel=near, abs=near)


def command(folder, model, **options):
    """Ended process of the command line, in the environment of a user who says nothing of threads."""
    words = [f"--{name}={value}" for name, value in options.items()]
    words += [f"--models={{dark: {model}}}", f"--base={PIPELINE}", f"--prompts={write_prompts(folder)}"]
    words += [f"--scorers={','.join(SCORERS)}", f"--presets={ROOT}/assets/emoji/scorers/scorers.yaml", "--steps=6"]
    words += [f"--tolerances={json.dumps(TOLERANCES)}", f"--output={folder}/out", f"--cache={folder}/cache"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "lit_align", "test", "--accelerator=cpu", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_devices_find_the_same_to_the_last_bit(whole, tmp_path, dark, devices):
    """Processes that the command starts itself; it ends when all have, with the results there."""
    ended = command(tmp_path, dark, devices=devices)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("dark against base, 8 prompts") == 1
    assert without_options(read(tmp_path / "out")) == without_options(read(whole / "out"))
    assert images(tmp_path / "out") == images(whole / "out")
    assert read(tmp_path / "out")["made_with"]["device"] == "CPU, threads: 1"


def share_of(rank, *arguments, **options):
    """What one of two processes does that torchrun has started."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "RANK": str(rank)}
    with suppress(FileNotFoundError):  # whoever ends first has no results
        run(*arguments, **options)


def test_two_processes_find_what_one_does(whole, tmp_path, dark, capfd):
    """At the same time; one of them prints the table. Again when there is nothing to do, and they end together."""
    for _ in range(2):
        fork = multiprocessing.get_context("fork").Process
        arguments = {"steps": 6, "tolerances": TOLERANCES}
        both = [fork(target=share_of, args=(rank, tmp_path, dark), kwargs=arguments) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        assert capfd.readouterr().out.count("dark against base, 8 prompts") == 1
        assert without_options(read(tmp_path / "out")) == without_options(read(whole / "out"))
        assert images(tmp_path / "out") == images(whole / "out")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first ends last", "second ends last"])
def test_the_last_process_writes(tmp_path, dark, monkeypatch, order, capsys):
    """One after the other; nobody waits."""
    monkeypatch.setattr(place_module, "LOOKS", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    share = {"names": NAMES[:3], "scorers": "colour", "steps": 1}
    monkeypatch.setenv("RANK", str(order[1]))
    with pytest.raises(FileNotFoundError):
        run(tmp_path, dark, **share)
    said = capsys.readouterr().out
    assert "other processes are still at work; the last one writes" in said
    assert "If none is running, run the same command again." in said
    assert "against" not in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", str(order[0]))
    assert [row["prompt"] for row in run(tmp_path, dark, **share)["prompts"]] == NAMES[:3]
    assert capsys.readouterr().out.count("dark against base, 3 prompts") == 1


def counting(monkeypatch):
    """How many images each call draws."""
    counts, draw = [], contest.draw_images

    def counted(model, wanted, *rest):
        counts.append(len(wanted))
        return draw(model, wanted, *rest)

    monkeypatch.setattr(contest, "draw_images", counted)
    return counts


def test_the_base_is_drawn_and_scored_once(tmp_path, dark, monkeypatch, capsys):
    """A second model costs half; the same command again costs nothing, and a damaged image that image alone."""
    counts = counting(monkeypatch)
    share = {"names": NAMES[:3], "steps": 1}
    first = run(tmp_path, dark, **share)
    other = darker(tmp_path / "other")
    unet = UNet2DConditionModel.from_pretrained(other)
    with torch.no_grad():
        unet.conv_out.bias.add_(0.2)
    unet.save_pretrained(other)
    second = run(tmp_path, str(other), output="second", **share)
    assert counts == [3, 3, 0, 3]
    assert first["scores"]["clip"]["base"] == second["scores"]["clip"]["base"]
    assert first["scores"]["clip"]["dark"] != second["scores"]["clip"]["dark"]
    before = images(tmp_path / "out")
    folder = next(path for path in (tmp_path / "cache").glob("*/*.png") if path.read_bytes() in before.values()).parent
    scored = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("scores/*/*.json")}
    damaged = sorted(folder.glob("*.png"))
    data = bytearray(damaged[0].read_bytes())
    data[len(data) // 2] ^= 1
    for path, content in zip(damaged, (bytes(data), data[:-20]), strict=False):
        path.unlink()  # the results' own links stay
        path.write_bytes(content)
    assert without_options(run(tmp_path, dark, **share)) == without_options(first)
    assert sum(counts[4:]) == 2
    assert images(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("scores/*/*.json")} == scored
    run(tmp_path, dark, scorers="colour", output="third", **share)  # another list of scorers draws nothing
    assert counts[6:] == [0, 0]


def test_the_first_of_two_runs_with_a_cache_wins(tmp_path, dark, monkeypatch):
    """The other one has drawn an image meanwhile, and may have scored it: it stays, and counts for both."""
    draw, written = contest.draw_images, {}

    def overtaken(model, wanted, *rest):
        wanted[0].path.parent.mkdir(parents=True)
        written[wanted[0].path] = write_red_image(wanted[0].path)
        return draw(model, wanted, *rest)

    monkeypatch.setattr(contest, "draw_images", overtaken)
    found = run(tmp_path, dark, NAMES[:2], scorers="colour", steps=1)
    assert {path: path.read_bytes() for path in written} == written
    assert len(written) == 2
    assert found["scores"]["colour"]["base"][0] == found["scores"]["colour"]["dark"][0]
    assert images(tmp_path / "out")["images/base/00000.png"] in written.values()
    assert not list((tmp_path / "cache").rglob(".*"))


def test_an_image_that_is_changed_after_it_was_scored_is_an_error(tmp_path, dark, monkeypatch):
    """Not a process that ends well without results."""
    score = Gallery.score

    def then_changed(gallery, *rest):
        score(gallery, *rest)
        write_red_image(gallery.paths[1])

    monkeypatch.setattr(Gallery, "score", then_changed)
    with pytest.raises(RuntimeError, match=r"cache: 1 images of base in .* have no score by colour.* again"):
        run(tmp_path, dark, NAMES[:2], scorers="colour", steps=1)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    run(tmp_path, dark, NAMES[:2], scorers="colour", steps=1)


def test_a_pipeline_that_differs_in_a_number_alone_draws_anew(tmp_path, dark, monkeypatch):
    """Weights are the same; the VAE's scale, or what an empty prompt becomes, makes other images all the same."""
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
    found = run(tmp_path, dark, models=models, **share)
    assert counts == [2, 2, 2, 2]
    assert len({about["fingerprint"] for about in found["models"].values()}) == 4
    before = images(tmp_path / "out")
    assert len(set(before.values())) == len(before)
    for name, version in (("SAMPLING_VERSION", 2), ("transformers", SimpleNamespace(__version__="0"))):
        monkeypatch.setattr(contest, name, version)
        run(tmp_path, dark, models={"m0": models["m0"]}, output=name, **share)
    assert counts[4:] == [2, 2, 2, 2]


def test_samplers(tmp_path, dark):
    """Each draws images of its own, as diffusers does, and is written down."""
    share = {"names": NAMES[:1], "scorers": "colour", "steps": 8}
    backbone = StableDiffusionXL(str(PIPELINE))
    for name, scheduler in (("ddim", DDIMScheduler), ("dpm++", DPMSolverMultistepScheduler)):
        found = run(tmp_path, dark, output=name, sampler=name, **share)
        assert found["sampling"]["sampler"] == name
        pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        seed = prompt_seed(NAMES[0], 0)
        noise = torch.randn(1, *backbone.latent_shape(32, 32), generator=torch.Generator().manual_seed(seed))
        (wanted,) = pipeline(
            NAMES[0], height=32, width=32, num_inference_steps=8, latents=noise, output_type="np"
        ).images
        stored = decode_pixels((tmp_path / name / "images/base/00000.png").read_bytes())
        assert abs(stored.astype(int) - (wanted * 255).round().astype(int)).max() <= 1
    with pytest.raises(ValueError, match=r"sampler was \"ddim\", is \"euler\""):
        run(tmp_path, dark, output="ddim", **share)
    euler = run(tmp_path, dark, output="euler", **share)
    assert euler["sampling"]["sampler"] == "euler"
    assert len(list((tmp_path / "cache").iterdir())) == 6
    drawn = [decode_pixels((tmp_path / name / "images/base/00000.png").read_bytes()).astype(int) for name in SAMPLERS]
    assert abs(drawn[0] - drawn[1]).max() <= 2  # the same integral at the same times
    assert abs(drawn[0] - drawn[2]).mean() > 1


def test_images_of_one_colour_count_and_are_mentioned(tmp_path, capsys):
    """An over-optimised model may draw them; only what is not finite stops."""
    plain = shutil.copytree(PIPELINE, tmp_path / "plain")
    vae = AutoencoderKL.from_pretrained(plain, subfolder="vae")
    for parameter in vae.decoder.conv_out.parameters():
        parameter.data.zero_()
    vae.save_pretrained(plain / "vae")
    run(tmp_path, str(plain), NAMES[:2], scorers="colour", steps=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "one colour" in line]
    assert "dark drew 2 images of one colour alone; their numbers are finite, and they count" in line
    unet = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet")
    unet.conv_out.bias.data.fill_(torch.nan)
    unet.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"drew nothing for 'anchor', seed \d+: its numbers are not finite in fp32"):
        run(tmp_path, str(tmp_path / "broken"), NAMES[:2], scorers="colour", steps=1, output="broken")


def run_to_be_killed(*arguments, **options):
    """With a lock of its own: tqdm's is shared with what was forked, and would stay taken."""
    tqdm.set_lock(RLock())
    run(*arguments, **options)


def test_a_killed_run_goes_on(tmp_path, dark):
    """Killed while it draws; what was drawn is kept."""
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
    found = run(tmp_path, dark, **share)
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    assert without_options(found) == without_options(run(tmp_path, dark, output="new", cache=tmp_path / "b", **share))


def test_a_model_that_is_the_base_ties_everywhere(tmp_path, dark, capsys):
    """And more than one model makes a table of all pairs, those against the base first."""
    models = {"dark": dark, "same": str(PIPELINE)}
    found = run(tmp_path, dark, NAMES[:2], models=models, steps=1)
    said = capsys.readouterr().out
    assert "same is base, weight for weight: every prompt is a tie" in said
    assert said.count("win rates against base\n  model") == 1
    pairs = [(one["model"], one["against"]) for one in found["comparisons"]]
    assert pairs == [("dark", "base"), ("same", "base"), ("same", "dark")]
    for outcome in found["comparisons"][1]["scorers"].values():
        assert (outcome["wins"], outcome["ties"], outcome["losses"], outcome["win_rate"]) == (0, 2, 0, 0.5)
    assert found["models"]["same"]["fingerprint"] == found["models"]["base"]["fingerprint"]


def test_seeds_differ_and_0_is_one(tmp_path, dark):
    share = {"names": NAMES[:2], "scorers": "colour", "steps": 1}
    zero, one = (run(tmp_path, dark, output=str(seed), seed=seed, **share) for seed in (0, 1))
    assert zero["sampling"]["seed"] == 0
    assert [a["seed"] != b["seed"] for a, b in zip(zero["prompts"], one["prompts"], strict=True)] == [True, True]
    assert zero["scores"] != one["scores"]


# -- checkpoints


@pytest.fixture(scope="module", params=[None, LoRA(rank=2, alpha=6)], ids=["full", "lora"])
def trained(request, tmp_path_factory):
    """The folder of a run far from the base, whose checkpoint holds its reference too, and its module."""
    folder = tmp_path_factory.mktemp("trained")
    module = make_bundled(lora=request.param)
    module.backbone.add_reference()
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    module.backbone.reference.moved = True
    fit(module, make_data(), folder, steps=2, callbacks=[checkpoint])
    names = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert any("reference" in name for name in names)
    return folder, module


def test_a_checkpoint_draws_what_was_trained(trained, tmp_path):
    folder, module = trained
    drawn = {}
    export(folder / "last.ckpt", tmp_path / "unet")
    for path in (folder / "last.ckpt", tmp_path / "unet"):
        backbone = StableDiffusionXL(str(PIPELINE))
        backbone.denoiser = load_denoiser(backbone, str(path))
        assert not any(weight.requires_grad for weight in backbone.denoiser.parameters())
        drawn[path.name] = sampling.generate(backbone, ["fox"], [3], 32, 32, 2)
    assert torch.equal(drawn["last.ckpt"], drawn["unet"])
    if isinstance(module.backbone.reference, FrozenAdapter):
        module.backbone.reference._activate("default")
    ours = sampling.generate(module.backbone, ["fox"], [3], 32, 32, 2)
    base = sampling.generate(StableDiffusionXL(str(PIPELINE)), ["fox"], [3], 32, 32, 2)
    assert (ours.int() - drawn["unet"].int()).abs().max() <= 1  # a merged LoRA rounds otherwise
    assert (ours.float() - base.float()).abs().mean() > 3


def test_a_checkpoint_against_the_base_that_it_names(trained, tmp_path):
    folder, _ = trained
    found = run(tmp_path, str(folder / "last.ckpt"), NAMES[:2], base=None, scorers="colour", steps=1)
    assert found["models"]["base"]["repo"] == str(PIPELINE)
    assert found["models"]["dark"]["fingerprint"] != found["models"]["base"]["fingerprint"]


def test_a_checkpoint_of_something_else_is_refused(trained, tmp_path, sd15):
    folder, _ = trained
    with pytest.raises(
        ValueError, match=r"last\.ckpt belongs to a StableDiffusionXLPipeline, but .* is a StableDiffusion"
    ):
        load_denoiser(StableDiffusion(str(sd15)), str(folder / "last.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "damaged.ckpt").write_bytes(b"fox" * 100)
    backbone = StableDiffusionXL(str(PIPELINE))
    with pytest.raises(ValueError, match=r"foreign\.ckpt was not written by lit-align"):
        load_denoiser(backbone, str(tmp_path / "foreign.ckpt"))
    with pytest.raises(ValueError, match=r"damaged\.ckpt is not a checkpoint, or is damaged"):
        load_denoiser(backbone, str(tmp_path / "damaged.ckpt"))


def test_names_of_models(tmp_path, dark, trained):
    folder, _ = trained
    assert is_pipeline(str(PIPELINE))
    assert is_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    assert not is_pipeline(dark)
    assert not is_pipeline(str(folder / "last.ckpt"))
    (tmp_path / "step=4.ckpt").mkdir()
    (tmp_path / "step=4.ckpt/meta.pt").touch()  # a checkpoint in parts, see `is_sharded`
    for name in ("step=4.ckpt", "step=4.ckpt/"):
        assert not is_pipeline(f"{tmp_path}/{name}")
    for name in ("runs/nowhere/last.ckpt", str(tmp_path), "nowhere"):
        with pytest.raises(FileNotFoundError, match="is neither a checkpoint of lit-align fit"):
            is_pipeline(name)
    assert find_base([dark, str(folder / "last.ckpt")], None) == str(PIPELINE)
    assert find_base([dark], "other") == "other"
    with pytest.raises(ValueError, match=r"no checkpoint names it\. Say --base"):
        find_base([dark], None)
    other = torch.load(folder / "last.ckpt", weights_only=True)
    other["lit_align"]["repo"] = "other"
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"checkpoints name .*pipeline', 'other'\. Say --base"):
        find_base([str(folder / "last.ckpt"), str(tmp_path / "other.ckpt")], None)


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {}}, "models is empty"),
        ({"models": {"base": "x/y"}}, "models: 'base' is what they are compared with"),
        ({"models": {"a/b": "x/y"}}, "models: 'a/b' is no name for a folder"),
        ({"models": {"a": "nowhere"}}, "'nowhere' is neither a checkpoint"),
        ({"base": None}, "Say --base"),
        ({"scorers": "beauty"}, "'beauty' is not in"),
        ({"scorers": ""}, "scorers is empty"),
        ({"tolerances": {"beauty": 1.0}}, "'beauty' is not among the scorers clip, style, colour"),
        ({"tolerances": {"clip": -1.0}}, "that of clip is -1.0; it must be 0 or more"),
        ({"tolerances": {"clip": float("inf")}}, "that of clip is inf; it must be 0 or more, and finite"),
        ({"names": [""]}, "there is no prompt in"),
        ({"steps": 0}, "steps is 0"),
        ({"prompt_limit": 0}, "prompt_limit is 0"),
        ({"height": 36}, "height is 36; it must be a multiple of 8"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(tmp_path, dark, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, dark, **options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_results_of_other_options_are_refused(whole, tmp_path, dark):
    before = (whole / "out/results.json").read_bytes()
    with pytest.raises(ValueError, match=r"was begun with other values: steps was 6, is 2"):
        run(whole, dark, tolerances=TOLERANCES)
    with pytest.raises(ValueError, match=r"prompts' digest was"):
        run(whole, dark, NAMES[:2], tolerances=TOLERANCES, steps=6)
    write_prompts(whole)
    assert (whole / "out/results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"accuracy": 1}', "its format is None, not 2"),
        ("[1]", "its format is None, not 2"),
        ('{"format": 1, "made_with": {"options": {}}, "prompts": []}', "its format is 1, not 2"),
        ("fox", "cannot be read"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, dark, text, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text(text)
    with pytest.raises(ValueError, match=rf"results\.json .*{message}.*Choose another folder"):
        run(tmp_path, dark)
    assert (tmp_path / "out/results.json").read_text() == text


# -- the configs


CONFIGS = sorted((ROOT / "configs/test").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_config_parses(config, capsys):
    """Every option that it names is there, as it says."""
    with pytest.raises(SystemExit) as exit_:
        main(["test", f"--config={config}", "--print_config"])
    assert exit_.value.code in (0, None)
    dumped = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(config.read_text())
    assert {name: dumped[name] for name in written} == written
    assert "Hardware:" in config.read_text()


def test_configs_are_all_here():
    assert [config.stem for config in CONFIGS] == ["emoji", "emoji_balanced_dpo", "partiprompts_sdxl"]


def test_a_config_runs_with_another_model(tmp_path, dark, capsys):
    words = [
        f"--config={ROOT}/configs/test/emoji_balanced_dpo.yaml",
        "--steps=1",
        "--prompt_limit=2",
        f"--output={tmp_path}/out",
    ]
    main(["test", *words, "--models", f"{{dark: {dark}}}", f"--cache={tmp_path}/cache"])
    said = capsys.readouterr().out
    assert "2 of 72 prompts; left out: 0 repeated, 0 blank" in said
    assert "a difference of at most: clip 0.004, style 0.4, colour 4" in said
    assert [row["prompt"] for row in read(Path(tmp_path) / "out")["prompts"]] == [
        "adhesive bandage",
        read_prompts("emoji").unique[36],
    ]
