"""Advice on a run's settings, each with its reason. Advice on memory is in memory_report.py."""

from collections.abc import Iterator

from diffusers import AutoencoderKL
from jsonargparse import Namespace

from lit_align.backbones import Backbone
from lit_align.commands.doctor.data_check import DataCheck
from lit_align.commands.doctor.machine import Machine

MANY_SHARDS = 20  # reading the labels of more shards takes a while
HALF_WEIGHTS = {"16-true": 2**12, "bf16-true": 2**9}  # from 11 and 8 significant bits of a weight


def advice_on_data(check: DataCheck, machine: Machine) -> Iterator[str]:
    """Advise on splits, workers and indices."""
    data = check.data
    if data.val is None:
        yield (
            "data.val_shards: without held-out pairs val/accuracy and val/chosen_error_rise are not logged, and "
            "nothing shows that the run memorises its pairs"
        )
    if data.num_workers > max(machine.cores, 1) > 1:
        yield (
            f"data.num_workers {machine.cores}: a device has {machine.cores} cores, and more processes than cores "
            "only wait for each other"
        )
    if data.num_workers == 0 and machine.device != "cpu" and data.train.cache is None:
        yield "data.num_workers 4: with 0 the device waits while the training process decodes images"
    if len(check.unindexed) > MANY_SHARDS:
        yield (
            f"lit-align import webdataset --shards ...: {len(check.unindexed):,} shards have no index, so each start "
            "reads all labels, and damage that still decodes is not detected"
        )


def advice_on_precision(backbone: Backbone, machine: Machine, compensates: bool) -> Iterator[str]:
    """Advise on numbers that overflow or round away."""
    stored = AutoencoderKL.load_config(backbone.vae_location.repo, **backbone.vae_location.load_options)
    if backbone.vae_precision == "fp16" and stored.get("force_upcast"):
        yield (
            f"model.backbone.vae_precision bf16 or fp32, or a model.backbone.vae_repo that is safe in fp16: the config "
            f"of {backbone.vae_location} says force_upcast, because its activations overflow in fp16"
        )
    if machine.precision in HALF_WEIGHTS and not compensates:
        also = "model.compensate_rounding true, or " if machine.precision == "bf16-true" else ""
        yield (
            f"{also}trainer.precision bf16-mixed: with {machine.precision} a change of a weight by less than "
            f"1/{HALF_WEIGHTS[machine.precision]} of its value is rounded away"
        )


def advice_on_trainer(trainer: Namespace, check: DataCheck | None, machine: Machine) -> Iterator[str]:
    """Advise on the length of the run."""
    if trainer.max_steps == -1 and trainer.max_epochs in (None, -1) and trainer.max_time is None:
        yield "trainer.max_steps: only Lightning's default of 1,000 epochs ends this run"
    if check is not None and check.batches and trainer.accumulate_grad_batches > check.batches:
        yield (
            f"trainer.accumulate_grad_batches {check.batches}: an epoch has {check.batches} batches a device, and "
            f"Lightning takes a step at its end, after fewer than the {trainer.accumulate_grad_batches} batches you set"
        )
