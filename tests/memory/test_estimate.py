"""The estimate of a training step's memory, against real runs on the CPU."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from diffusers import UNet2DConditionModel
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.backbones.attention import use_kernel
from lit_align.backbones.loading.meta import shapes_only
from lit_align.backbones.sharding import shard_denoiser
from lit_align.callbacks.start_banner import StartBanner, memory_line
from lit_align.memory import Shares, Work, estimate, measure_optimizer, weigh
from lit_align.memory.autocast import MetaAutocast
from lit_align.memory.live import LiveBytes, count_saved
from lit_align.memory.main_memory import MeasuredOffload
from lit_align.memory.optimizer_bytes import tensors
from lit_align.memory.shares import layers_in_use
from lit_align.objectives import DiffusionDPO, MaPO
from lit_align.training.module import AlignmentModule
from lit_align.training.precisions import COMPUTE_DTYPES
from tests.support.paths import PIPELINE
from tests.support.pipelines import small_sdxl
from tests.support.published_unets import PUBLISHED
from tests.support.runs import fit, make_data

MODULE = ("attention", "compensate_rounding")  # arguments of the module; others are the backbone's


def make(lora=None, objective=None, optimizer=torch.optim.AdamW, checkpointing=False, repo=None, **options):
    module = {name: options.pop(name) for name in MODULE if name in options}
    backbone = StableDiffusionXL(str(repo or small_sdxl()), lora=lora, gradient_checkpointing=checkpointing, **options)
    return AlignmentModule(backbone, objective or MaPO(), optimizer=optimizer, **module)


def guess(precision="32-true", batch_size=2, encoded=False, shares=None, device="cpu", **options):
    with shapes_only():
        return estimate(make(**options), Work(device, precision, batch_size, 32, 32, encoded, shares or Shares()))


class Weigh(L.Callback):
    """Weighs a module's tensors in a real run, after the backward pass of the second step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step != 1:
            return
        backbone = pl_module.backbone
        self.parameters = {name: value.nbytes for name, value in backbone.named_parameters()}
        self.buffers = sum(value.nbytes for value in backbone.buffers())
        self.gradients = sum(p.grad.nbytes for p in backbone.parameters() if p.grad is not None)
        self.state = sum({t.untyped_storage()._cdata: t.nbytes for t in tensors(optimizer.state)}.values())
        self.reference = sum(value.nbytes for value in backbone.reference_weights().values())


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "32-true"),
        ({"optimizer": AdamW8bit}, "bf16-true"),
        ({"optimizer": AdamW8bit, "compensate_rounding": True}, "bf16-true"),
        ({"objective": DiffusionDPO(), "compensate_rounding": True}, "bf16-true"),
        ({"lora": LoRA(rank=2)}, "bf16-mixed"),
        ({"lora": LoRA(rank=2, base="nf4")}, "bf16-mixed"),
        ({"objective": DiffusionDPO()}, "bf16-mixed"),
        ({"objective": DiffusionDPO(), "lora": LoRA(rank=2)}, "32-true"),
    ],
    ids=["full", "8bit", "8bit-compensated", "reference-compensated", "lora", "nf4", "reference", "lora-reference"],
)
def test_memory_between_steps_equals_that_of_a_real_run(tmp_path, options, precision):
    seen, found = Weigh(), guess(precision, **options)
    fit(make(**options), make_data(), tmp_path, 2, callbacks=[seen], precision=precision)
    assert found.weights.parameters == sum(seen.parameters.values()) + seen.buffers
    assert found.weights.reference == seen.reference
    assert (seen.reference > 0) == ("objective" in options)
    assert found.weights.gradients == seen.gradients
    assert found.optimizer.state == seen.state
    trained = sum(size for name, size in seen.parameters.items() if ".lora_" in name or "lora" not in options)
    assert found.weights.trained <= trained


def test_cached_runs_hold_no_encoders():
    cached, images = guess(encoded=True), guess()
    assert cached.weights.encoders == 0
    module = make()
    module.backbone.load_encoders()
    parts = [module.backbone.vae, module.backbone.text_encoders]
    loaded = sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))
    assert images.weights.encoders == loaded > 0
    assert cached.saved == images.saved
    assert set(images.stages) - set(cached.stages) == {"VAE", "text encoders"}


