"""Backbones: loading, conditioning, latents, trainable parameters, full-size shapes, sampling."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from lit_align.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_align.backbones.encoders import to_pixels
from lit_align.backbones.sampling import generate
from lit_align.types import PairInfo, PreferenceBatch
from tests.support.paths import PAIRS, PIPELINE
from tests.support.published_unets import PUBLISHED

PROMPTS = ["strawberry", "", "red apple"]


@pytest.fixture(scope="module")
def sdxl():
    return StableDiffusionXL(str(PIPELINE))


@pytest.fixture(scope="module")
def images():
    from lit_align.data import PreferenceDataModule

    data = PreferenceDataModule("x", str(PAIRS / "held_out/00000.tar"), resolution=32, batch_size=8, num_workers=0)
    data.setup("validate")
    return next(iter(data.val_dataloader())).rejected


@pytest.mark.parametrize(
    ("name", "parameters"), [("SDXL", 2_567_463_684), ("SD1.5", 859_520_964), ("SD2.1", 865_910_724)]
)
def test_full_size_unets_have_the_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[name])
    assert sum(p.numel() for p in unet.parameters()) == parameters
    if name == "SDXL":
        unet.add_adapter(LoRA().config())
        trainable = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        assert trainable == 11_612_160  # rank 8 on four projections of 140 attention layers


def test_sdxl_conditioning_is_the_pipelines(sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
    ours = sdxl.encode_prompts(PROMPTS)
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        _, negative, _, negative_pooled = pipeline.encode_prompt(PROMPTS, negative_prompt=None)
    kept = [0, 2]
    assert torch.equal(ours["hidden"][kept], hidden[kept])
    assert torch.equal(ours["pooled"][kept], pooled[kept])
    assert torch.equal(ours["hidden"][1], negative[1])  # zeros, as the pipeline's config says
    assert torch.equal(ours["pooled"][1], negative_pooled[1])


def test_sd_conditioning_is_the_pipelines(sd15):
    backbone, pipeline = StableDiffusion(str(sd15)), StableDiffusionPipeline.from_pretrained(sd15)
    with torch.no_grad():
        hidden, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(backbone.encode_prompts(PROMPTS)["hidden"], hidden)


def test_sdxl_is_conditioned_on_time_ids(sdxl):
    """As in the pipeline, without rounding."""
    latents, times = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    conditioning = sdxl.encode_prompts(["strawberry", "fox"])
    time_ids = torch.tensor([[683, 1001, 0, 3, 32, 32], [32, 32, 0, 0, 32, 32]])
    with torch.no_grad():
        ours = sdxl.denoise(latents, times, conditioning, time_ids)
        added = {"text_embeds": conditioning["pooled"], "time_ids": time_ids.float()}
        theirs = sdxl.denoiser(latents, times, conditioning["hidden"], added_cond_kwargs=added).sample
        moved = sdxl.denoise(latents, times, conditioning, time_ids + 1)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, moved)


def test_latents_are_standardised_and_decode_to_the_images(sdxl, images):
    latents = sdxl.encode_images(images)
    assert latents.shape == (8, *sdxl.latent_shape(32, 32)) == (8, 4, 16, 16)
    assert 0.7 < latents.std() < 1.3
    restored = sdxl.decode_latents(latents)
    assert restored.dtype == torch.uint8
    assert (restored.float() - images.float()).abs().mean() < 8  # of 255
    sampled = sdxl.encode_images(images, torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)))
    assert 0 < (sampled - latents).abs().mean() < 0.1


def test_values_become_the_nearest_pixel():
    """0.003 is 127.88 of 255."""
    assert to_pixels(torch.tensor([-2.0, -1.0, 0.003, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_per_channel_statistics_of_a_vae_are_applied(sdxl, images):
    plain = sdxl.encode_images(images)
    restored = sdxl.decode_latents(plain)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    sdxl.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    try:
        changed = sdxl.encode_images(images)
        expected = (plain - torch.tensor(mean).view(1, 4, 1, 1)) * 0.5 / torch.tensor(std).view(1, 4, 1, 1)
        torch.testing.assert_close(changed, expected)
        assert (sdxl.decode_latents(changed).float() - restored.float()).abs().max() <= 1
    finally:
        sdxl.vae.register_to_config(latents_mean=None, latents_std=None, scaling_factor=1.0)


def test_only_the_denoiser_is_trained_and_frozen_parts_stay_in_eval_mode(sdxl):
    assert {name.split(".")[0] for name in sdxl.trainable_parameters()} == {"denoiser"}
    assert len(sdxl.trainable_parameters()) == len(list(sdxl.denoiser.parameters()))
    sdxl.train()
    assert sdxl.denoiser.training
    assert not sdxl.vae.training
    assert not any(module.training for module in sdxl.text_encoders.modules())
    sdxl.eval()
    assert not sdxl.denoiser.training


def test_a_lora_starts_at_the_base_model_and_only_it_is_trained(sdxl):
    torch.manual_seed(0)
    lora = StableDiffusionXL(str(PIPELINE), lora=LoRA(rank=4, alpha=8, target_modules=["to_q", "to_v"]))
    names = lora.trainable_parameters()
    assert len(names) == 2 * 2 * 2 * sum(1 for name, _ in sdxl.denoiser.named_modules() if name.endswith("attn1"))
    assert all(".to_q.lora_" in name or ".to_v.lora_" in name for name in names)
    args = [torch.randn(1, 4, 16, 16), torch.tensor([500]), sdxl.encode_prompts(["fox"])]
    time_ids = torch.tensor([[32, 32, 0, 0, 32, 32]])
    with torch.no_grad():
        assert torch.equal(lora.denoise(*args, time_ids), sdxl.denoise(*args, time_ids))
    scales = [layer.scaling["default"] for layer in lora.denoiser.modules() if hasattr(layer, "scaling")]
    assert set(scales) == {8 / 4}  # alpha over rank
    first = torch.cat([weight.flatten() for name, weight in names.items() if ".lora_A." in name])
    assert first.std().item() == pytest.approx(1 / 4, rel=0.05)  # Gaussian, of deviation 1 / rank


def test_frozen_parts_have_the_compute_precision_and_the_vae_its_own():
    backbone = StableDiffusionXL(str(PIPELINE), lora=LoRA(), vae_precision="bf16")
    backbone.cast_frozen(torch.float16)
    assert {p.dtype for p in backbone.text_encoders.parameters()} == {torch.float16}
    assert {p.dtype for p in backbone.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in backbone.trainable_parameters().values()} == {torch.float32}
    assert {p.dtype for p in backbone.denoiser.parameters()} == {torch.float16, torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vae_keeps_its_precision_under_autocast(images, precision):
    backbone = StableDiffusionXL(str(PIPELINE), vae_precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        inside, text = backbone.encode_images(images), backbone.encode_prompts(["fox"])
    assert torch.equal(inside, backbone.encode_images(images))
    assert inside.dtype == torch.float32
    for name, value in backbone.encode_prompts(["fox"]).items():
        assert torch.equal(text[name], value)


def test_the_empty_prompt_follows_the_precision():
    encoders = StableDiffusionXL(str(PIPELINE))
    encoders.load_encoders()
    for dtype in (torch.float32, torch.bfloat16):
        encoders.cast_frozen(dtype)
        encoded = encoders.encode_prompts([""])
        for name, value in encoders.empty_conditioning().items():
            assert value.dtype == dtype
            assert torch.equal(value, encoded[name])


def test_each_distinct_prompt_of_a_batch_is_encoded_once(sdxl, images):
    prompts, seen = ["fox", "red apple", "fox", "fox"], []
    pixels, ids = images[:4].unsqueeze(1).repeat(1, 2, 1, 1, 1), torch.zeros(4, 2, 6).long()
    ones = torch.ones(4)
    info = PairInfo(list(range(4)), ones, ones < 0, ones.long(), ones, ones, False)
    hook = sdxl.text_encoders[1].register_forward_hook(lambda _, inputs, output: seen.append(len(output.text_embeds)))
    try:
        found = sdxl.encode(PreferenceBatch(pixels, ids, prompts, info)).conditioning
    finally:
        hook.remove()
    assert seen[0] == 2
    distinct = sdxl.encode_prompts(["fox", "red apple"])
    together = sdxl.encode_prompts(prompts)
    for name, value in found.items():
        assert torch.equal(value, distinct[name][[0, 1, 0, 0]])
        torch.testing.assert_close(value, together[name], rtol=1e-5, atol=1e-5)


def test_empty_prompts_that_are_zeros_run_no_encoder(sdxl):
    hooks = [encoder.register_forward_hook(lambda *_: pytest.fail("ran")) for encoder in sdxl.text_encoders]
    try:
        empty = sdxl.encode_prompts(["", ""])
    finally:
        for hook in hooks:
            hook.remove()
    for name, value in sdxl.encode_prompts(["", "fox"]).items():
        assert empty[name].dtype == value.dtype
        assert torch.equal(empty[name], torch.zeros_like(value))


def test_vae_from_another_folder():
    backbone = StableDiffusionXL(str(PIPELINE), vae_repo=str(PIPELINE / "vae"), vae_slicing=True)
    assert backbone.vae.use_slicing
    assert torch.equal(backbone.vae.quant_conv.weight, StableDiffusionXL(str(PIPELINE)).vae.quant_conv.weight)


def test_variant_files_are_loaded_and_train_in_float32(sd15, tmp_path):
    StableDiffusionPipeline.from_pretrained(sd15, dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors").exists()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        StableDiffusion(str(tmp_path))
    backbone = StableDiffusion(str(tmp_path), variant="fp16")
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_gradient_checkpointing_does_not_change_gradients(sdxl):
    gradients = []
    for checkpointing in (False, True):
        backbone = StableDiffusionXL(str(PIPELINE), gradient_checkpointing=checkpointing).train()
        assert backbone.denoiser.is_gradient_checkpointing == checkpointing
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, 16, 16, generator=generator)
        conditioning = backbone.encode_prompts(["fox", "tulip"])
        time_ids = torch.tensor([[32, 32, 0, 0, 32, 32]]).repeat(2, 1)
        backbone.denoise(latents, torch.tensor([10, 900]), conditioning, time_ids).square().mean().backward()
        gradients.append({name: p.grad for name, p in backbone.trainable_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_prediction_type_comes_from_the_scheduler(sd15, sd21):
    assert StableDiffusion(str(sd15)).schedule.prediction_type == "epsilon"
    assert StableDiffusion(str(sd21)).schedule.prediction_type == "v_prediction"


def test_a_pipeline_of_another_kind_is_refused(sd15):
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline, but StableDiffusionXL needs"):
        StableDiffusionXL(str(sd15))
    with pytest.raises(ValueError, match="holds a StableDiffusionXLPipeline, but StableDiffusion needs"):
        StableDiffusion(str(PIPELINE))


def test_sampling_depends_on_the_seed_and_restores_state(sdxl):
    sdxl.train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    both = generate(sdxl, ["fox", "tulip"], [0, 5], 32, 32, steps=3)
    alone = generate(sdxl, ["tulip"], [5], 32, 32, steps=3)
    assert both.shape == (2, 3, 32, 32)
    assert (both[1].int() - alone[0].int()).abs().max() <= 1
    assert torch.equal(torch.get_rng_state(), state)
    assert sdxl.denoiser.training
    assert not sdxl.vae.training


def test_sampling_equals_the_diffusers_pipeline(sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        "fox", latents=noise, num_inference_steps=3, guidance_scale=5.0, height=32, width=32, output_type="np"
    ).images
    ours = generate(sdxl, ["fox"], [3], 32, 32, steps=3, guidance_scale=5.0)
    difference = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255 - ours.float()
    assert difference.abs().max() <= 1
