"""Held-out metrics by timestep range, and chosen errors against the run's own start."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lit_align.callbacks import ChosenErrorRise, StepProgress
from lit_align.objectives import DiffusionDPO
from lit_align.training.metrics import HELD_OUT, PreferenceMetrics
from lit_align.types import ObjectiveOutput, PairErrors
from tests.support.runs import KeepLogs, equal, fit, held_out_errors, keep_all, make_data, make_module, weights

VALIDATES = {"limit_val_batches": 2, "val_check_interval": 1, "check_val_every_n_epoch": None}


def test_held_out_values_by_timestep_range():
    metrics = PreferenceMetrics(["chosen_drift", "rejected_drift", "chosen_worse"], 1000, HELD_OUT)
    errors = PairErrors(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 2.0, 2.0]))
    terms = {"chosen_drift": torch.tensor([0.5, -0.1, 0.2]), "rejected_drift": torch.tensor([0.3, 0.3, 0.4])}
    terms["chosen_worse"] = (terms["chosen_drift"] > 0).float()
    output = ObjectiveOutput(torch.tensor([3.0, 5.0, 7.0]), torch.tensor([1.0, 0.0, -1.0]), terms)
    pairs = SimpleNamespace(weight=torch.ones(3), voted=False, vote_share=torch.zeros(3), human=torch.ones(3))
    metrics.observe(output, errors, torch.tensor([0, 249, 990]), pairs)
    result = metrics.compute()
    assert result["loss/t0-249"] == 4
    assert result["loss/t750-999"] == 7
    assert result["accuracy/t0-249"] == 0.75
    assert result["accuracy/t750-999"] == 0
    assert result["margin/t0-249"] == 0.5
    assert result["chosen_drift/t0-249"] == pytest.approx(0.2)
    assert result["rejected_drift/t750-999"] == pytest.approx(0.4)
    assert result["chosen_error/t0-249"] == 1.5
    assert "chosen_worse/t0-249" not in result
    assert not any("t250-499" in name for name in result)


def test_the_objective_decides_which_ranges_there_are():
    """MaPO has no drift; the training log has only the loss and the errors by range."""
    with_reference, without = make_module(objective=DiffusionDPO()), make_module()
    assert "chosen_drift/t0-249" in with_reference.val_metrics.names
    assert len([name for name in with_reference.val_metrics.names if "/t0-" in name]) == 7
    assert len([name for name in without.val_metrics.names if "/t0-" in name]) == 5
    ranges = [name for name in without.train_metrics.names if "/t0-" in name]
    assert ranges == ["loss/t0-249", "chosen_error/t0-249", "rejected_error/t0-249"]


class Values(L.Callback):
    """The rise and the share of every validation."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            found = trainer.callback_metrics
            names = ("val/chosen_error_rise", "val/chosen_worse_than_start")
            self.rows.append([found[name].item() for name in names])


def test_the_rise_is_measured_pair_by_pair_and_survives_a_resume(tmp_path):
    options = {**VALIDATES, "accumulate_grad_batches": 1}
    start = held_out_errors(make_module())
    whole, first, seen, logs = make_module(), ChosenErrorRise(), Values(), KeepLogs()
    callbacks = [StepProgress(), first, seen, keep_all(tmp_path, every_n_train_steps=1)]
    fit(whole, make_data(batch_size=4), tmp_path, 3, callbacks=callbacks, logger=logs, **options)
    torch.testing.assert_close(first.start[first.start >= 0], start, rtol=1e-4, atol=1e-6)
    now = held_out_errors(whole)
    rise, share = seen.rows[-1]
    assert rise == pytest.approx((now / start - 1).mean().item(), rel=1e-2, abs=1e-4)
    assert share == (now > start).float().mean()
    at_start = next(row for step, row in logs.rows if step == 0 and "val/chosen_error" in row)
    assert at_start["val/chosen_error"] == pytest.approx(start.mean().item(), rel=1e-4)

    second, rest = ChosenErrorRise(), Values()
    fit(
        make_module(),
        make_data(batch_size=4),
        tmp_path,
        3,
        ckpt_path=tmp_path / "step=1.ckpt",
        callbacks=[second, rest],
        **options,
    )
    assert torch.equal(second.start, first.start)
    assert rest.rows[-2:] == seen.rows[-2:]


def test_the_first_validation_changes_nothing_in_the_run(tmp_path):
    runs = []
    for callbacks in ([], [ChosenErrorRise()]):
        module = make_module(caption_dropout=0.2)
        trainer = fit(module, make_data(num_workers=1), tmp_path, steps=3, callbacks=callbacks, **VALIDATES)
        modes = [part.training for part in module.modules()]
        runs.append((weights(module), torch.get_rng_state(), modes, trainer.fit_loop.epoch_loop.total_batch_idx))
    assert equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][2:] == runs[1][2:]


def test_without_held_out_pairs_nothing_is_measured(tmp_path):
    callback = ChosenErrorRise()
    trainer = fit(make_module(), make_data(), tmp_path, steps=1, callbacks=[callback])
    assert callback.start is None
    assert "val/chosen_error_rise" not in trainer.callback_metrics


def test_other_held_out_pairs_are_not_compared(tmp_path):
    callback = ChosenErrorRise()
    callback.start = torch.ones(3)
    with pytest.warns(UserWarning, match="there are 8 held-out pairs, and there were 3"):
        trainer = fit(make_module(), make_data(batch_size=4), tmp_path, 1, callbacks=[callback], **VALIDATES)
    assert "val/chosen_error_rise" not in trainer.callback_metrics
