"""`lit-align doctor`: its reports on valid and broken configs."""

import os
import re
import shutil

import lightning as L
import pytest
import torch
import yaml

from lit_align.cli import main
from lit_align.scoring.base import Scorer
from tests.support.configs import CONFIGS, small_options
from tests.support.paths import PAIRS, PIPELINE, ROOT
from tests.support.pipelines import small_sdxl

QUICKSTART = "--config=configs/quickstart.yaml"


def diagnose(capsys, *words):
    """Run the command and return its exit code and report."""
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *map(str, words)])
    return exit_.value.code, capsys.readouterr().out


def test_the_quickstart_has_no_errors(capsys):
    code, report = diagnose(capsys, QUICKSTART)
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
def test_every_config_fits_24_gb(config, tmp_path, sd15, sd21, capsys):
    code, report = diagnose(capsys, *small_options(config, tmp_path, sd15, sd21), "--memory=24")
    assert (code, report.count("fits\n")) == (0, 1), report
    assert ("reference   " in report) == ("dpo" in config.stem)
    assert "of 24.00 GB a device: fits" in report


def test_all_errors_are_reported_at_once_beside_the_rest(capsys, tmp_path):
    code, report = diagnose(
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
                "/train is not a cache: it has no fingerprint.json. Make one with lit-align encode",
                "/val is not a cache: it has no fingerprint.json. Make one with lit-align encode",
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
    code, report = diagnose(capsys, QUICKSTART, *(f"--{word}".replace("{tmp}", str(tmp_path)) for word in words))
    for message in messages:
        assert message in report, report
    assert code == 1
    assert report.count("\n  - ") >= len(messages)


def test_missing_weights_are_reported_and_memory_is_still_estimated(capsys, tmp_path):
    shutil.copytree(PIPELINE, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    words = [f"--model.backbone.repo={tmp_path / 'bare'}", "--model.backbone.lora.rank=2"]
    code, report = diagnose(capsys, QUICKSTART, *words, "--memory=24", "--model.backbone.vae_precision=fp16")
    assert code == 1
    for part in ("unet holds no diffusion_pytorch_model", "vae holds no diff", "text_encoder holds", "encoder_2 holds"):
        assert part in report
    assert "2 tokenizers" in report
    assert "trainable   16,384 of 4,132,036 parameters" in report
    assert "of 24.00 GB a device: fits" in report
    assert "says force_upcast, because its activations overflow in fp16" in report


def test_caches_are_checked_one_by_one(capsys, tmp_path):
    cache, shards = tmp_path / "cache", f"{PAIRS}/train/00000.tar"
    words = [QUICKSTART, f"--data.train_shards={shards}", f"--data.val_shards={shards}"]
    main(["encode", *words, "--split=train", f"--output={cache}", "--accelerator=cpu"])
    words += [f"--data.train_cache={cache}", f"--data.val_cache={cache}"]
    code, report = diagnose(capsys, *words)
    assert code == 0, report
    for split in ("train", "val"):
        assert f"{split}: {cache} fits resolution, shards and encoders" in report
    assert "encoders 4.5 MB" not in report
    report = diagnose(capsys, *words, "--data.val_cache=nowhere")[1]
    assert f"train: {cache} fits resolution" in report
    assert "caches: nowhere is not a cache" in report
    assert "or go back to the old values" in diagnose(capsys, *words, "--data.resolution=64")[1]


def test_a_pipeline_that_is_not_downloaded_is_not_estimated(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    code, report = diagnose(capsys, QUICKSTART, "--model.backbone.repo=owner/name")
    assert "owner/name is not in the local cache; fit would download it" in report
    assert "until the pipeline's configs are on this machine: hf download owner/name --include '*.json'" in report
    assert code == 0


def test_a_reference_update_without_a_reference_is_an_error(capsys):
    words = ["--config=configs/quickstart_balanced_dpo.yaml", "--model.objective=MaPO"]
    code, report = diagnose(capsys, *words)
    assert "ReferenceUpdate has nothing to move: MaPO has no reference model. Take the callback out" in report
    assert code == 1


def test_remedies_are_listed_until_the_run_fits(capsys):
    words = [f"--model.backbone.repo={small_sdxl()}", "--data.val_shards=null", "--trainer.precision=bf16-mixed"]
    code, report = diagnose(capsys, QUICKSTART, *words, "--memory=0.05")
    assert code == 1
    assert "of 50.0 MB a device: does not fit" in report
    changes = report.split("\nwhat to change\n")[1].splitlines()
    assert "model.backbone.gradient_checkpointing true: activations are recomputed" in changes[0]
    assert "data.batch_size 8 with trainer.accumulate_grad_batches 2: as many pairs a step; then 3" in changes[1]
    assert "data.val_shards: without held-out pairs" in changes[2]
    assert "data.num_workers 4: with 0 the device waits" in changes[3]


def test_what_keeps_fewer_activations_is_advised_and_read_from_options(capsys):
    words = ["--config=configs/quickstart_balanced_dpo.yaml"]
    report = diagnose(capsys, *words, "--memory=0.33")[1]
    assert "model.backbone.gradient_checkpointing selective: activations other than results" in report
    words += ["--model.backbone.activation_offload=true", "--model.backbone.gradient_checkpointing=true"]
    assert "which waits in main memory" in diagnose(capsys, *words, "--memory=24")[1]
    on_cpu = diagnose(capsys, *words)[1]
    assert "model.backbone.activation_offload: without effect on a CPU" in on_cpu
    assert "which waits in main memory" not in on_cpu
    words[-1] = "--model.backbone.gradient_checkpointing=selective"
    code, report = diagnose(capsys, *words)
    assert code == 1
    assert "gradient_checkpointing is selective, whose results stay on the device" in report


def test_nf4_is_advised_where_a_lora_does_not_fit(capsys):
    words = ["--trainer.precision=bf16-mixed", "--data.batch_size=1", "--model.backbone.lora.rank=2"]
    code, report = diagnose(capsys, QUICKSTART, *words, "--memory=0.01")
    assert code == 1
    assert re.search(r"model\.backbone\.lora\.base nf4: (.*; )?the frozen linear layers in 4 bits a weight", report)
    assert "lora.rank 8" not in report


EIGHT_BIT = "bitsandbytes.optim.AdamW8bit"


@pytest.mark.slow
def test_what_is_advised_adds_up(capsys, tmp_path):
    """The total after a change is that of a run with this change and all above it; scorers exclude a cache."""
    words = [QUICKSTART, "--model.backbone.gradient_checkpointing=true", "--data.batch_size=2", "--memory=0.001"]
    (tmp_path / "scorers.yaml").write_text(yaml.safe_dump({"data": {"scorers": SCORERS}}))
    words += [f"--config={tmp_path}/scorers.yaml", "--data.vote.voters=[clip]"]
    _, report = diagnose(capsys, *words, "--trainer.precision=bf16-mixed")
    lines = [line for line in report.splitlines() if "; then " in line]
    changes = [
        (  # smaller activations alone save nothing while the optimizer's step is the largest part
            "data.batch_size 1 with trainer.accumulate_grad_batches 2 and model.backbone.activation_offload true and "
            "model.optimizer bitsandbytes.optim.AdamW8bit: ",
            ["data.batch_size=1", "model.backbone.activation_offload=true", f"model.optimizer={EIGHT_BIT}"],
        ),
        (
            "trainer.precision bf16-true with model.compensate_rounding true: ",
            ["trainer.precision=bf16-true", "model.compensate_rounding=true"],
        ),
        ("model.backbone.lora.rank 8: ", ["model.backbone.lora.rank=8"]),
        ("model.backbone.lora.base nf4: ", ["model.backbone.lora.base=nf4"]),
    ]
    given = [*words, "--trainer.precision=bf16-mixed"]
    for line, (start, options) in zip(lines, changes, strict=True):
        assert line.startswith(f"  - {start}"), report
        given += [f"--{option}" for option in options]
        total = re.search(r"; then (\S+ [kMG]?B)\b", line)[1]
        assert f"total        {total} of 1.0 MB a device" in diagnose(capsys, *given)[1]


def test_an_optimizer_in_8_bits_or_without_states_gets_no_advice_on_it(capsys):
    for optimizer in ("bitsandbytes.optim.AdamW8bit", "torch.optim.SGD"):
        words = [QUICKSTART, f"--model.optimizer={optimizer}", "--trainer.precision=bf16-mixed", "--memory=0.001"]
        report = diagnose(capsys, *words, "--data.batch_size=1")[1]
        assert "model.optimizer bitsandbytes" not in report
        assert "model.backbone.lora.base nf4: " in report


def test_what_fit_refuses_on_this_device_is_an_error(capsys):
    words = [QUICKSTART, "--model.attention=cudnn", "--model.compensate_rounding=true"]
    code, report = diagnose(capsys, *words)
    assert code == 1
    assert report.endswith("2 errors: fit would not run\n")
    assert "run: model.attention is cudnn, which cannot compute attention with heads of " in report
    assert "run: model.compensate_rounding is true, but trainer.precision is 32-true" in report
    code, report = diagnose(
        capsys, QUICKSTART, "--model.attention=cudnn", "--trainer.precision=bf16-true", "--memory=24"
    )
    assert code == 0, report  # it cannot be tried here
    assert "model.compensate_rounding true, or trainer.precision bf16-mixed: with bf16-true a change" in report
    code, report = diagnose(capsys, QUICKSTART, "--trainer.precision=bf16-true", "--model.compensate_rounding=true")
    assert code == 0, report
    assert "optimizer    41.2 MB" in report
    assert "rounded away" not in report


class Unreadable(Scorer):
    """A scorer whose weights must not be loaded."""

    version = 1

    def __init__(self):
        raise AssertionError("weights are loaded")

    def _score(self, images, prompts):
        raise AssertionError("scores are computed")


SCORERS = {"clip": {"class_path": "tests.commands.test_doctor.Unreadable"}}


def test_scorers_are_not_instantiated(capsys, tmp_path):
    """Neither those of callbacks nor those of the data module; their rules are still checked."""
    judge = {"class_path": "WinRate", "init_args": {"prompts": ["a fox"], "scorers": SCORERS}}
    path = tmp_path / "scorers.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [judge]}, "data": {"scorers": SCORERS}}))
    words = [QUICKSTART, f"--config={path}", "--data.vote.voters=[clip]"]
    code, report = diagnose(capsys, *words)
    assert code == 0, report
    assert "WinRate: left out here and not checked, because its scorers would load their weights" in report
    assert "208 pairs in 8 shards" in report
    assert "ordered by the human label, until a vote while training" in report
    assert ": fits, without the scorers\n" in report
    code, report = diagnose(capsys, *words, "--memory=0.01", "--trainer.precision=bf16-mixed", "--data.batch_size=1")
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
def test_rules_of_scorers_in_training_are_checked(capsys, tmp_path, words, messages):
    path = tmp_path / "scorers.yaml"
    path.write_text(yaml.safe_dump({"data": {"scorers": SCORERS}}))
    code, report = diagnose(capsys, QUICKSTART, f"--config={path}", *(f"--{word}" for word in words))
    assert code == 1
    assert all(report.count(message) == 1 for message in messages), report
    assert "72 pairs in 3 shards" in report  # the rest is checked too


def test_options_that_a_sharding_strategy_refuses_are_errors_and_no_advice(capsys, tmp_path, sd15, sd21):
    config, overlay = ROOT / "configs/mapo_sdxl_lora.yaml", "--config=configs/hardware/fsdp2_multi_node.yaml"
    words = [*small_options(config, tmp_path, sd15, sd21), overlay, "--trainer.accelerator=gpu"]
    refused = ["--trainer.precision=16-mixed", "--model.optimizer=bitsandbytes.optim.AdamW8bit"]
    code, report = diagnose(capsys, *words, *refused, "--memory=24")
    assert code == 1
    assert report.endswith("3 errors: fit would not run\n"), report
    assert "trainer.precision is 16-mixed, but FSDP2 supports 32-true and bf16-mixed" in report
    assert "model.optimizer is bitsandbytes.optim.adamw.AdamW8bit, but FSDP2 supports the optimizers of torch" in report
    assert "model.backbone.lora is set, but FSDP2 shards a full denoiser" in report
    whole = [*words, "--model.backbone.init_args.lora=null", "--trainer.strategy=lit_align.training.strategies.ZeRO2"]
    code, report = diagnose(capsys, *whole, "--memory=0.005")
    assert report.endswith("1 error: fit would not run\n"), report
    assert "of 5.0 MB a device: does not fit" in report
    assert "what to change" in report
    assert "8bit" not in report
    assert "lora.rank" not in report
    code, report = diagnose(capsys, *whole, "--memory=24")
    assert code == 0, report


def test_gradients_count_once_if_they_are_views_of_buckets(capsys):
    words = [QUICKSTART, "--config=configs/hardware/ddp_8x80gb.yaml", "--memory=80"]
    assert "DDP's copy of the gradients" not in diagnose(capsys, *words)[1]
    option = "--trainer.strategy.init_args.gradient_as_bucket_view=false"
    assert "buckets      16.5 MB: DDP's copy of the gradients" in diagnose(capsys, *words, option)[1]


class Own(torch.optim.SGD):
    """An optimizer that is not from an installed package."""


def test_an_unknown_memory_or_package_is_not_an_error(capsys, monkeypatch):
    words = ["--model.optimizer=tests.commands.test_doctor.Own", "--trainer.precision=64"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    code, report = diagnose(capsys, QUICKSTART, *words)
    assert code == 0, report
    assert f"torch {torch.__version__}, lightning" in report
    assert "cannot be estimated: trainer.precision 64-true: its memory is not known. Known: ['16-mixed'," in report
    assert "cpu: 1 cores, " in report
