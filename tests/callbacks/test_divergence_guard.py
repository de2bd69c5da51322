"""The guard on runs made to fail, and on one that goes well."""

from functools import partial

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from lit_align.backbones import LoRA
from lit_align.backbones.loading.denoisers import load_denoiser
from lit_align.backbones.sampling import generate
from lit_align.callbacks import ChosenErrorRise, DivergenceGuard
from lit_align.callbacks.divergence_guard import RESTORED, WEIGHTS
from lit_align.callbacks.mean_errors import Mean, mean_of
from lit_align.commands.export import export
from lit_align.objectives import DiffusionDPO
from lit_align.scoring.presets import load_scorers
from tests.support.paths import PIPELINE, ROOT
from tests.support.processes import fork_ranks
from tests.support.runs import equal, fit, held_out_errors, keep_all, make_data, make_module, weights

make_bundled = partial(make_module, repo=PIPELINE)  # whose pictures mean something

VALIDATES = {"limit_val_batches": 2, "check_val_every_n_epoch": None, "gradient_clip_val": 1.0}


def with_rate(rate, factor=None, **options):
    """A module whose learning rate is far too high, or grows by `factor` each step."""
    module = make_bundled(**options)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=rate)
    if factor is not None:
        module.lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
    return module


PROMPTS = ["fox", "red apple", "cactus", "strawberry"]


def pictures(module):
    """One of each prompt, (4, 3, 32, 32) uint8."""
    with torch.no_grad():
        return generate(module.backbone, PROMPTS, [0, 1, 2, 3], 32, 32, steps=12)


def clip_score(images):
    """Mean cosine: whether the pictures show what the prompts say; about 0.66 for the base's."""
    clip = load_scorers(["clip"], ROOT / "assets/emoji/scorers/scorers.yaml")["clip"]
    return clip.prepare(torch.device("cpu")).score(images, PROMPTS).mean().item()


def test_it_stops_before_the_pictures_are_lost(tmp_path):
    """The rate is doubled each step, as far as 100 times the quickstart's."""
    scores = {"base": clip_score(pictures(make_bundled()))}
    for name, callbacks in (("unguarded", []), ("guarded", [ChosenErrorRise(), DivergenceGuard(window=2)])):
        module = with_rate(1e-5, 2.0)
        options = VALIDATES | {"limit_val_batches": len(callbacks), "val_check_interval": 1}
        trainer = fit(module, make_data(batch_size=4), tmp_path, steps=11, callbacks=callbacks, **options)
        assert (trainer.global_step == 11) == (name == "unguarded")
        scores[name] = clip_score(pictures(module))
    assert scores["unguarded"] < 0.1 < 0.5 < scores["guarded"] < scores["base"], scores


def test_restore_puts_the_best_weights_back(tmp_path, recwarn):
    """Far too high a rate at once: the best point is the start. The checkpoint of the end and an export have it."""
    lost = with_rate(1e-2, objective=DiffusionDPO())
    before, base = weights(lost), pictures(lost)
    fit(lost, make_data(batch_size=4), tmp_path, 4, gradient_clip_val=1.0)
    assert clip_score(pictures(lost)) < 0.1

    module, guard = with_rate(1e-2, objective=DiffusionDPO()), DivergenceGuard(action="restore")
    callbacks = [guard, ChosenErrorRise()]
    options = VALIDATES | {"val_check_interval": 2}
    trainer = fit(module, make_data(batch_size=4), tmp_path, 9, callbacks=callbacks, **options)
    assert trainer.global_step == 2
    assert equal(weights(module), before)
    assert torch.equal(pictures(module), base)
    assert guard.best["step"] == 0
    message = next(str(w.message) for w in recwarn if "DivergenceGuard" in str(w.message))
    assert "step 2: the chosen error of held-out pairs is" in message
    assert "learning rate 3 to 10 times lower than 0.01" in message
    assert "those of step 0" in message

    export(tmp_path / "checkpoints" / RESTORED, tmp_path / "unet")
    exported = dict(load_denoiser(make_bundled().backbone, str(tmp_path / "unet")).named_parameters())
    assert equal({f"denoiser.{name}": weight for name, weight in exported.items()}, before)
    assert "optimizer_states" not in torch.load(tmp_path / "checkpoints" / RESTORED, weights_only=True)


