"""`lit-align test` with checkpoints, exports, pipelines and samplers of all kinds."""

import shutil
from functools import partial

import lightning as L
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from lit_align.backbones import LoRA, StableDiffusion, StableDiffusionXL, sampling
from lit_align.backbones.loading.denoisers import load_denoiser
from lit_align.backbones.reference import FrozenAdapter
from lit_align.commands.export import export
from lit_align.commands.shared.models import find_base, is_pipeline
from lit_align.data.decoder import decode_pixels
from lit_align.evaluation.prompts import prompt_seed
from tests.support.paths import PIPELINE
from tests.support.runs import fit, make_data, make_module
from tests.support.win_rate_tests import NAMES, run_test

make_bundled = partial(make_module, repo=PIPELINE)  # whose pictures mean something


def test_samplers(tmp_path, dark):
    """Each sampler draws what diffusers' scheduler draws, and stands in the results."""
    share = {"names": NAMES[:1], "scorers": "colour", "steps": 8}
    backbone = StableDiffusionXL(str(PIPELINE))
    for name, scheduler in (("ddim", DDIMScheduler), ("dpm++", DPMSolverMultistepScheduler)):
        found = run_test(tmp_path, dark, output=name, sampler=name, **share)
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
        run_test(tmp_path, dark, output="ddim", **share)
    euler = run_test(tmp_path, dark, output="euler", **share)
    assert euler["sampling"]["sampler"] == "euler"
    assert len(list((tmp_path / "cache").iterdir())) == 6
    paths = [tmp_path / name / "images/base/00000.png" for name in ("euler", "ddim", "dpm++")]
    drawn = [decode_pixels(path.read_bytes()).astype(int) for path in paths]
    assert abs(drawn[0] - drawn[1]).max() <= 2  # both integrate one equation at equal times
    assert abs(drawn[0] - drawn[2]).mean() > 1


def test_images_of_one_colour_count_and_are_mentioned(tmp_path, capsys):
    """An over-optimised model may draw them; only values that are not finite stop the test."""
    plain = shutil.copytree(PIPELINE, tmp_path / "plain")
    vae = AutoencoderKL.from_pretrained(plain, subfolder="vae")
    for parameter in vae.decoder.conv_out.parameters():
        parameter.data.zero_()
    vae.save_pretrained(plain / "vae")
    run_test(tmp_path, str(plain), NAMES[:2], scorers="colour", steps=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "one colour" in line]
    assert "dark drew 2 images of one colour alone; their numbers are finite, and they count" in line
    unet = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet")
    unet.conv_out.bias.data.fill_(torch.nan)
    unet.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"drew nothing for 'anchor', seed \d+: its numbers are not finite in fp32"):
        run_test(tmp_path, str(tmp_path / "broken"), NAMES[:2], scorers="colour", steps=1, output="broken")


def test_a_model_that_is_the_base_ties_everywhere(tmp_path, dark, capsys):
    """Several models also make a table of all pairs, which begins with the pairs against the base."""
    models = {"dark": dark, "same": str(PIPELINE)}
    found = run_test(tmp_path, dark, NAMES[:2], models=models, steps=1)
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
    zero, one = (run_test(tmp_path, dark, output=str(seed), seed=seed, **share) for seed in (0, 1))
    assert zero["sampling"]["seed"] == 0
    assert [a["seed"] != b["seed"] for a, b in zip(zero["prompts"], one["prompts"], strict=True)] == [True, True]
    assert zero["scores"] != one["scores"]


@pytest.fixture(scope="module", params=[None, LoRA(rank=2, alpha=6)], ids=["full", "lora"])
def trained(request, tmp_path_factory):
    """Folder and module of a run far from the base; its checkpoint also holds the reference."""
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
    assert (ours.int() - drawn["unet"].int()).abs().max() <= 1  # a merged LoRA rounds differently
    assert (ours.float() - base.float()).abs().mean() > 3


def test_a_checkpoint_against_the_base_that_it_names(trained, tmp_path):
    folder, _ = trained
    found = run_test(tmp_path, str(folder / "last.ckpt"), NAMES[:2], base=None, scorers="colour", steps=1)
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
    (tmp_path / "step=4.ckpt/meta.pt").touch()  # a sharded checkpoint, see `is_sharded`
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