def real_step(module, batch_size, precision, gathered=False, offload=False):
    """Measure the bytes that autograd saves in a real forward pass, and the peak of forward and backward.

    Args:
        gathered: whether the denoiser's weights are in the compute precision.
        offload: whether saved tensors wait where they are not counted.
    """
    backbone, dtype = module.backbone, COMPUTE_DTYPES.get(precision, torch.float32)
    module.train()
    backbone.cast_frozen(dtype)
    if gathered:
        backbone.denoiser.to(dtype)
    trained = list(backbone.trainable_parameters().values())
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    once = backbone.encode_prompts(["a fox"] * (2 * batch_size))
    with LiveBytes([*backbone.parameters(), *backbone.buffers(), *(p.grad for p in trained)]) as live:
        latents = torch.randn(2 * batch_size, *backbone.latent_shape(32, 32))
        timesteps, geometry = torch.zeros(2 * batch_size).long(), torch.zeros(2 * batch_size, 6).long()
        cast = torch.autocast("cpu", dtype) if precision.endswith("mixed") else nullcontext()
        cpu = torch.device("cpu")
        moving = MeasuredOffload(backbone.denoiser, cpu, live, home=cpu).counted() if offload else None
        with cast, moving or count_saved(backbone.parameters()) as saved:
            errors = backbone.denoise(latents, timesteps, once, geometry).float().square().mean()
            bytes_saved = saved()
        errors.backward()
    return bytes_saved, live.peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("batch_size", "precision", "lora"),
    [(1, "32-true", None), (4, "32-true", LoRA()), (4, "bf16-mixed", None)],
    ids=["1", "lora-4", "bf16-4"],
)
def test_activations_equal_those_of_a_real_step(batch_size, precision, lora, checkpointing):
    found = guess(precision, batch_size, lora=lora, checkpointing=checkpointing)
    saved, peak = real_step(make(lora=lora, checkpointing=checkpointing), batch_size, precision)
    assert found.saved == (saved if precision == "32-true" else pytest.approx(saved, rel=0.01))
    assert found.stages["policy"] == pytest.approx(peak, rel=0.1)
    assert (found.saved < 0.6 * found.stages["policy"]) == checkpointing


@pytest.mark.parametrize(
    ("precision", "lora"), [("32-true", None), ("32-true", LoRA()), ("bf16-mixed", None)], ids=["full", "lora", "bf16"]
)
def test_selective_checkpointing_lies_between(precision, lora):
    plain, found, full = (guess(precision, 4, lora=lora, checkpointing=way) for way in (False, "selective", True))
    saved, peak = real_step(make(lora=lora, checkpointing="selective"), 4, precision)
    assert found.saved == (saved if precision == "32-true" else pytest.approx(saved, rel=0.01))
    assert found.stages["policy"] == pytest.approx(peak, rel=0.1)
    assert 1.2 * full.saved < found.saved < 0.8 * plain.saved
    assert full.stages["policy"] < found.stages["policy"] < plain.stages["policy"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [None, LoRA()], ids=["full", "lora"])
def test_activations_in_main_memory_are_not_the_devices(lora, checkpointing):
    """Kernels of attention differ between devices, and what they save with them."""
    options = {"lora": lora, "checkpointing": checkpointing, "device": "cuda", "batch_size": 4}
    plain, found = guess(**options), guess(activation_offload=True, **options)
    assert (plain.waiting, found.waiting) == (0, found.saved)
    assert found.saved == plain.saved
    saved, peak = real_step(make(lora=lora, checkpointing=checkpointing), 4, "32-true", offload=True)
    assert found.saved == pytest.approx(saved, rel=0.05)
    assert found.stages["policy"] == pytest.approx(peak, rel=0.1)
    assert found.stages["policy"] < plain.stages["policy"] - 0.5 * plain.saved
    on_cpu = guess(activation_offload=True, **options | {"device": "cpu"})
    assert on_cpu == guess(**options | {"device": "cpu"})


def test_attention_without_a_fused_kernel_keeps_its_matrix():
    fused, whole = (guess(batch_size=4, attention=kernel) for kernel in ("flash", "math"))
    module = make()
    use_kernel(module.backbone, "math")
    saved, peak = real_step(module, 4, "32-true")
    assert fused.saved == guess(batch_size=4).saved < whole.saved == saved
    assert whole.stages["policy"] == pytest.approx(peak, rel=0.1)


def test_meta_autocast_follows_the_device():
    norm, layer = nn.GroupNorm(2, 4, device="meta"), nn.Linear(4, 4, device="meta")
    half = torch.empty(1, 4, device="meta", dtype=torch.bfloat16)
    with MetaAutocast("cuda", torch.bfloat16) as cast:
        assert norm(half).dtype == torch.float32  # in float32 on a GPU
        assert layer(half.float()).dtype == (half.float() @ half.T).dtype == torch.bfloat16
        assert layer(layer(half)).dtype == torch.bfloat16
        assert torch.cat([half, half.float()]).dtype == torch.float32
        assert len(cast.weights) == 2  # weight and bias, cast once
        cast.end_forward()
        assert not cast.weights
    with MetaAutocast("cpu", torch.bfloat16):
        assert norm(half).dtype == torch.bfloat16


