"""The start that the guard compares with: its pairs, its cost and its modes."""

from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lit_align.backbones import LoRA
from lit_align.callbacks import DivergenceGuard
from lit_align.callbacks.chosen_error_rise import compare_errors
from lit_align.callbacks.divergence_guard import START_DRAWS
from lit_align.callbacks.mean_errors import Mean
from tests.support.runs import fit, make_data, make_module


class Passes(L.Callback):
    """Counts the images that go through the denoiser before the first step, and in each step."""

    def __init__(self, module):
        self.images = [0]
        module.backbone.denoiser.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, denoiser, args, kwargs):
        self.images[-1] += (args[0] if args else kwargs["sample"]).shape[0]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.images.append(0)


def test_the_start_costs_a_bounded_number_of_passes_before_the_first_step(tmp_path, caplog, monkeypatch):
    """At most 6 pairs here, each with 2 draws; the first step costs what the second does."""
    monkeypatch.setattr("lit_align.callbacks.divergence_guard.START_PAIRS", 6)
    monkeypatch.setattr("lit_align.callbacks.divergence_guard.START_DRAWS", 2)
    module = make_module(lora=LoRA(rank=2))
    passes, data = Passes(module), make_data(batch_size=4)
    with caplog.at_level("INFO"):
        fit(module, data, tmp_path, 2, callbacks=[DivergenceGuard(), passes], accumulate_grad_batches=2)
    assert passes.images == [6 * 2, 4 * 2, 4 * 2, 4 * 2, 4 * 2]  # chosen ones; then both, of two batches
    assert "of 6 pairs with 2 draws each, took" in caplog.text


def test_the_start_is_that_of_the_untrained_model_without_dropout(tmp_path):
    """Also the mean over pairs of the errors of several draws, computed here by hand."""
    module, data, guard = make_module(lora=LoRA(rank=2, dropout=0.9)), make_data(batch_size=4), DivergenceGuard()
    with torch.no_grad():
        for weight in module.backbone.trainable_parameters().values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    data.setup("fit")
    batch = next(data.train_dataloader().first_batches(4))
    module.backbone.eval()
    with torch.no_grad():
        encoded = module.backbone.encode(batch)
        draws = [module.validation_draw(encoded, repeat) for repeat in range(START_DRAWS)]
        errors = torch.stack([module.backbone.pair_errors(encoded, draw).chosen for draw in draws]).mean(0)
    fit(module, make_data(batch_size=4), tmp_path, 1, callbacks=[guard])
    assert guard.start.mean == pytest.approx(errors.mean().item(), rel=1e-5)
    assert guard.start.error == pytest.approx(errors.std().item() / 2, rel=2e-2)  # of float32 squares


def test_the_rise_is_a_mean_of_ratios():
    """Pairs without a start, or not seen now, do not count; nor do those that only one of both has."""
    start, now = torch.tensor([1.0, 4.0, -1.0, 2.0]), torch.tensor([2.0, 3.0, 5.0, -1.0, 7.0])
    rise, share = compare_errors(start, now)
    assert rise.item() == pytest.approx((1.0 - 0.25) / 2)
    assert share.item() == 0.5
    rise, _ = compare_errors(torch.tensor([1.0]), torch.tensor([float("nan")]))
    assert rise.isnan()


@pytest.mark.parametrize(("rise", "stops"), [(float("nan"), True), (1.01, True), (0.99, False)])
def test_a_rise_that_is_not_a_number_stops_the_run(rise, stops):
    guard = DivergenceGuard(max_rise=1.0)
    found = {"val/chosen_error_rise": torch.tensor(rise)}
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        callback_metrics=found,
        sanity_checking=False,
        num_sanity_val_steps=float("inf"),
        should_stop=False,
        global_step=3,
        gradient_clip_val=None,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])],
    )
    with pytest.warns(UserWarning, match=r"is (nan|101\.0)% over") if stops else nullcontext():
        guard.on_validation_end(trainer, None)
    assert trainer.should_stop == stops


def test_the_error_bar_of_the_start_grows_with_the_limit():
    """A limit of 3 times the start has 3 times its error bar."""
    guard = DivergenceGuard(max_rise=2.0, window=1)
    guard.start = Mean(1.0, 0.1)
    module = make_module(lora=LoRA(rank=2))
    for mean, stops in ((3.85, False), (3.95, True)):
        guard.recent.clear()
        guard.recent.append([mean * 100, mean**2 * 100, 100.0])  # without an error bar of its own
        assert (guard._fault(module, broken=False) is not None) == stops
