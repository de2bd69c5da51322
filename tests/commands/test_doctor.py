"""`lit-align doctor`: its estimate against real runs on the CPU, and what it says of configs, whole and broken."""

import json
import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from bitsandbytes.optim import AdamW8bit
from diffusers import UNet2DConditionModel
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.backbones.loading.meta import shapes_only
from lit_align.backbones.sharding import shard_denoiser
from lit_align.callbacks.start_banner import StartBanner, memory_line
from lit_align.cli import main
from lit_align.memory import Shares, Work, estimate, measure_optimizer, weigh
from lit_align.memory.autocast import MetaAutocast
from lit_align.memory.live import LiveBytes, count_saved
from lit_align.memory.optimizer_bytes import tensors
from lit_align.memory.shares import layers_in_use
from lit_align.objectives import DiffusionDPO, MaPO
from lit_align.scoring.base import Scorer
from lit_align.training.module import COMPUTE_DTYPES, AlignmentModule
from tests.support.configs import CONFIGS, small_options
from tests.support.paths import PAIRS, PIPELINE, ROOT
from tests.support.pipelines import small_sdxl
from tests.support.published_unets import PUBLISHED
from tests.support.runs import fit, make_data

QUICKSTART = "--config=configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def _in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def make(lora=None, objective=None, optimizer=torch.optim.AdamW, checkpointing=False, repo=None):
    backbone = StableDiffusionXL(str(repo or small_sdxl()), lora=lora, gradient_checkpointing=checkpointing)
    return AlignmentModule(backbone, objective or MaPO(), optimizer=optimizer)


def guess(precision="32-true", batch_size=2, encoded=False, shares=None, **options):
    with shapes_only():
        return estimate(make(**options), Work("cpu", precision, batch_size, 32, 32, encoded, shares or Shares()))


# -- the estimate against real runs


class Weigh(L.Callback):
    """Bytes of a running module's tensors, after the backward pass of the second step."""

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
        ({"lora": LoRA(rank=2)}, "bf16-mixed"),
        ({"objective": DiffusionDPO()}, "bf16-mixed"),
        ({"objective": DiffusionDPO(), "lora": LoRA(rank=2)}, "32-true"),
    ],
    ids=["full", "8bit", "lora", "reference", "lora-reference"],
)
def test_what_stands_between_steps_is_that_of_a_real_run(tmp_path, options, precision):
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


