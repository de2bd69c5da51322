"""Pipelines whose configs ask for more than the training does are refused by the name of the key."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from lit_align.backbones import StableDiffusion, StableDiffusionXL
from lit_align.backbones.loading.meta import shapes_only
from lit_align.backbones.loading.scheduler_config import CLASSES, load_scheduler
from lit_align.cli import main
from lit_align.diffusion import NoiseSchedule
from lit_align.user_errors import UserValueError
from tests.support.paths import PIPELINE

SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"
TEXT, INDEX = "text_encoder/config.json", "model_index.json"


def bare(source, folder):
    """Copy a pipeline without its weights."""
    return shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def edit(folder, file, **changes):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (SCHEDULER, {"_class_name": "EDMDPMSolverMultistepScheduler"}, "the scheduler is EDMDPMSolverMultistepSched"),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "the scheduler is EDMEulerScheduler"),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "the scheduler is FlowMatchEulerDiscrete"),
        (SCHEDULER, {"_class_name": "LCMScheduler"}, "the scheduler is LCMScheduler"),
        (INDEX, {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}, "is FlowMatchHeunDiscreteScheduler"),
        (SCHEDULER, {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        (SCHEDULER, {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas has another length"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true with prediction_type 'epsilon'"),
        (SCHEDULER, {"use_flow_sigmas": True}, "use_flow_sigmas is true"),
        (SCHEDULER, {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        (SCHEDULER, {"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
        (SCHEDULER, {"predict_epsilon": False}, "predict_epsilon is false, so that the model predicts the image"),
        (SCHEDULER, {"snr_shift_scale": 3.0}, "snr_shift_scale is 3.0"),
        (UNET, {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256: the UNet takes a guidance embedding"),
        (UNET, {"in_channels": 9}, "in_channels is 9 (as for inpainting), but must be 4"),
        (UNET, {"in_channels": 8}, "in_channels is 8 (as for editing)"),
        (UNET, {"out_channels": 8}, "out_channels is 8, but must be 4"),
        (UNET, {"class_embed_type": "timestep"}, "class_embed_type is 'timestep': the UNet takes class labels"),
        (UNET, {"num_class_embeds": 1000}, "num_class_embeds is 1000"),
        (UNET, {"addition_embed_type": "text_image"}, "addition_embed_type is 'text_image', but must be 'text_time'"),
        (UNET, {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type is 'ip_image_proj'"),
        (UNET, {"attention_type": "gated"}, "attention_type is 'gated'"),
        (UNET, {"dual_cross_attention": True}, "dual_cross_attention is True, but must be False"),
        (UNET, {"guidance_embeds": True}, "guidance_embeds is True, which lit-align does not know"),
        (UNET, {"cross_attention_dim": 64}, "cross_attention_dim is 64, but must be 128 here"),
        (UNET, {"projection_class_embeddings_input_dim": 224}, "input_dim is 224, but must be 256 here: six sizes"),
        (UNET, {"_class_name": "UNetMotionModel"}, "the denoiser is UNetMotionModel"),
        (UNET, {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config is {"),
        (VAE, {"_class_name": "AutoencoderTiny"}, "the VAE is AutoencoderTiny"),
        (VAE, {"latent_channels": 16}, "in_channels is 4, but must be 16 here: the VAE's latent_channels"),
        (VAE, {"shift_factor": 0.1159}, "shift_factor is 0.1159"),
        (VAE, {"latents_mean": [0.0] * 4}, "latents_mean is [0.0, 0.0, 0.0, 0.0] and latents_std is None"),
        (VAE, {"latents_mean": [0.0], "latents_std": [1.0]}, "both must have 4 values"),
        (VAE, {"in_channels": 4}, "in_channels is 4, but images have 3"),
        (TEXT, {"model_type": "t5"}, "model_type is 't5'"),
        (TEXT, {"hidden_size": 128}, "cross_attention_dim is 128, but must be 192 here"),
        (INDEX, {"text_encoder": [None, None]}, "text_encoder is None, but must be CLIPTextModel"),
        (INDEX, {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "text_encoder_2 is T5EncoderModel"),
        (INDEX, {"vae": ["diffusers", "ConsistencyDecoderVAE"]}, "vae is ConsistencyDecoderVAE"),
        (INDEX, {"unet": ["diffusers", "UNetSpatioTemporalConditionModel"]}, "unet is UNetSpatioTemporalConditionMod"),
        (INDEX, {"requires_aesthetics_score": True}, "requires_aesthetics_score is true"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_training_does_not_do_is_refused_by_name(tmp_path, file, changes, message):
    folder = edit(bare(PIPELINE, tmp_path / "p"), file, **changes)
    with pytest.raises(UserValueError) as error, shapes_only():
        StableDiffusionXL(str(folder))
    assert message in str(error.value)
    assert str(folder) in str(error.value)


def test_what_published_configs_hold_without_effect_is_taken(tmp_path):
    """What diffusers leaves of another sampler, of an older version, and of an average of weights."""
    folder = bare(PIPELINE, tmp_path / "p")
    left = {"original_inference_steps": 50, "timestep_scaling": 10.0, "set_alpha_to_one": False, "skip_prk_steps": True}
    edit(folder, SCHEDULER, predict_epsilon=True, tensor_format="pt", denoise_final=True, **left)
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 0.6667}
    edit(folder, UNET, update_after_step=0, use_ema_warmup=True, **average)
    vae = edit(shutil.copytree(folder / "vae", tmp_path / "vae"), "config.json", shift_factor=0.0)
    with shapes_only():
        StableDiffusionXL(str(folder), vae_repo=str(vae))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (VAE, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "which this kind of pipeline ignores"),
        (UNET, {"addition_embed_type": "text"}, "addition_embed_type is 'text', but must be None"),
        (UNET, {"in_channels": 7, "num_class_embeds": 1000}, "num_class_embeds is 1000"),
    ],
)
def test_stable_diffusion_refuses_what_its_pipeline_ignores(tmp_path, sd15, file, changes, message):
    folder = edit(bare(sd15, tmp_path / "p"), file, **changes)
    with pytest.raises(UserValueError, match=message), shapes_only():
        StableDiffusion(str(folder))


def test_a_vae_of_other_latents_is_refused(tmp_path):
    edit(shutil.copytree(PIPELINE / "vae", tmp_path / "vae"), "config.json", scaling_factor=0.13)
    with pytest.raises(UserValueError, match=r"scaling_factor is 0\.13, but 1\.0 in .*vae: the UNet knows only such"):
        StableDiffusionXL(str(PIPELINE), vae_repo=str(tmp_path / "vae"))


def test_a_tokenizer_longer_than_its_text_encoder_is_refused(tmp_path):
    folder = edit(bare(PIPELINE, tmp_path / "p"), "tokenizer_2/tokenizer_config.json", model_max_length=77)
    with shapes_only():
        backbone = StableDiffusionXL(str(folder))
    with pytest.raises(UserValueError, match="model_max_length is 77, but the text encoder has 32 positions"):
        backbone.load_encoders()


@pytest.mark.parametrize(
    ("file", "drop", "add", "message"),
    [
        ("unet/diffusion_pytorch_model", None, "class_embedding.weight", "no place for: class_embedding.weight"),
        ("unet/diffusion_pytorch_model", "conv_out.bias", None, "unet lacks conv_out.bias"),
        ("vae/diffusion_pytorch_model", "quant_conv.bias", None, "vae lacks quant_conv.bias"),
        ("text_encoder_2/model", "text_projection.weight", None, "text_encoder_2 lacks text_projection.weight"),
        ("text_encoder/model", None, "logit_scale", None),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path, file, drop, add, message):
    folder = shutil.copytree(PIPELINE, tmp_path / "p")
    path = folder / f"{file}.safetensors"
    kept = {name: value for name, value in load_file(path).items() if name != drop}
    save_file(kept | ({add: torch.zeros(3)} if add else {}), path, metadata={"format": "pt"})
    if message is None:
        StableDiffusionXL(str(folder)).load_encoders()
        return
    with pytest.raises(UserValueError, match=message):
        StableDiffusionXL(str(folder)).load_encoders()


def test_weights_of_another_shape_are_refused(tmp_path):
    folder = edit(shutil.copytree(PIPELINE, tmp_path / "p"), UNET, block_out_channels=[64, 192])
    with pytest.raises(UserValueError, match=r"unet: .* but got torch.Size\(\[128\]\).* must belong to one model"):
        StableDiffusionXL(str(folder))


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "DPMSolverSDEScheduler"])
def test_the_schedule_is_the_one_that_the_pipelines_own_scheduler_has(tmp_path, name):
    """Also where a stored config leaves out a number: defaults of betas differ between schedulers."""
    # LMSDiscreteScheduler needs scipy, which is not installed; Euler's betas are computed and default as its are.
    kind = getattr(diffusers, "EulerDiscreteScheduler" if name == "LMSDiscreteScheduler" else name)
    for given in ({}, {"beta_start": 0.001, "beta_schedule": "scaled_linear", "num_train_timesteps": 500}):
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / SCHEDULER).write_text(json.dumps({"_class_name": name, **given}))
        found = load_scheduler(str(tmp_path), None, name)
        own = kind(**given)
        torch.testing.assert_close(found.alphas_cumprod, torch.as_tensor(own.alphas_cumprod))


def test_own_betas_are_the_schedule(tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.5]}
    (tmp_path / SCHEDULER).write_text(json.dumps(config))
    found = load_scheduler(str(tmp_path), None, None)
    torch.testing.assert_close(found.alphas_cumprod, torch.tensor([0.9, 0.72, 0.36]))


def test_zero_terminal_snr_with_velocity_reaches_pure_noise(tmp_path):
    """At the last timestep the latents are the noise alone and the target is the negated clean latents."""
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    config |= {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (tmp_path / SCHEDULER).write_text(json.dumps(config))
    scheduler = load_scheduler(str(tmp_path), None, None)
    schedule = NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    clean, noise = torch.randn(2, 1, 4, 2, 2)
    last, first = torch.tensor([999]), torch.tensor([0])
    assert torch.equal(schedule.add_noise(clean, noise, last), noise)
    assert torch.equal(schedule.target(clean, noise, last), -clean)
    plain = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert schedule.alphas_cumprod[first] == pytest.approx(plain[0].item(), rel=1e-6)
    assert EulerDiscreteScheduler.from_config(scheduler.config).config.rescale_betas_zero_snr  # images are drawn so too


def test_doctor_reports_it_as_fit_does(tmp_path, capsys):
    folder = edit(bare(PIPELINE, tmp_path / "p"), SCHEDULER, _class_name="EDMEulerScheduler")
    words = ["--config=configs/quickstart.yaml", f"--model.backbone.init_args.repo={folder}"]
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *words])
    assert exit_.value.code == 1
    assert "weights: " in (report := capsys.readouterr().out)
    assert "the scheduler is EDMEulerScheduler" in report
    with pytest.raises(UserValueError, match="the scheduler is EDMEulerScheduler"):
        StableDiffusionXL(str(folder))