def test_shares_of_each_strategy():
    whole = weigh(make().backbone)._replace(encoders=1000)
    ddp, fsdp = Shares.of("ddp", 4), Shares.of("fsdp2", 4)
    assert (ddp.of_weights(whole), ddp.buckets(whole), ddp.of_optimizer(80)) == (whole, whole.gradients, 80)
    assert fsdp.of_weights(whole).gradients == whole.gradients // 4
    assert fsdp.of_optimizer(80) == 20
    assert fsdp.buckets(whole) == 0
    assert fsdp.of_weights(whole).trained == whole.trained // 4
    assert fsdp.of_weights(whole).encoders == 1000  # they load after the model is sharded
    zero2 = Shares.of("zero2", 4)
    assert zero2.of_weights(whole) == fsdp.of_weights(whole)
    sharded, kept = guess(shares=fsdp), guess(shares=zero2)
    assert kept.stages["policy"] - sharded.stages["policy"] == whole.trained - 4 * layers_in_use(
        make().backbone.denoiser
    )
    assert kept.standing == sharded.standing
    assert Shares.of("ddp", 1) == Shares.of("auto", 1) == Shares()
    assert Shares.of("ddp", 4, bucket_view=True).buckets(whole) == 0
    assert not Shares.of("somebody's", 2).known
    found = guess(shares=ddp)
    assert found.standing == found.weights.parameters + 2 * found.weights.gradients + found.optimizer.state


def test_layers_in_use_follow_the_parts_that_are_sharded(monkeypatch):
    parts, denoiser = [], make().backbone.denoiser
    monkeypatch.setattr("lit_align.backbones.sharding.fully_shard", lambda module, **_: parts.append(module))
    shard_denoiser(denoiser, None, None)
    assert len(parts) > 5
    own, claimed = {}, set()
    for part in parts:  # inner ones first, as fully_shard requires
        weights = {id(weight): weight.numel() for weight in part.parameters() if id(weight) not in claimed}
        own[part], claimed = sum(weights.values()), claimed | set(weights)
    within = [sum(own[outer] for outer in parts if part in set(outer.modules())) for part in parts]
    assert layers_in_use(denoiser) == max(within)
    assert sum(own.values()) == sum(weight.numel() for weight in denoiser.parameters()) > 2 * max(within)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_weights_gathered_in_bfloat16_count_once(checkpointing):
    """Activations equal those of a model in bfloat16, which autocast does not cast; its weights are added by hand."""
    options = {"checkpointing": checkpointing, "objective": DiffusionDPO()}
    module = make(**options)
    saved, peak = real_step(module, 4, "bf16-mixed", gathered=True)
    weights = sum(weight.numel() for weight in module.backbone.denoiser.parameters())
    layers = layers_in_use(module.backbone.denoiser)
    kept, sharded = (guess("bf16-mixed", 4, shares=Shares.of(name, 4), **options) for name in ("zero2", "fsdp2"))
    assert kept.saved == sharded.saved == pytest.approx(saved, rel=0.05)
    assert kept.stages["policy"] - 2 * weights == sharded.stages["policy"] - 2 * layers == pytest.approx(peak, rel=0.05)
    assert kept.stages["reference"] == sharded.stages["reference"] > 2 * layers


@pytest.fixture(scope="session")
def full_sdxl(tmp_path_factory):
    """Configs of a pipeline with SDXL's UNet, text encoders and VAE in their published sizes, without weights."""
    folder = tmp_path_factory.mktemp("full") / "sdxl"
    shutil.copytree(PIPELINE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.device("meta"):
        UNet2DConditionModel(**PUBLISHED["SDXL"]).save_config(folder / "unet")
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
    vae |= {f"{side}_block_types": [f"{kind}coderBlock2D"] * 4 for side, kind in (("down", "DownEn"), ("up", "UpDe"))}
    changes = {"text_encoder": base, "text_encoder_2": large | {"projection_dim": 1280}, "vae": vae}
    for part, change in changes.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


def test_full_size_sdxl_is_measured_without_weights(full_sdxl):
    with shapes_only():
        module = make(repo=full_sdxl, optimizer=AdamW8bit)
    weights = weigh(module.backbone)
    assert weights.trained == weights.gradients == 4 * 2_567_463_684
    state = measure_optimizer(AdamW8bit, list(module.backbone.trainable_parameters().values()), foreach=True).state
    assert 2 * 2_567_463_684 < state < 2.05 * 2_567_463_684


def test_the_banner_on_a_gpu_shows_the_memory_between_steps():
    module, found = make(), guess()
    module.backbone.load_encoders()
    assert memory_line(module, Shares.of("ddp", 2), 24 * 10**9) == (
        f"  memory      {(found.standing + found.weights.gradients) / 1e9:.2f} of 24.0 GB a device: "
        f"parameters {found.weights.parameters / 1e9:.2f} + gradients {found.weights.gradients / 1e9:.2f} + "
        f"buckets {found.weights.gradients / 1e9:.2f} + optimizer {found.optimizer.state / 1e9:.2f}, and activations"
    )


@pytest.mark.parametrize("view", [True, False])
def test_the_banner_reads_bucket_views_from_ddp(monkeypatch, view):
    module = make()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**10))
    strategy = DDPStrategy(gradient_as_bucket_view=view)
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cuda:0"))
    trainer = SimpleNamespace(strategy=strategy, world_size=2)
    (line,) = StartBanner()._memory(trainer, module)
    assert ("buckets" in line) != view
