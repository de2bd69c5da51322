"""Schedules of a config: what they do in each step, and what is refused before the first one."""

import io
import math

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lit_align.backbones import LoRA
from lit_align.commands.fit import ConfigCLI, make_cli
from lit_align.training.lr_schedulers import (
    ReduceLROnPlateau,
    describe_rates,
    make_scheduler,
    rate_lines,
    try_rates,
)
from tests.support.paths import ROOT
from tests.support.runs import fit, keep_all, make_data, make_module

TORCH, OURS = "torch.optim.lr_scheduler.", "lit_align.training.lr_schedulers."
WARM_UP = {"class_path": f"{TORCH}LinearLR", "init_args": {"start_factor": 0.5, "total_iters": 2}}
COSINE = {"class_path": f"{TORCH}CosineAnnealingLR", "init_args": {"T_max": 4}}
DECAY = {"class_path": f"{TORCH}ExponentialLR", "init_args": {"gamma": 0.5}}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0)


@pytest.fixture(scope="module")
def from_config(tmp_path_factory):
    """Return the schedule that a config's words make."""
    cli = make_cli(ConfigCLI, [f"--config={ROOT}/configs/quickstart.yaml"], run=False, prog="test")

    def make(class_path, **init_args):
        path = tmp_path_factory.mktemp("configs") / "schedule.yaml"
        path.write_text(yaml.safe_dump({"model": {"lr_scheduler": {"class_path": class_path, "init_args": init_args}}}))
        parsed = cli.parser.parse_args([f"--config={ROOT}/configs/quickstart.yaml", f"--config={path}"])
        part = Namespace(model=Namespace(lr_scheduler=parsed.model.lr_scheduler))
        return cli.parser.instantiate_classes(part, instantiate_groups=False).model.lr_scheduler

    return make


def cosine(step, steps):
    return (1 + math.cos(math.pi * step / steps)) / 2


@pytest.mark.parametrize(
    ("name", "init_args", "rates"),
    [
        (f"{TORCH}StepLR", {"step_size": 2, "gamma": 0.5}, [1, 1, 0.5, 0.5, 0.25]),
        (f"{TORCH}MultiStepLR", {"milestones": [1, 3], "gamma": 0.5}, [1, 0.5, 0.5, 0.25, 0.25]),
        (f"{TORCH}ConstantLR", {"factor": 0.5, "total_iters": 2}, [0.5, 0.5, 1, 1, 1]),
        (f"{TORCH}LinearLR", {"start_factor": 0.5, "total_iters": 2}, [0.5, 0.75, 1, 1, 1]),
        (f"{TORCH}ExponentialLR", {"gamma": 0.5}, [1, 0.5, 0.25, 0.125, 0.0625]),
        (f"{TORCH}PolynomialLR", {"total_iters": 4, "power": 1.0}, [1, 0.75, 0.5, 0.25, 0]),
        (f"{TORCH}CosineAnnealingLR", {"T_max": 4}, [cosine(step, 4) for step in range(5)]),
        (f"{TORCH}CosineAnnealingWarmRestarts", {"T_0": 2}, [1, 0.5, 1, 0.5, 1]),
        (f"{TORCH}CyclicLR", {"base_lr": 0.0, "max_lr": 1.0, "step_size_up": 2}, [0, 0.5, 1, 0.5, 0]),
        (f"{TORCH}OneCycleLR", {"max_lr": 1.0, "total_steps": 5, "pct_start": 0.5}, None),
        (
            f"{OURS}SequentialLR",
            {"schedulers": [WARM_UP, COSINE], "milestones": [2]},
            [0.5, 0.75, 1, cosine(1, 4), 0.5],
        ),
        (f"{OURS}ChainedScheduler", {"schedulers": [WARM_UP, DECAY]}, [0.5, 0.375, 0.25, 0.125, 0.0625]),
        (f"{OURS}ReduceLROnPlateau", {"monitor": "val/loss"}, [1, 1, 1, 1, 1]),
        ("lightning.pytorch.cli.ReduceLROnPlateau", {"monitor": "val/loss"}, [1, 1, 1, 1, 1]),
    ],
)
def test_all_schedules_of_numbers(from_config, name, init_args, rates):
    """Each is made from a config, has its rates, and its state is plain enough for a checkpoint."""
    make = from_config(name, **init_args)
    found = try_rates(adamw, make, 5)
    assert found == pytest.approx(rates, abs=1e-9) if rates else len(found) == 5
    file = io.BytesIO()
    torch.save(make(adamw([torch.nn.Parameter(torch.zeros(1))])).state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)