def real_step(module, batch_size, precision, gathered=False):
    """Bytes that autograd saves in a real forward pass, and the peak of forward and backward.

    With `gathered` weights are in the compute precision.
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
        with cast, count_saved(backbone.parameters()) as saved:
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
def test_activations_are_those_of_a_real_step(batch_size, precision, lora, checkpointing):
    found = guess(precision, batch_size, lora=lora, checkpointing=checkpointing)
    saved, peak = real_step(make(lora=lora, checkpointing=checkpointing), batch_size, precision)
    assert found.saved == (saved if precision == "32-true" else pytest.approx(saved, rel=0.01))
    assert found.stages["policy"] == pytest.approx(peak, rel=0.1)
    assert (found.saved < 0.6 * found.stages["policy"]) == checkpointing


def test_autocast_of_the_meta_device_follows_the_device():
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


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, momentum=0.9), 4 * (10_000 + 30)),
        (torch.optim.AdamW, 8 * (10_000 + 30) + 2 * 4),
        (lambda p, fused=True: torch.optim.AdamW(p, fused=fused), 8 * (10_000 + 30) + 2 * 4),
        (torch.optim.Adafactor, 4 * (200 + 30) + 2 * 4),  # rows and columns of a matrix, all of a vector
        (AdamW8bit, 2 * 10_000 + 2 * 4 * 40 + 8 * 30 + 2 * 1024),  # a scale for each 256; two maps of 256 numbers
        (lambda p: torch.optim.LBFGS(p), None),
    ],
    ids=["sgd", "momentum", "adamw", "fused", "adafactor", "8bit", "unknown"],
)
def test_optimizers_say_what_they_keep(optimizer, state):
    found = measure_optimizer(optimizer, [torch.zeros(100, 100), torch.zeros(30)], foreach=True)
    assert (found and found.state) == state


def test_a_step_on_all_tensors_at_a_time_needs_a_copy_of_them():
    weights = [torch.zeros(100, 100)] * 5
    assert measure_optimizer(torch.optim.AdamW, weights, foreach=True).step == 5 * 40_000
    assert measure_optimizer(torch.optim.AdamW, weights, foreach=False).step <= 3 * 40_000


def test_what_a_strategy_divides():
    whole = weigh(make().backbone)._replace(encoders=1000)
    ddp, fsdp = Shares.of("ddp", 4), Shares.of("fsdp2", 4)
    assert (ddp.of_weights(whole), ddp.buckets(whole), ddp.of_optimizer(80)) == (whole, whole.gradients, 80)
    assert fsdp.of_weights(whole).gradients == whole.gradients // 4
    assert fsdp.of_optimizer(80) == 20
    assert fsdp.buckets(whole) == 0
    assert fsdp.of_weights(whole).trained == whole.trained // 4
    assert fsdp.of_weights(whole).encoders == 1000  # they load after the model has been spread
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


def test_layers_in_use_are_those_that_are_sharded_together(monkeypatch):
    parts, denoiser = [], make().backbone.denoiser
    monkeypatch.setattr("lit_align.backbones.sharding.fully_shard", lambda module, **_: parts.append(module))
    shard_denoiser(denoiser, None, None)
    assert len(parts) > 5
    own, claimed = {}, set()
    for part in parts:  # inner ones first, as fully_shard wants them
        weights = {id(weight): weight.numel() for weight in part.parameters() if id(weight) not in claimed}
        own[part], claimed = sum(weights.values()), claimed | set(weights)
    within = [sum(own[outer] for outer in parts if part in set(outer.modules())) for part in parts]
    assert layers_in_use(denoiser) == max(within)
    assert sum(own.values()) == sum(weight.numel() for weight in denoiser.parameters()) > 2 * max(within)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_what_is_gathered_in_bfloat16_is_counted_once(checkpointing):
    """Activations are those of a model in bfloat16, which autocast does not cast; its weights come on top by hand."""
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
    """The configs of a pipeline with SDXL's UNet, text encoders and VAE in their published sizes, and no weights."""
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


def test_full_size_is_weighed_without_weights(full_sdxl):
    with shapes_only():
        module = make(repo=full_sdxl, optimizer=AdamW8bit)
    weights = weigh(module.backbone)
    assert weights.trained == weights.gradients == 4 * 2_567_463_684
    state = measure_optimizer(AdamW8bit, list(module.backbone.trainable_parameters().values()), foreach=True).state
    assert 2 * 2_567_463_684 < state < 2.05 * 2_567_463_684


def test_banner_on_a_gpu_says_what_stands_between_steps():
    module, found = make(), guess()
    module.backbone.load_encoders()
    assert memory_line(module, Shares.of("ddp", 2), 24 * 10**9) == (
        f"  memory      {(found.standing + found.weights.gradients) / 1e9:.2f} of 24.0 GB a device: "
        f"parameters {found.weights.parameters / 1e9:.2f} + gradients {found.weights.gradients / 1e9:.2f} + "
        f"buckets {found.weights.gradients / 1e9:.2f} + optimizer {found.optimizer.state / 1e9:.2f}, and activations"
    )


# -- the command


def visit(capsys, *words):
    """Exit code and report of a visit."""
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *map(str, words)])
    return exit_.value.code, capsys.readouterr().out


