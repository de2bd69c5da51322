"""A run that receives a signal writes a checkpoint at the next step, and resumes exactly from it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import lightning as L
import pytest
import torch
import yaml

from lit_align.callbacks import ChosenErrorRise, DueValidation, Preemption, ReferenceUpdate
from lit_align.callbacks.preemption import ctrl_c_code
from lit_align.objectives import DiffusionDPO
from tests.support.paths import PAIRS, ROOT
from tests.support.pipelines import small_sdxl
from tests.support.processes import fork, fork_ranks
from tests.support.runs import KeepLogs, Recorder, equal, fit, keep_all, make_data, make_module, weights

USR1, TERM, INT = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT
VALIDATES = {"limit_val_batches": 2, "check_val_every_n_epoch": None, "val_check_interval": 2}


class Send(L.Callback):
    """Sends a signal to its own process and its workers when a hook is called for the n-th time."""

    def __init__(self, number, hook, count=1):
        self.number, self.left = number, count
        setattr(self, hook, self.send)

    def send(self, *arguments, **options):
        self.left -= 1
        if self.left == 0:
            for child in multiprocessing.active_children():
                os.kill(child.pid, self.number)
            os.kill(os.getpid(), self.number)


def in_fork(folder, steps, callbacks, data=(), ckpt_path=None, **options):
    """Train in a forked process; returns its exit code, and its weights and pairs."""

    def run():
        module, recorder, preemption = moved(), Recorder(), Preemption()
        listed = [preemption, *callbacks, recorder, ReferenceUpdate(every_n_steps=3)]
        fit(module, make_data(**{"batch_size": 4, **dict(data)}), folder, steps, ckpt_path, listed, **options)
        assert not multiprocessing.active_children()  # else the exit would wait for workers
        torch.save({"weights": weights(module), "pairs": recorder.pairs}, folder / "end.pt")
        if preemption.exit_code:
            os.kill(os.getpid(), TERM)  # ignored: the code is decided
        sys.exit(preemption.exit_code)

    process = fork(run)
    process.join(200)
    return process.exitcode, torch.load(folder / "end.pt", weights_only=True)


def moved():
    return make_module(objective=DiffusionDPO(), caption_dropout=0.2)


def validations(logger):
    return [row for row in logger.rows if "val/loss" in row[1]]


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def of_a_run():
    """Make the callbacks of a run with a moving reference and validations."""
    return [ReferenceUpdate(every_n_steps=3), ChosenErrorRise(), DueValidation()]


@pytest.fixture(autouse=True)
def _signals():
    """Restore the handlers: after a preemption a process ignores signals, as it is about to exit."""
    before = {number: signal.getsignal(number) for number in (USR1, TERM, INT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights, pairs and logged validations of the unbroken run, 6 steps of 2 micro-batches."""
    torch.set_num_threads(1)
    module, recorder, logger = moved(), Recorder(), KeepLogs()
    options = VALIDATES | {"accumulate_grad_batches": 2, "val_check_interval": 4, "logger": logger}
    folder = tmp_path_factory.mktemp("whole")
    fit(module, make_data(batch_size=4), folder, 6, callbacks=[recorder, *of_a_run()], **options)
    rows = validations(logger)
    assert [step for step, _ in rows] == [0, 1, 3, 5]  # the sanity check, and every second step: counted from 0
    return weights(module), recorder.pairs, rows


@pytest.mark.parametrize(
    ("number", "hook", "count", "step", "workers"),
    [
        (USR1, "on_train_batch_start", 5, 3, 2),  # in the middle of a step, at whose end the reference moves
        (TERM, "on_train_batch_end", 4, 2, 0),
        (INT, "on_train_batch_start", 3, 2, 2),  # a terminal sends it to the workers too
    ],
)
def test_the_resumed_run_ends_with_the_weights_of_the_unbroken_one(
    tmp_path, whole, number, hook, count, step, workers, capfd
):
    options = {"accumulate_grad_batches": 2, "data": {"num_workers": workers}}
    code, ended = in_fork(tmp_path, 6, [Send(number, hook, count)], **options)
    assert code == {USR1: 75, TERM: 143, INT: 130}[number]
    errors = capfd.readouterr().err
    assert f"{number.name}: a checkpoint will be written after this step" in errors
    assert ended["pairs"] == whole[1][: 2 * step]

    path = tmp_path / "checkpoints/preempted.ckpt"
    assert step_of(path) == step
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    code, rest = in_fork(tmp_path, 6, [], ckpt_path=path, **options)
    assert code == 0
    assert rest["pairs"] == whole[1][2 * step :]
    assert equal(rest["weights"], whole[0])