def test_an_optimizer_of_matrices_is_tried_too(from_config):
    make = from_config(DECAY["class_path"], **DECAY["init_args"])
    assert try_rates(lambda weights: torch.optim.Muon(weights, lr=1.0), make, 3) == [1, 0.5, 0.25]


def test_a_sequence_of_three(from_config):
    make = from_config(f"{OURS}SequentialLR", schedulers=[WARM_UP, COSINE, DECAY], milestones=[2, 5])
    assert try_rates(adamw, make, 7) == pytest.approx([0.5, 0.75, 1, cosine(1, 4), 0.5, 1, 0.5])


def test_a_sequence_in_a_sequence_is_refused(from_config):
    inner = {"class_path": f"{OURS}SequentialLR", "init_args": {"schedulers": [COSINE, DECAY], "milestones": [4]}}
    make = from_config(f"{OURS}SequentialLR", schedulers=[WARM_UP, inner], milestones=[2])
    with pytest.raises(ValueError, match=r"SequentialLR cannot be a part of a sequence\. List its parts"):
        try_rates(adamw, make, 6)


@pytest.mark.parametrize(
    ("name", "init_args", "message"),
    [
        (f"{TORCH}OneCycleLR", {"max_lr": 1.0, "total_steps": 3}, "model.lr_scheduler fails at step 4 of 5"),
        (f"{TORCH}OneCycleLR", {"max_lr": 1.0}, "model.lr_scheduler: .*total_steps"),
        (f"{TORCH}CosineAnnealingLR", {"T_max": 0}, "model.lr_scheduler"),
        (f"{TORCH}LinearLR", {"end_factor": 2.0}, "model.lr_scheduler: Ending multiplicative factor"),
        (f"{OURS}SequentialLR", {"schedulers": [WARM_UP, COSINE], "milestones": []}, "number of milestone"),
        (f"{OURS}SequentialLR", {"schedulers": [WARM_UP, COSINE], "milestones": [0]}, r"milestones are \[0\]"),
        (f"{TORCH}StepLR", {"step_size": 1, "gamma": -1.0}, "the learning rate of step 2 is -1"),
    ],
)
def test_what_fails_in_the_run_is_refused_before(from_config, name, init_args, message):
    with pytest.raises(ValueError, match=message):
        try_rates(adamw, from_config(name, **init_args), 5)


def test_the_rates_in_one_line():
    assert describe_rates([0.5, 1.0, 0.25]) == "0.5 in step 1, at most 1 (step 2), last 0.25"
    assert describe_rates([1.0, 0.0, 0.0]).endswith("last 0; it is 0, and nothing is trained, in 2 steps")
    assert rate_lines(adamw, None, 5) == []


def plateau(kind, **options):
    return lambda optimizer: kind(optimizer, **options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau, {}, "does not say which value"),
        (
            plateau(ReduceLROnPlateau, monitor="train/loss"),
            {},
            "'train/loss', which no validation measures. Choose from",
        ),
        (plateau(ReduceLROnPlateau, monitor="val/los"), {}, "'val/los', which no validation measures"),
        (plateau(ReduceLROnPlateau, monitor="val/loss"), {"limit_val_batches": 0}, "the run has no validation"),
    ],
)
def test_a_value_that_is_never_measured_is_refused(tmp_path, make, options, message):
    module = make_module(lora=LoRA(rank=2))
    module.lr_scheduler = make
    with pytest.raises(ValueError, match=message):
        fit(module, make_data(), tmp_path, 1, **{"limit_val_batches": 1, **options})