def test_a_checkpoint_of_the_same_step_has_the_restored_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_align.callbacks.divergence_guard.SURE", 0.0)  # act on the training errors of a few pairs
    module = with_rate(1e-2, lora=LoRA(rank=2))
    before = weights(module)
    guard = DivergenceGuard(max_rise=0.001, action="restore", window=1)
    callbacks = [keep_all(tmp_path, every_n_train_steps=1, save_last=True), ChosenErrorRise(), guard]
    options = VALIDATES | {"limit_val_batches": 1}
    trainer = fit(module, make_data(), tmp_path, 9, callbacks=callbacks, val_check_interval=1, **options)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == trainer.global_step < 9
    assert guard.best["step"] == 0
    assert equal({name.removeprefix("backbone."): value for name, value in saved["state_dict"].items()}, before)


def test_the_best_point_is_that_of_the_lowest_held_out_loss(tmp_path):
    module, guard = with_rate(3e-4, lora=LoRA(rank=2)), DivergenceGuard(action="restore")
    losses, kept = {}, {}

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses[trainer.global_step] = trainer.callback_metrics["val/loss"].item()
            kept[trainer.global_step] = weights(pl_module)
            if trainer.global_step == 4:
                guard._act(trainer, pl_module, "for a test")

    callbacks = [Watch(), ChosenErrorRise(), guard]
    fit(module, make_data(batch_size=4), tmp_path, 9, callbacks=callbacks, val_check_interval=1, **VALIDATES)
    assert sorted(losses) == [0, 1, 2, 3, 4]
    best = min((0, 1, 2, 3), key=lambda step: losses[step])
    assert guard.best == {"file": str(tmp_path / WEIGHTS), "step": best, "loss": losses[best]}
    assert equal(weights(module), kept[best])
    assert equal(load_file(tmp_path / WEIGHTS), kept[best])


def test_training_errors_are_watched_without_held_out_pairs(tmp_path):
    module, guard = with_rate(1e-2), DivergenceGuard(window=3)
    trainer = fit(module, make_data(batch_size=4), tmp_path, 9, callbacks=[guard], accumulate_grad_batches=2)
    assert trainer.global_step == 3
    assert guard.seen.startswith("step 3: the chosen error of training pairs is")
    assert 0.03 < guard.start.mean < 0.12
    assert 0 < guard.start.error < 0.05


def test_means_know_how_unsure_they_are():
    errors = torch.tensor([0.1, 0.3, 0.2, 0.6])
    steps = [[e.sum().item(), e.square().sum().item(), 2.0] for e in errors.split(2)]
    assert mean_of(steps) == pytest.approx((0.3, errors.std().item() / 2))
    assert mean_of([[0.0, 0.0, 0.0]]) is None
    assert mean_of([]) is None


@pytest.mark.parametrize(("start_error", "stops"), [(0.001, True), (0.01, False)])
def test_a_rise_that_chance_explains_is_none(start_error, stops):
    """The second quickstart: ten steps of 16 pairs had 114 % more than the first batch, held-out pairs 11 %."""
    guard = DivergenceGuard(max_rise=1.0, window=1)
    guard.start = Mean(0.0669, start_error)
    guard.recent.append([0.1436 * 160, (0.1436**2 + 0.02**2) * 160, 160.0])
    assert (guard._fault(make_module(lora=LoRA(rank=2)), broken=False) is not None) == stops


def test_a_run_that_goes_well_is_left_alone(tmp_path):
    """Also bit for bit."""
    runs = []
    for callbacks in ([], [ChosenErrorRise(), DivergenceGuard(window=2, action="restore")]):
        module = make_bundled(lora=LoRA(rank=2, dropout=0.3), caption_dropout=0.2)
        options = VALIDATES | {"val_check_interval": 2, "accumulate_grad_batches": 2}
        trainer = fit(module, make_data(), tmp_path, 3, callbacks=callbacks, **options)
        assert trainer.global_step == 3
        runs.append(weights(module))
    assert equal(*runs)


