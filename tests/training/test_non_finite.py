"""Steps whose gradients are not finite: the run stops or skips them, on all ranks, without changing the weights."""

import math
import os
import warnings

import lightning as L
import pytest
import torch

from lit_align.backbones import LoRA
from lit_align.callbacks import DivergenceGuard
from lit_align.commands.export import export
from lit_align.objectives import DiffusionDPO
from tests.support.processes import fork_ranks
from tests.support.runs import equal, fit, keep_all, make_data, make_module, weights


class Poison(L.Callback):
    """Makes gradients of the first rank NaN at some steps."""

    def __init__(self, *steps):
        self.steps, self.remove = steps, lambda: None

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step in self.steps and trainer.is_global_zero:
            weight = next(iter(pl_module.backbone.trainable_parameters().values()))
            weight.register_hook(
                lambda gradient: gradient * float("nan") if trainer.global_step in self.steps else None
            )


def test_a_step_without_finite_gradients_stops_the_run(tmp_path):
    module = make_module(lora=LoRA(rank=2))
    with pytest.raises(FloatingPointError, match=r"^step 3: the gradient norm is nan.* from before this step"):
        fit(module, make_data(), tmp_path, 5, callbacks=[Poison(2)])
    two = make_module(lora=LoRA(rank=2))
    fit(two, make_data(), tmp_path, 2)
    assert equal(weights(module), weights(two))


def test_skipped_steps_are_counted_up_to_a_limit_and_over_a_resume(tmp_path):
    def module():
        return make_module(lora=LoRA(rank=2), non_finite="skip", skip_limit=2)

    first = module()
    callbacks = [Poison(1, 2), keep_all(tmp_path, every_n_train_steps=1), DivergenceGuard(max_rise=100.0)]
    with pytest.warns(UserWarning, match=r"step 3: the gradient norm is nan.*\(2 of model\.skip_limit 2\)"):
        fit(first, make_data(), tmp_path, 3, callbacks=callbacks)
    one = make_module(lora=LoRA(rank=2))
    fit(one, make_data(), tmp_path, 1)
    assert equal(weights(first), weights(one))
    assert first.skipping.count == 2

    resumed = module()
    with pytest.raises(FloatingPointError, match=r"step 4: .* one more than model\.skip_limit 2"):
        fit(resumed, make_data(), tmp_path, 5, ckpt_path=tmp_path / "step=3.ckpt", callbacks=[Poison(3)])