def test_a_resumed_run_that_a_signal_meets_before_its_first_step_stays_as_it_is(tmp_path, whole, caplog):
    """Also while it makes up for a validation that was due, which is then still due."""
    options = VALIDATES | {"accumulate_grad_batches": 2, "val_check_interval": 4}
    callbacks = [Send(USR1, "on_train_batch_start", 8), *of_a_run(), Preemption()]
    fit(moved(), make_data(batch_size=4), tmp_path, 6, callbacks=callbacks, **options)
    path = tmp_path / "checkpoints/preempted.ckpt"
    written = path.stat().st_mtime_ns
    for send in (Send(TERM, "on_fit_start"), Send(TERM, "on_validation_batch_start")):
        preemption, recorder = Preemption(), Recorder()
        callbacks = [send, recorder, *of_a_run(), preemption]
        with caplog.at_level("INFO"):
            fit(moved(), make_data(batch_size=4), tmp_path, 6, path, callbacks, **options)
        assert preemption.exit_code == 143
        assert recorder.pairs == []
        assert f"exit code 143. It can be resumed again from {path}." in caplog.text
        caplog.clear()
    assert path.stat().st_mtime_ns == written
    module, logger = moved(), KeepLogs()
    fit(module, make_data(batch_size=4), tmp_path, 6, path, of_a_run(), logger=logger, **options)
    assert validations(logger) == whole[2][2:]
    assert equal(weights(module), whole[0])


def test_a_validation_that_was_due_runs_after_the_resume(tmp_path, whole):
    """The preempted run leaves it out; the resumed run logs it at that step, with equal numbers."""
    options = VALIDATES | {"accumulate_grad_batches": 2, "val_check_interval": 4}
    logger, preemption = KeepLogs(), Preemption()
    callbacks = [Send(USR1, "on_train_batch_start", 8), *of_a_run(), preemption]
    fit(moved(), make_data(batch_size=4), tmp_path, 6, callbacks=callbacks, logger=logger, **options)
    assert preemption.exit_code == 75
    assert [step for step, _ in validations(logger)] == [0, 1]  # the sanity check, and after 2 steps: counted from 0

    module = moved()
    path = tmp_path / "checkpoints/preempted.ckpt"
    fit(module, make_data(batch_size=4), tmp_path, 6, path, [*of_a_run(), Preemption()], logger=logger, **options)
    assert validations(logger) == whole[2]
    assert equal(weights(module), whole[0])


class FailsAfter(L.Callback):
    """Fails after a step, when its checkpoint is written and its validation is about to begin."""

    def __init__(self, step):
        self.step = step

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == self.step:
            raise RuntimeError("the machine fails")


def test_a_validation_that_a_crash_prevented_runs_after_the_resume(tmp_path, whole):
    """A checkpoint is written before the validation of its step."""
    options = VALIDATES | {"accumulate_grad_batches": 2, "val_check_interval": 4}
    logger, kept = KeepLogs(), keep_all(tmp_path, every_n_train_steps=2)
    callbacks = [FailsAfter(4), *of_a_run(), kept]
    with pytest.raises(RuntimeError, match="the machine fails"):
        fit(moved(), make_data(batch_size=4), tmp_path, 6, callbacks=callbacks, logger=logger, **options)
    assert [step for step, _ in validations(logger)] == [0, 1]
    module = moved()
    fit(module, make_data(batch_size=4), tmp_path, 6, tmp_path / "step=4.ckpt", of_a_run(), logger=logger, **options)
    assert validations(logger) == whole[2]
    assert equal(weights(module), whole[0])


def test_later_signals_lose_nothing(tmp_path, whole):
    """Signals during the save, at the end and after it; the checkpoint lies beside those of ModelCheckpoint."""
    late = [Send(TERM, "on_save_checkpoint"), Send(TERM, "teardown"), keep_all(tmp_path / "own", every_n_train_steps=5)]
    code, _ = in_fork(tmp_path, 6, [Send(USR1, "on_train_batch_start", 5), *late], accumulate_grad_batches=2)
    assert code == 75  # the ranks had agreed on this code
    path = tmp_path / "own/preempted.ckpt"
    assert step_of(path) == 3
    code, rest = in_fork(tmp_path, 6, [], ckpt_path=path, accumulate_grad_batches=2)
    assert code == 0
    assert equal(rest["weights"], whole[0])