class Poison(L.Callback):
    """Makes a gradient, or a weight, infinite at a step."""

    def __init__(self, step, weight=False):
        self.step, self.weight = step, weight

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step and not self.weight:
            next(iter(pl_module.backbone.trainable_parameters().values())).grad[0] = float("inf")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step + 1 and self.weight:
            next(iter(pl_module.backbone.trainable_parameters().values())).data[0] = float("nan")


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    module, guard = make_bundled(lora=LoRA(rank=2)), DivergenceGuard()
    trainer = fit(module, make_data(), tmp_path, 5, callbacks=[Poison(2), guard], gradient_clip_val=1.0)
    assert trainer.global_step == 3
    assert "step 3: the gradient norm is inf, and this step was skipped" in guard.seen
    two = make_bundled(lora=LoRA(rank=2))
    fit(two, make_data(), tmp_path, 2, gradient_clip_val=1.0)
    assert equal(weights(module), weights(two))


def test_weights_that_are_not_finite_stop_the_run(tmp_path):
    guard = DivergenceGuard()
    trainer = fit(make_bundled(lora=LoRA(rank=2)), make_data(), tmp_path, 5, callbacks=[Poison(1, weight=True), guard])
    assert trainer.global_step == 2
    assert "step 2: some weights are not finite" in guard.seen
    assert (guard.exit_code, DivergenceGuard().exit_code) == (1, 0)


def test_the_state_survives_a_resume(tmp_path):
    """A resumed run has the start, the means and the best point of the unbroken one, and stops at its step."""

    def run(steps, **options):
        module, guard = with_rate(1e-2), DivergenceGuard(window=3, action="restore")
        callbacks = [ChosenErrorRise(), guard, keep_all(tmp_path, every_n_train_steps=1)]
        data = make_data(batch_size=4)
        trainer = fit(module, data, tmp_path, steps, callbacks=callbacks, val_check_interval=50, **VALIDATES, **options)
        return trainer.global_step, guard, weights(module)

    stopped, whole, final = run(9)
    assert stopped == 3
    run(2)
    again, resumed, resumed_final = run(9, ckpt_path=tmp_path / "step=2.ckpt")
    assert again == stopped
    assert resumed.state_dict() == whole.state_dict()
    assert equal(resumed_final, final)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rise": 0.0}, r"DivergenceGuard\.max_rise is 0\.0"),
        ({"action": "pause"}, r"DivergenceGuard\.action is 'pause'"),
        ({"window": 0}, r"DivergenceGuard\.window is 0"),
    ],
)
def test_senseless_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DivergenceGuard(**options)


def test_restore_needs_a_start_and_held_out_pairs(tmp_path):
    guard = DivergenceGuard(action="restore")
    module = make_bundled(lora=LoRA(rank=2))
    with pytest.raises(ValueError, match=r"Add lit_align\.callbacks\.ChosenErrorRise"):
        fit(module, make_data(), tmp_path, 1, callbacks=[guard])
    with pytest.raises(ValueError, match="there are no held-out pairs"):
        fit(module, make_data(), tmp_path, 1, callbacks=[guard, ChosenErrorRise()])


def test_two_processes_decide_alike(tmp_path):
    """The starts are those of all pairs; both stop at one step with the weights of the start."""

    def run():
        module, rise = with_rate(0.3, lora=LoRA(rank=2)), ChosenErrorRise()
        guard = DivergenceGuard(action="restore", window=2)
        options = {"limit_val_batches": 1.0, "val_check_interval": 50, "check_val_every_n_epoch": None}
        options |= {"devices": 2, "strategy": "ddp"}
        trainer = fit(module, make_data(batch_size=2), tmp_path, 9, callbacks=[rise, guard], **options)
        found = {"rise": rise.start, "guard": list(guard.start), "steps": trainer.global_step}
        torch.save(found | {"weights": weights(module)}, tmp_path / f"rank{trainer.global_rank}.pt")

    fork_ranks(run)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    module = make_bundled(lora=LoRA(rank=2))
    assert first["steps"] == second["steps"] == 3  # of few pairs the first rise may be chance
    assert first["guard"] == second["guard"]
    for found in (first, second):
        torch.testing.assert_close(found["rise"], held_out_errors(module, batches=5), rtol=1e-3, atol=1e-5)
        assert equal(found["weights"], weights(module))
