"""Which of our callbacks a config of the Trainer replaces or disables, and what Lightning's options do with them."""

import time

import lightning as L
import pytest
from jsonargparse import Namespace
from lightning.pytorch.callbacks import GradientAccumulationScheduler, RichProgressBar, TQDMProgressBar

from lit_align.backbones import LoRA
from lit_align.callbacks import ChosenErrorRise, StartBanner, StepProgress, Throughput
from lit_align.callbacks.chosen_error_rise import UNCOUNTED
from lit_align.callbacks.defaults import default_callbacks, without_rivals
from lit_align.data.loader import PairLoader
from lit_align.training.steps import total_steps
from tests.support.runs import Recorder, fit, keep_all, make_data, make_module


def left_out(**trainer):
    callbacks = [Namespace(class_path=f"{c.__module__}.{c.__name__}") for c in trainer.pop("callbacks", [])]
    config = Namespace(**{"callbacks": callbacks, "enable_progress_bar": None, "barebones": False, **trainer})
    kept = {type(callback) for callback in without_rivals(default_callbacks(), config)}
    return {type(callback) for callback in default_callbacks()} - kept


@pytest.mark.parametrize(
    ("trainer", "missing"),
    [
        ({}, set()),
        ({"enable_progress_bar": True}, set()),
        ({"enable_progress_bar": False}, {StepProgress}),
        ({"barebones": True}, {StepProgress}),
        ({"callbacks": [RichProgressBar]}, {StepProgress}),
        ({"callbacks": [TQDMProgressBar]}, {StepProgress}),
        ({"callbacks": [Throughput, ChosenErrorRise]}, {Throughput, ChosenErrorRise}),
    ],
)
def test_a_config_replaces_or_disables_ours(trainer, missing):
    assert left_out(**trainer) == missing


def make_callback():
    return Throughput()


def test_a_function_that_makes_a_callback_replaces_none():
    assert left_out(callbacks=[make_callback]) == set()


def test_overfitting_sees_the_same_pairs_in_each_epoch(tmp_path):
    seen = Recorder()
    options = {"overfit_batches": 2, "max_epochs": 2, "limit_val_batches": None}
    fit(make_module(lora=LoRA(rank=2)), make_data(), tmp_path, 4, callbacks=[seen], **options)
    assert len(seen.pairs) == 4
    assert seen.pairs[:2] == seen.pairs[2:]
    assert seen.pairs[0] != seen.pairs[1]


@pytest.mark.parametrize(("batches", "pairs"), [(0, 0), (1, 4), (-1, 8)])
def test_the_first_validation_is_as_long_as_the_option_says(tmp_path, batches, pairs):
    """What has no start is not compared; where there is none at all, nothing is logged."""
    rise = ChosenErrorRise()
    options = {"num_sanity_val_steps": batches, "limit_val_batches": 2, "val_check_interval": 1}
    module, data = make_module(lora=LoRA(rank=2)), make_data(batch_size=4)
    trainer = fit(module, data, tmp_path, 1, callbacks=[rise], check_val_every_n_epoch=None, **options)
    assert (0 if rise.start is None else int((rise.start != UNCOUNTED).sum())) == pairs
    assert ("val/chosen_error_rise" in trainer.callback_metrics) == (pairs > 0)


def test_changing_accumulation_is_told_counted_and_resumed(tmp_path):
    """Lightning itself forgets it where a run resumes in the middle of an epoch."""

    def run(steps, **options):
        changing, seen = GradientAccumulationScheduler({0: 2, 1: 3}), Recorder()
        keep = keep_all(tmp_path, every_n_train_steps=1)
        module, data = make_module(lora=LoRA(rank=2)), make_data(batch_size=4)
        trainer = fit(module, data, tmp_path, steps, callbacks=[changing, seen, keep], **options)
        return trainer, module, seen.pairs

    trainer, module, whole = run(3)
    assert len(whole) == 6
    assert "8 pairs a step = 4 a device x 2 accumulated (3 from epoch 1 on) x 1" in StartBanner().text(trainer, module)
    _, _, rest = run(3, ckpt_path=tmp_path / "step=1.ckpt")
    assert rest == whole[2:]
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 3, -1
    assert total_steps(trainer) == 7 + 5 + 5  # of 13 batches


def test_the_banner_counts_changing_steps_before_the_first_validation(tmp_path, caplog):
    """The training pairs are not set up there, unless someone counts them."""
    changing, module, data = GradientAccumulationScheduler({0: 2, 1: 3}), make_module(lora=LoRA(rank=2)), make_data()
    options = {"max_epochs": 1, "num_sanity_val_steps": 1, "limit_val_batches": 1, "limit_train_batches": 3}
    trainer = fit(module, data, tmp_path, -1, callbacks=[StartBanner(), changing], **options)
    assert trainer.global_step == 2
    assert "4 pairs a step = 2 a device x 2 accumulated (3 from epoch 1 on) x 1" in caplog.text
    assert "until       1 epochs, 2 optimizer steps, from step 0" in caplog.text


class SlowLoader(L.Callback):
    """Makes each batch late by a share of a second."""

    def setup(self, trainer, pl_module, stage):
        late = PairLoader._next

        def wait(loader, batches):
            loader.waited += 0.4
            time.sleep(0.4)
            return late(loader, batches)

        self.before, PairLoader._next = late, wait

    def teardown(self, trainer, pl_module, stage):
        PairLoader._next = self.before


def test_waiting_for_data_is_logged(tmp_path):
    """Each step is logged here; the clock stopped in between."""
    shares = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if "train/data_wait" in trainer.callback_metrics:
                shares.append(trainer.callback_metrics["train/data_wait"].item())

    module = make_module(lora=LoRA(rank=2))
    callbacks = [Throughput(), Keep(), SlowLoader()]
    trainer = fit(module, make_data(), tmp_path, 4, callbacks=callbacks, log_every_n_steps=1)
    speed = trainer.callback_metrics["train/pairs_per_second"].item()
    assert 0.1 < shares[-1] <= 1
    assert speed < 2 / 0.4  # two pairs in each of the steps, which wait for 0.4 seconds


def test_a_reloaded_loader_ends_the_one_before():
    data = make_data(num_workers=1)
    data.setup("fit")
    first = data.train_dataloader()
    next(iter(first))
    (worker,) = first.loader._iterator._workers
    second = data.train_dataloader()
    assert second is not first
    worker.join(10)
    assert not worker.is_alive()
    data.teardown("validate")