class PoisonErrors(L.Callback):
    """Makes the chosen errors of some steps, and so their gradients, NaN."""

    def __init__(self, *steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            with torch.no_grad():
                self.weight = next(iter(pl_module.backbone.trainable_parameters().values()))
                self.kept = self.weight.clone()
                self.weight.fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps:
            with torch.no_grad():
                self.weight.copy_(self.kept)


def test_the_guard_ignores_a_skipped_step(tmp_path):
    """The errors of a skipped step are not finite, but no sign of divergence."""
    module, guard = make_module(lora=LoRA(rank=2), non_finite="skip"), DivergenceGuard(max_rise=100.0, window=1)
    with pytest.warns(UserWarning, match="step 3: the gradient norm is nan"):
        trainer = fit(module, make_data(), tmp_path, 5, callbacks=[PoisonErrors(2), guard])
    assert trainer.global_step == 5
    assert guard.seen is None
    assert math.isfinite(sum(step[0] for step in guard.recent))


def test_a_stopped_run_does_not_resume_past_its_step(tmp_path):
    """The checkpoint of that step records the fault; `skip` resumes from it."""
    module = make_module(lora=LoRA(rank=2))
    with pytest.raises(FloatingPointError):
        fit(module, make_data(), tmp_path, 5, callbacks=[Poison(2), keep_all(tmp_path, every_n_train_steps=1)])
    path = tmp_path / "step=3.ckpt"
    with pytest.raises(ValueError, match=r"stopped at this checkpoint's step: .* is nan.*non_finite skip"):
        fit(make_module(lora=LoRA(rank=2)), make_data(), tmp_path, 5, ckpt_path=path)
    skipping = make_module(lora=LoRA(rank=2), non_finite="skip")
    fit(skipping, make_data(), tmp_path, 5, ckpt_path=path)
    assert skipping.skipping.count == 1


class Spoils(L.Callback):
    """Makes a value of a trained weight, of the reference or of the optimizer NaN after the second step."""

    def __init__(self, what):
        self.what = what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            moments = next(iter(trainer.optimizers[0].state.values()))
            weight = next(iter(pl_module.backbone.trainable_parameters().values()))
            pl_module.backbone.reference.moved = True
            reference = next(iter(pl_module.backbone.reference_weights().values()))
            spoilt = {"weights": weight, "reference": reference, "optimizer": moments["exp_avg_sq"]}[self.what]
            spoilt.data.view(-1)[0] = float("inf")


@pytest.mark.parametrize("what", ["weights", "reference", "optimizer"])
def test_a_checkpoint_of_values_that_are_not_finite_is_not_written(tmp_path, what):
    """With one checkpoint kept, the next would have replaced the only good one."""
    module, last = make_module(lora=LoRA(rank=2), objective=DiffusionDPO()), tmp_path / "last.ckpt"
    kept = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_last="link")
    counted = {"optimizer": r"1 of 192 states of the optimizer \(0\.exp_avg_sq\)"}.get(
        what, r"1 of 128 weights \(backbone."
    )
    with pytest.raises(RuntimeError, match=rf"^step 2: {counted}.* not finite\. No checkpoint is written"):
        fit(module, make_data(), tmp_path, 4, callbacks=[Spoils(what), kept])
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=1.ckpt"]
    assert os.readlink(last) == "step=1.ckpt"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A checkpoint of an earlier version, which wrote values that are not finite."""
    folder = tmp_path_factory.mktemp("spoilt")
    fit(make_module(lora=LoRA(rank=2)), make_data(), folder, 1, callbacks=[keep_all(folder, every_n_train_steps=1)])
    checkpoint = torch.load(folder / "step=1.ckpt", weights_only=True)
    next(iter(checkpoint["state_dict"].values()))[0, 0] = float("nan")
    torch.save(checkpoint, folder / "spoilt.ckpt")
    return folder / "spoilt.ckpt"


def test_values_that_are_not_finite_are_not_resumed_from(tmp_path, spoilt):
    with pytest.raises(
        RuntimeError, match=r"^step 1: 1 of 64 weights .* not finite\. Resume from an earlier checkpoint"
    ):
        fit(make_module(lora=LoRA(rank=2)), make_data(), tmp_path, 2, ckpt_path=spoilt)


def test_values_that_are_not_finite_are_not_exported(tmp_path, spoilt):
    with pytest.raises(
        ValueError, match=r"step 1 cannot be used: 1 of its 64 weights are not finite in the checkpoint"
    ):
        export(spoilt, tmp_path / "out")
    checkpoint = torch.load(spoilt.with_name("step=1.ckpt"), weights_only=True)
    next(iter(checkpoint["state_dict"].values()))[0, 0] = 1e5  # more than half precision holds
    torch.save(checkpoint, tmp_path / "great.ckpt")
    with pytest.raises(ValueError, match=r"not finite in torch\.float16, such as .*; choose fp32 or bf16"):
        export(tmp_path / "great.ckpt", tmp_path / "out", precision="fp16")
    assert os.listdir(tmp_path) == ["great.ckpt"]
    export(tmp_path / "great.ckpt", tmp_path / "out")


class Scaled(L.Callback):
    """Gives the Trainer a gradient scaler, as 16-mixed has on a GPU."""

    def __init__(self, scale):
        self.scale = scale

    def on_train_start(self, trainer, pl_module):
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
        trainer.precision_plugin.scaler.scale(torch.ones(1))  # makes the scale a tensor


@pytest.mark.parametrize(("scale", "left_out"), [(0.5, 1), (2.0, 0)])
def test_with_a_scaler_steps_count_if_the_scale_is_below_one(tmp_path, scale, left_out):
    module = make_module(lora=LoRA(rank=2), non_finite="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, make_data(), tmp_path, 2, callbacks=[Poison(1), Scaled(scale)])
    assert module.skipping.count == left_out


def test_all_ranks_skip_a_step_that_one_could_not_compute(tmp_path):
    def work():
        module = make_module(lora=LoRA(rank=2), objective=DiffusionDPO(), non_finite="skip")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(module, make_data(), tmp_path, 3, callbacks=[Poison(1)], devices=2, strategy="ddp")
        result = {"weights": weights(module), "skipped": module.skipping.count}
        torch.save(result, tmp_path / f"{os.environ['RANK']}.pt")

    fork_ranks(work)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [result["skipped"] for result in results] == [1, 1]
    assert equal(results[0]["weights"], results[1]["weights"])
    assert all(weight.isfinite().all() for weight in results[0]["weights"].values())


@pytest.mark.parametrize(
    ("options", "message"), [({"non_finite": "go"}, "must be stop or skip"), ({"skip_limit": 0}, "at least 1")]
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_module(lora=LoRA(rank=2), **options)