def test_a_plateau_without_held_out_pairs_is_refused(tmp_path):
    """Otherwise the rate would never fall, without a word."""
    module, data = make_module(lora=LoRA(rank=2)), make_data()
    module.lr_scheduler, data.val = plateau(ReduceLROnPlateau, monitor="val/loss"), None
    with pytest.raises(ValueError, match="the run has no validation"):
        fit(module, data, tmp_path, 1, limit_val_batches=1)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, 5),
        ({"check_val_every_n_epoch": 2, "limit_train_batches": 3}, 6),
    ],
)
def test_a_plateau_whose_first_validation_follows_the_run_is_refused(tmp_path, options, first):
    module = make_module(lora=LoRA(rank=2))
    module.lr_scheduler = plateau(ReduceLROnPlateau, monitor="val/loss")
    options = {"limit_val_batches": 1, "accumulate_grad_batches": 2, **options}
    with pytest.raises(ValueError, match=f"the first would follow micro-batch {first}, after the run's 2 optimizer"):
        fit(module, make_data(), tmp_path, 2, **options)


def test_a_plateau_in_a_run_whose_steps_grow_is_not_refused(tmp_path):
    """The micro-batches of a step change with the epoch, so that those of the run are not known."""
    module = make_module(lora=LoRA(rank=2))
    module.lr_scheduler = plateau(ReduceLROnPlateau, monitor="val/loss")
    growing = GradientAccumulationScheduler({0: 1, 1: 4})
    options = {"limit_val_batches": 1, "val_check_interval": 5, "check_val_every_n_epoch": None}
    trainer = fit(module, make_data(), tmp_path, 2, callbacks=[growing], limit_train_batches=1, **options)
    assert trainer.global_step == 2


def test_a_plateau_counts_validations_and_survives_a_resume(tmp_path):
    """Nothing counts as better here, so the rate falls at the second validation and at each later one."""

    def run(steps, **options):
        module = make_module(lora=LoRA(rank=2))
        module.lr_scheduler = plateau(
            ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=1e9, threshold_mode="abs", factor=0.5
        )
        keep = keep_all(tmp_path / str(steps), every_n_train_steps=1)
        options |= {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer = fit(module, make_data(), tmp_path, steps, callbacks=[keep], num_sanity_val_steps=1, **options)
        return trainer.optimizers[0].param_groups[0]["lr"]

    assert run(5) == pytest.approx(1e-4 / 2)
    assert run(6, ckpt_path=tmp_path / "5/step=3.ckpt") == pytest.approx(1e-4 / 4)


def test_errors_of_a_constructor_are_the_users():
    with pytest.raises(ValueError, match=r"model\.lr_scheduler: Factor should be < 1\.0"):
        make_scheduler(
            plateau(ReduceLROnPlateau, monitor="val/loss", factor=2.0), adamw([torch.nn.Parameter(torch.ones(1))])
        )


@pytest.mark.parametrize(
    ("name", "init_args", "message"),
    [
        (f"{TORCH}SequentialLR", {"schedulers": [WARM_UP, DECAY], "milestones": [1]}, f"can hold {OURS}SequentialLR"),
        (f"{TORCH}ChainedScheduler", {"schedulers": [WARM_UP, DECAY]}, f"can hold {OURS}ChainedScheduler"),
        (f"{TORCH}ReduceLROnPlateau", {"monitor": "val/loss"}, f"can hold {OURS}ReduceLROnPlateau"),
        (f"{TORCH}LambdaLR", {}, "LambdaLR takes a function, which a config cannot hold"),
        (f"{TORCH}CosineAnnealingLR", {"tmax": 3}, "CosineAnnealingLR: Option 'tmax' is not accepted"),
        (f"{TORCH}CosineLR", {}, "has no attribute 'CosineLR'"),
    ],
)
def test_what_a_config_cannot_hold_is_explained(from_config, capsys, name, init_args, message):
    with pytest.raises(SystemExit):
        from_config(name, **init_args)
    assert message in capsys.readouterr().err