def test_quickstart_is_fit(capsys):
    code, report = visit(capsys, QUICKSTART)
    assert code == 0
    assert report.endswith("no errors: fit would start\n")
    for line in (
        f"torch {torch.__version__}, lightning {L.__version__}",
        "trainer.accelerator cpu, devices 1: 1 x cpu with ",
        "StableDiffusionXL from assets/emoji/pipeline",
        "unet: 8.3 MB in assets/emoji/pipeline/unet",
        "208 pairs in 8 shards, 0 of them with an index; left out: 0 ties, 0 broken samples",
        "an epoch: 13 batches a device; 0 pairs are left over",
        "72 pairs in 3 shards",
        "objective   MaPO (released form): mean(L_w) - 0.1 mean(",
        "trainable   4,115,652 of 4,115,652 parameters",
        "batch       16 pairs a step = 16 a device x 1 accumulated x 1 devices",
        "until       200 optimizer steps, 3,200 pairs, 15.4 epochs",
        "parameters   20.9 MB: trained 16.5 MB, encoders 4.5 MB",
        "gradients    16.5 MB",
        "optimizer    32.9 MB",
    ):
        assert line in report
    assert "fits" in report
    assert "what to change" not in report


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_configs_are_looked_at(config, tmp_path, sd15, sd21, capsys):
    code, report = visit(capsys, *small_options(config, tmp_path, sd15, sd21), "--memory=24")
    assert (code, report.count("fits\n")) == (0, 1), report
    assert ("reference   " in report) == ("dpo" in config.stem)
    assert "of 24.00 GB a device: fits" in report


def test_all_errors_are_told_at_once_and_the_rest_is_there(capsys, tmp_path):
    code, report = visit(
        capsys,
        QUICKSTART,
        "--model.backbone.class_path=StableDiffusion",
        "--model.backbone.init_args.repo=assets/emoji/pipeline",
        "--data.train_shards=pairs/nowhere/*.tar",
        f"--ckpt_path={tmp_path}/last.ckpt",
        "--trainer.accelerator=gpu",
    )
    assert code == 1
    assert report.endswith("4 errors: fit would not run\n")
    assert "Override trainer.accelerator and trainer.devices" in report
    assert "last.ckpt' does not exist. Name a checkpoint, or leave ckpt_path out to start a new run." in report
    assert "holds a StableDiffusionXLPipeline, but StableDiffusion needs a StableDiffusionPipeline" in report
    assert "training pairs: 'pairs/nowhere/*.tar': there is no file" in report
    assert "72 pairs in 3 shards" in report
    assert "objective   MaPO" in report
    assert "cannot be estimated until the pipeline's configs are on this machine: correct model.backbone" in report


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ["trainer.accelerator=gpu", "data.batch_size=300", "model.objective=BalancedDPO", "trainer.precision=64"],
            [
                "Override trainer.accelerator and trainer.devices, or give --memory to check for GPUs",
                "fewer than one batch of data.batch_size 300 on each of 1 devices. Lower data.batch_size or",
                "BalancedDPO learns from votes, but data.vote is not set. Set it, or choose DiffusionDPO",
            ],
        ),
        (
            [
                "model.backbone.repo=./nowhere",
                "data.vote.voters=[hpsv2.1]",
                "data.train_cache={tmp}/train",
                "data.val_cache={tmp}/val",
            ],
            [
                "'./nowhere' is neither a folder nor a hub id (OWNER/NAME). Correct the path",
                "There are no scores by 'hpsv2.1' for",
                "/train is no cache: it has no fingerprint.json. Make one with lit-align encode",
                "/val is no cache: it has no fingerprint.json. Make one with lit-align encode",
            ],
        ),
        (
            ["model.backbone.repo=owner/name", "data.flip_probability=2"],
            [
                "HF_HUB_OFFLINE forbids a download. Unset it, or run on a machine with a network: hf download owner/",
                "data.flip_probability is 2.0; it must lie between 0 and 1",
            ],
        ),
    ],
    ids=["settings", "files", "values"],
)
def test_errors_name_their_remedies(capsys, tmp_path, words, messages):
    code, report = visit(capsys, QUICKSTART, *(f"--{word}".replace("{tmp}", str(tmp_path)) for word in words))
    for message in messages:
        assert message in report, report
    assert code == 1
    assert report.count("\n  - ") >= len(messages)