def test_sigterm_outweighs_sigusr1(tmp_path):
    """A run that was cancelled after the warning must not be requeued."""
    sends = [Send(USR1, "on_train_batch_start"), Send(TERM, "on_train_batch_start"), Send(USR1, "on_before_backward")]
    assert in_fork(tmp_path, 3, sends)[0] == 143


def test_a_signal_during_validation_waits_for_the_next_step(tmp_path):
    code, ended = in_fork(tmp_path, 6, [Send(TERM, "on_validation_batch_start")], **VALIDATES)
    assert code == 143
    assert len(ended["pairs"]) == step_of(tmp_path / "checkpoints/preempted.ckpt") == 3


class Interrupts(L.Callback):
    """Presses Ctrl-C twice in a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        os.kill(os.getpid(), INT)
        self.noted = trainer.global_step
        os.kill(os.getpid(), INT)


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, capfd):
    interrupts, kept = Interrupts(), keep_all(tmp_path, every_n_train_steps=9)
    with pytest.raises(SystemExit) as end, ctrl_c_code():
        fit(make_module(), make_data(), tmp_path, 3, callbacks=[interrupts, Preemption(), kept])
    assert end.value.code == 130
    assert interrupts.noted == 0  # the first one let the step go on
    assert "then the run ends. Ctrl-C again ends it at once." in capfd.readouterr().err
    assert os.listdir(tmp_path) == []


def test_the_last_step_ends_by_itself(tmp_path):
    """A signal at the last step writes a checkpoint; nothing is left to requeue."""
    code, _ = in_fork(tmp_path, 2, [Send(USR1, "on_train_batch_start", 2)])
    assert code == 0
    assert step_of(tmp_path / "checkpoints/preempted.ckpt") == 2


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(USR1), signal.getsignal(TERM)
    fit(make_module(), make_data(), tmp_path, 1, callbacks=[Preemption()])
    assert (signal.getsignal(USR1), signal.getsignal(TERM)) == before


def run_two(folder, name, ckpt_path=None, signalled=False):
    """Train in two processes, of which only the second gets a signal; return what each ends with."""

    def run():
        module, preemption = moved(), Preemption()
        own = [Send(USR1, "on_train_batch_start", 3)] if signalled and os.environ["RANK"] == "1" else []
        options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
        callbacks = [*own, preemption]
        trainer = fit(module, make_data(batch_size=3), folder, 4, ckpt_path, callbacks, **options)
        result = {"weights": weights(module), "code": preemption.exit_code}
        torch.save(result, folder / f"{name}{trainer.global_rank}.pt")

    fork_ranks(run)
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ended_two(tmp_path_factory):
    """Folder and ends of two processes that were told to end."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("two")
    return folder, run_two(folder, "ended", signalled=True)


def test_one_rank_tells_all(ended_two):
    """Only the second process gets a signal; both stop at the same step."""
    folder, ends = ended_two
    assert [end["code"] for end in ends] == [75, 75]
    assert step_of(folder / "checkpoints/preempted.ckpt") == 2


@pytest.mark.slow
def test_two_resumed_processes_end_as_the_unbroken_ones(tmp_path, ended_two):
    whole = run_two(tmp_path, "whole")
    resumed = run_two(tmp_path, "resumed", ended_two[0] / "checkpoints/preempted.ckpt")
    for rank in (0, 1):
        assert resumed[rank]["code"] == 0
        assert equal(resumed[rank]["weights"], whole[rank]["weights"])


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_command_exits_with_the_code(tmp_path, monkeypatch, devices):
    """The checkpoint lies where the config's ModelCheckpoint writes, also if Lightning starts the second process."""
    monkeypatch.chdir(ROOT)
    kept = {"dirpath": str(tmp_path / "kept"), "every_n_train_steps": 1}
    listed = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}]
    overlay = tmp_path / "callbacks.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}))
    words = [
        "fit",
        "--config=configs/quickstart.yaml",
        f"--config={overlay}",
        f"--model.backbone.init_args.repo={small_sdxl()}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.max_steps=10000",
        "--trainer.limit_val_batches=0",
        "--data.batch_size=4",
        f"--data.train_shards={PAIRS}/train/00000.tar",
    ]
    words += [f"--trainer.devices={devices}", f"--trainer.strategy={'auto' if devices == 1 else 'ddp'}"]
    process = subprocess.Popen([sys.executable, "-m", "lit_align", *words])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("kept/epoch*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, USR1)
    assert process.wait(60) == 75
    assert step_of(tmp_path / "kept/preempted.ckpt") >= 1
