"""`last.ckpt` is the newest checkpoint after every kill, and files that a newer one replaces go."""

import os

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_align.backbones import LoRA
from lit_align.callbacks import Preemption, SupersededCheckpoints
from lit_align.training.checkpoints.atomic_io import AtomicCheckpointIO
from lit_align.training.checkpoints.last_checkpoint import last_checkpoint, resumable_step
from lit_align.training.checkpoints.last_link import link
from tests.support.processes import fork_ranks
from tests.support.runs import fit, make_data, make_module

TWO = {"monitor": "step", "mode": "max", "save_top_k": 2, "every_n_train_steps": 1, "filename": "{step}"}


class Killed(L.Callback):
    """Ends a run as a kill does, without a further hook: before or after a file is written."""

    def __init__(self, monkeypatch, step, after):
        self.step, self.after = step, after
        save = AtomicCheckpointIO.save_checkpoint

        def dies(io, checkpoint, path, storage_options=None):
            if self.after or checkpoint["global_step"] < self.step:
                save(io, checkpoint, path, storage_options)
            if checkpoint["global_step"] == self.step:
                raise Kill

        monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", dies)


class Kill(BaseException):
    """A kill; ModelCheckpoint's `save_on_exception` is off in these tests."""


def train(folder, steps, *callbacks, strategy="auto", devices=1, **options):
    kept = L.pytorch.callbacks.ModelCheckpoint(folder, save_last="link", save_on_exception=False, **(TWO | options))
    found = last_checkpoint([folder])
    module, io = make_module(lora=LoRA(rank=2)), AtomicCheckpointIO()
    listed = [SupersededCheckpoints(), kept, *callbacks]
    path = None if found is None else found.path
    run = {"plugins": [io], "strategy": strategy, "devices": devices}
    return fit(module, make_data(), folder, steps, ckpt_path=path, callbacks=listed, **run)


def test_last_is_the_newest_after_kills(tmp_path, monkeypatch):
    """The second run resumes from a checkpoint that does not know `last.ckpt`; its kill leaves step 1."""
    for step, after in ((2, False), (3, True)):
        with monkeypatch.context() as patched, pytest.raises(Kill):
            train(tmp_path, 4, Killed(patched, step, after))
    train(tmp_path, 4)
    assert os.readlink(tmp_path / "last.ckpt") == "step=4.ckpt"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]


def test_two_processes_go_on_from_their_first_checkpoint(tmp_path):
    """It does not know `last.ckpt`: both must agree on it, or one waits for the other."""
    two = {"devices": 2, "strategy": "ddp"}
    fork_ranks(lambda: train(tmp_path, 1, **two))
    fork_ranks(lambda: train(tmp_path, 3, **two))
    assert os.readlink(tmp_path / "last.ckpt") == "step=3.ckpt"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]


class RestoresLate(SingleDeviceStrategy):
    """Restores the states of callbacks after `on_fit_start`, as sharded strategies do."""

    restore_checkpoint_after_setup = True


def test_a_sharded_run_goes_on_with_last_and_removes_what_it_resumed_from(tmp_path):
    train(tmp_path, 1)
    train(tmp_path, 4, strategy=RestoresLate("cpu"))
    assert os.readlink(tmp_path / "last.ckpt") == "step=4.ckpt"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]


def test_last_is_repaired_when_a_run_goes_on(tmp_path):
    """Also that of runs without this callback, which left links with numbers."""
    train(tmp_path, 3)
    link(tmp_path / "step=2.ckpt", tmp_path / "last.ckpt")
    (tmp_path / "last-v1.ckpt").symlink_to("step=3.ckpt")
    train(tmp_path, 3)  # nothing is left to train
    assert os.readlink(tmp_path / "last.ckpt") == "step=3.ckpt"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]


def test_checkpoints_at_an_address_stay_as_they_are(tmp_path):
    kept = L.pytorch.callbacks.ModelCheckpoint("memory://runs/a", save_last=True)
    callback, trainer = SupersededCheckpoints(), L.Trainer(accelerator="cpu", logger=False, callbacks=[kept])
    trainer.ckpt_path = kept.last_model_path = "memory://runs/a/last.ckpt"
    callback.on_fit_start(trainer, None)
    assert kept.last_model_path == "memory://runs/a/last.ckpt"
    assert callback.state_dict() == {"superseded": []}


class Ends(L.Callback):
    """Sends this process's run to its end, as a signal in the middle of a step does."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            trainer._signal_connector.exit_code = 75


@pytest.mark.parametrize("keep", [2, -1])
def test_the_checkpoint_of_a_preemption_is_last_until_a_newer_one_replaces_it(tmp_path, keep):
    options = {"every_n_train_steps": 3, "save_top_k": keep}
    train(tmp_path, 1, every_n_train_steps=1, save_top_k=keep)
    train(tmp_path, 6, Ends(), Preemption(), **options)
    assert os.readlink(tmp_path / "last.ckpt") == "preempted.ckpt"
    assert resumable_step(tmp_path / "last.ckpt") == 2
    train(tmp_path, 4, **options)
    assert resumable_step(tmp_path / "last.ckpt") == 3
    assert (tmp_path / "preempted.ckpt").exists() == (keep == -1)  # all are kept


class Keeps(L.Callback):
    """Has a state."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"score": np.float64(0.5), "kept": {"value": self.value}}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


def test_a_state_that_could_not_be_read_is_refused_after_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"callback Keeps cannot be saved: kept\.value is a object \(<object"):
        train(tmp_path, 5, Keeps(object()), every_n_train_steps=4)
    assert os.listdir(tmp_path) == []


def test_plain_values_of_numpy_are_read_again(tmp_path):
    train(tmp_path, 1, Keeps(tmp_path))
    resumed = Keeps(tmp_path)
    train(tmp_path, 2, resumed)
    assert resumed.loaded == {"score": 0.5, "kept": {"value": str(tmp_path)}}
    assert type(resumed.loaded["score"]) is float