def test_missing_weights_are_told_and_the_memory_all_the_same(capsys, tmp_path):
    shutil.copytree(PIPELINE, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    words = [f"--model.backbone.repo={tmp_path / 'bare'}", "--model.backbone.lora.rank=2"]
    code, report = visit(capsys, QUICKSTART, *words, "--memory=24", "--model.backbone.vae_precision=fp16")
    assert code == 1
    for part in ("unet holds no diffusion_pytorch_model", "vae holds no diff", "text_encoder holds", "encoder_2 holds"):
        assert part in report
    assert "2 tokenizers" in report
    assert "trainable   16,384 of 4,132,036 parameters" in report
    assert "of 24.00 GB a device: fits" in report
    assert "says force_upcast, for its activations overflow in fp16" in report


def test_caches_are_looked_at_one_by_one(capsys, tmp_path):
    cache, shards = tmp_path / "cache", f"{PAIRS}/train/00000.tar"
    words = [QUICKSTART, f"--data.train_shards={shards}", f"--data.val_shards={shards}"]
    main(["encode", *words, "--split=train", f"--output={cache}", "--accelerator=cpu"])
    words += [f"--data.train_cache={cache}", f"--data.val_cache={cache}"]
    code, report = visit(capsys, *words)
    assert code == 0, report
    for split in ("train", "val"):
        assert f"{split}: {cache} fits resolution, shards and encoders" in report
    assert "encoders 4.5 MB" not in report
    report = visit(capsys, *words, "--data.val_cache=nowhere")[1]
    assert f"train: {cache} fits resolution" in report
    assert "caches: nowhere is no cache" in report
    assert "or go back to the old values" in visit(capsys, *words, "--data.resolution=64")[1]


def test_a_pipeline_that_is_not_here_is_not_estimated(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    code, report = visit(capsys, QUICKSTART, "--model.backbone.repo=owner/name")
    assert "owner/name is not in the local cache; fit would download it" in report
    assert "until the pipeline's configs are on this machine: hf download owner/name --include '*.json'" in report
    assert code == 0


def test_a_reference_that_nobody_has_cannot_be_moved(capsys):
    words = ["--config=configs/quickstart_balanced_dpo.yaml", "--model.objective=MaPO"]
    code, report = visit(capsys, *words)
    assert "ReferenceUpdate has nothing to move: MaPO has no reference model. Take the callback out" in report
    assert code == 1


def test_what_does_not_fit_gets_remedies_until_it_does(capsys):
    words = [f"--model.backbone.repo={small_sdxl()}", "--data.val_shards=null", "--trainer.precision=bf16-mixed"]
    code, report = visit(capsys, QUICKSTART, *words, "--memory=0.05")
    assert code == 1
    assert "of 50.0 MB a device: does not fit" in report
    changes = report.split("\nwhat to change\n")[1].splitlines()
    assert "model.backbone.gradient_checkpointing true: activations are recomputed" in changes[0]
    assert "data.batch_size 8 with trainer.accumulate_grad_batches 2: as many pairs a step; then 3" in changes[1]
    assert "data.val_shards: without held-out pairs" in changes[2]
    assert "data.num_workers 4: with 0 the device waits" in changes[3]


class Unreadable(Scorer):
    """As one whose weights are not to be read."""

    version = 1

    def __init__(self):
        raise AssertionError("weights are read")

    def _score(self, images, prompts):
        raise AssertionError("scores are wanted")


SCORERS = {"clip": {"class_path": "tests.commands.test_doctor.Unreadable"}}


def test_scorers_are_not_made(capsys, tmp_path):
    """Neither those of callbacks nor those of the data module, whose rules hold all the same."""
    judge = {"class_path": "WinRate", "init_args": {"prompts": ["a fox"], "scorers": SCORERS}}
    path = tmp_path / "scorers.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [judge]}, "data": {"scorers": SCORERS}}))
    words = [QUICKSTART, f"--config={path}", "--data.vote.voters=[clip]"]
    code, report = visit(capsys, *words)
    assert code == 0, report
    assert "WinRate: left out here and not checked, because its scorers would load their weights" in report
    assert "208 pairs in 8 shards" in report
    assert "ordered by the human label, until a vote while training" in report
    assert ": fits, without the scorers\n" in report
    code, report = visit(capsys, *words, "--memory=0.01", "--trainer.precision=bf16-mixed", "--data.batch_size=1")
    assert code == 1
    assert "model.backbone.lora.rank 8" in report
    assert "data.train_cache" not in report  # fit would refuse it


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["data.train_cache=nowhere"], ["data.vote is not. Say in data.vote", "a cache does not hold. Run lit-align"]),
        (["data.vote.voters=[clip,style]"], ["data.scorers lacks 'style', which data.vote names; it has clip."]),
        (["data.vote={voters: [clip], rule: normalized}"], ["data.vote.rule normalized looks at the whole data set"]),
    ],
    ids=["cache", "voter", "rule"],
)
def test_scorers_in_training_have_rules(capsys, tmp_path, words, messages):
    path = tmp_path / "scorers.yaml"
    path.write_text(yaml.safe_dump({"data": {"scorers": SCORERS}}))
    code, report = visit(capsys, QUICKSTART, f"--config={path}", *(f"--{word}" for word in words))
    assert code == 1
    assert all(report.count(message) == 1 for message in messages), report
    assert "72 pairs in 3 shards" in report  # the rest is looked at


