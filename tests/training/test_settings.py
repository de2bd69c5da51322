"""Settings of a run by their options, and what becomes of each that differs when it resumes."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lit_align.training.checkpoints.settings import compare, flat, give_to_callbacks, made_in_python, put
from tests.support.runs import make_module

CONFIG = {
    "trainer": {
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
        "gradient_clip_val": 1.0,
        "callbacks": [
            {"class_path": "mine.Watch", "init_args": {"every": 2}},
            {"class_path": "mine.Watch", "init_args": {"every": 3}},
        ],
    },
    "model": {
        "objective": {"class_path": "lit_align.objectives.MaPO", "init_args": {"beta_mapo": 0.1}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "betas": [0.9, 0.999]}},
        "lr_scheduler": None,
    },
    "data": {"train_shards": "a/*.tar", "val_shards": ["b.tar"], "batch_size": 4},
}


def test_settings_have_the_names_of_their_options():
    assert flat(CONFIG) == {
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": "runs",
        "trainer.gradient_clip_val": 1.0,
        "trainer.callbacks.Watch": "Watch",
        "trainer.callbacks.Watch.every": 2,
        "trainer.callbacks.Watch#2": "Watch",
        "trainer.callbacks.Watch#2.every": 3,
        "model.objective": "MaPO",
        "model.objective.beta_mapo": 0.1,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-4,
        "model.optimizer.betas": [0.9, 0.999],
        "model.lr_scheduler": None,
        "data.train_shards": "a/*.tar",
        "data.val_shards": ["b.tar"],
        "data.batch_size": 4,
    }


def test_values_are_put_back_where_the_config_has_them():
    config = {"model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0, "momentum": 0.5}}}}
    put(config, {"model.optimizer.lr": 0.25})
    assert config["model"]["optimizer"] == {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25, "momentum": 0.5}}


@pytest.mark.parametrize(
    ("changed", "kept", "asked"),
    [
        ({"model.optimizer.lr": 1e-6}, "kept", "taken"),
        ({"model.optimizer": "SGD"}, "refused", "refused"),
        ({"model.lr_scheduler": "StepLR"}, "refused", "taken"),
        ({"trainer.accumulate_grad_batches": 2}, "refused", "refused"),
        ({"model.objective.beta_mapo": 0.5}, "taken", "taken"),
        ({"trainer.gradient_clip_val": None}, "taken", "taken"),
        ({"trainer.callbacks.Watch.every": 5}, "taken", "taken"),
        ({"data.val_shards": ["c.tar"]}, "taken", "taken"),
        ({"model.attention": "math"}, "taken", "taken"),
        ({"model.compensate_rounding": True}, "refused", "refused"),
        ({"model.compensate_rounding": False}, "taken", "taken"),  # of a run from before there was the option
    ],
)
def test_what_becomes_of_a_changed_setting(changed, kept, asked):
    (name, now), began = *changed.items(), flat(CONFIG)
    for on_resume, outcome in (("keep", kept), ("take", asked)):
        (found,) = compare(began, began | changed, on_resume)
        assert found[:4] == (name, began.get(name), now, outcome)
        assert f"{name} was {began.get(name)!r}, is {now!r}: {outcome}" in str(found)


def test_an_argument_that_no_checkpoint_holds_is_taken():
    """Such as min_8bit_size: the new optimizer has it, and nothing sets it back."""
    began = {"model.optimizer": "AdamW8bit", "model.optimizer.lr": 0.1, "model.optimizer.min_8bit_size": 4096}
    now = began | {"model.optimizer.lr": 0.2, "model.optimizer.min_8bit_size": 1}
    found = {one.name.rsplit(".")[-1]: one.outcome for one in compare(began, now, "keep", {"lr": 0.1, "eps": 1e-8})}
    assert found == {"lr": "kept", "min_8bit_size": "taken"}


def test_numbers_of_a_schedule_are_kept_and_its_parts_are_not_exchanged():
    began = {"model.lr_scheduler": "SequentialLR", "model.lr_scheduler.schedulers.LinearLR": "LinearLR"}
    began |= {"model.lr_scheduler.milestones": [2]}
    (found,) = compare(began, began | {"model.lr_scheduler.milestones": [9]}, "keep")
    assert found.outcome == "kept"
    other = {"model.lr_scheduler.schedulers.StepLR": "StepLR"}
    assert [one.outcome for one in compare(began, began | other, "keep")] == ["refused"]


def test_where_a_run_logs_and_what_the_data_module_compares_are_not_compared_here():
    began = flat(CONFIG)
    moved = {"trainer.logger.save_dir": "elsewhere", "data.train_shards": "moved/*.tar", "data.batch_size": 8}
    assert compare(began, began | moved, "keep") == []


def test_a_callback_that_restores_its_own_setting_gets_the_one_that_was_taken():
    first, second = EarlyStopping("val/loss", patience=3), EarlyStopping("val/margin", patience=3)
    for callback in (first, second):
        callback.load_state_dict({"wait_count": 0, "stopped_epoch": 0, "best_score": 0.0, "patience": 2})
    began = {"trainer.callbacks.EarlyStopping#2.patience": 2}
    give_to_callbacks([first, second], compare(began, {"trainer.callbacks.EarlyStopping#2.patience": 3}, "keep"))
    assert (first.patience, second.patience) == (2, 3)


def test_options_of_a_module_made_in_python_are_described():
    module = make_module(attention="math", float32_matmul="high", compensate_rounding=True)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    found = made_in_python(module)
    chosen = {"model.attention": "math", "model.float32_matmul": "high", "model.compensate_rounding": True}
    assert {name: found[name] for name in chosen} == chosen


def test_an_optimizer_that_takes_matrices_alone_is_described():
    module = make_module()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.optimizer = lambda parameters: torch.optim.Muon(parameters, lr=0.25)
    found = made_in_python(module)
    assert (found["model.optimizer"], found["model.optimizer.lr"]) == ("Muon", 0.25)