def test_what_a_sharding_strategy_refuses_is_told_and_not_advised(capsys, tmp_path, sd15, sd21):
    config, overlay = ROOT / "configs/mapo_sdxl_lora.yaml", "--config=configs/hardware/fsdp2_multi_node.yaml"
    words = [*small_options(config, tmp_path, sd15, sd21), overlay, "--trainer.accelerator=gpu"]
    refused = ["--trainer.precision=16-mixed", "--model.optimizer=bitsandbytes.optim.AdamW8bit"]
    code, report = visit(capsys, *words, *refused, "--memory=24")
    assert code == 1
    assert report.endswith("3 errors: fit would not run\n"), report
    assert "trainer.precision is 16-mixed, but FSDP2 is for 32-true and bf16-mixed" in report
    assert "model.optimizer is bitsandbytes.optim.adamw.AdamW8bit, but FSDP2 is for the optimizers of torch" in report
    assert "model.backbone.lora is set, but FSDP2 shares the weights of a whole denoiser out" in report
    whole = [*words, "--model.backbone.init_args.lora=null", "--trainer.strategy=lit_align.training.strategies.ZeRO2"]
    code, report = visit(capsys, *whole, "--memory=0.005")
    assert report.endswith("1 error: fit would not run\n"), report
    assert "of 5.0 MB a device: does not fit" in report
    assert "what to change" in report
    assert "8bit" not in report
    assert "lora.rank" not in report
    code, report = visit(capsys, *whole, "--memory=24")
    assert code == 0, report


def test_gradients_are_not_twice_where_they_are_in_the_buckets(capsys):
    words = [QUICKSTART, "--config=configs/hardware/ddp_8x80gb.yaml", "--memory=80"]
    assert "DDP's copy of the gradients" not in visit(capsys, *words)[1]
    option = "--trainer.strategy.init_args.gradient_as_bucket_view=false"
    assert "buckets      16.5 MB: DDP's copy of the gradients" in visit(capsys, *words, option)[1]


@pytest.mark.parametrize("view", [True, False])
def test_banner_looks_at_ddp_itself(monkeypatch, view):
    module = make()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**10))
    strategy = DDPStrategy(gradient_as_bucket_view=view)
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cuda:0"))
    trainer = SimpleNamespace(strategy=strategy, world_size=2)
    (line,) = StartBanner()._memory(trainer, module)
    assert ("buckets" in line) != view


class Own(torch.optim.SGD):
    """An optimizer of a package that nobody has installed."""


def test_what_cannot_be_told_is_no_error(capsys, monkeypatch):
    words = ["--model.optimizer=tests.commands.test_doctor.Own", "--trainer.precision=64"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    code, report = visit(capsys, QUICKSTART, *words)
    assert code == 0, report
    assert f"torch {torch.__version__}, lightning" in report
    assert "cannot be estimated: trainer.precision 64-true: its memory is not known. Known: ['16-mixed'," in report
    assert "cpu: 1 cores, " in report


@pytest.mark.parametrize(("loss", "beta", "said"), [("ipo", 5000, 1), ("ipo", 10, 0), ("sigmoid", 0.1, 1)])
def test_unusual_betas_are_told(loss, beta, said):
    assert len(DiffusionDPO(beta, loss_type=loss).concerns()) == said
    assert DiffusionDPO().concerns() == MaPO().concerns() == []
