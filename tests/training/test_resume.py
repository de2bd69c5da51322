"""A resumed run goes on with the pair that the unbroken run would have had next."""

import itertools
import multiprocessing

import lightning as L
import pytest
import torch

from lit_align.backbones import LoRA
from tests.support.processes import fork_ranks
from tests.support.runs import Recorder, equal, fit, keep_all, make_data, make_module, weights


@pytest.mark.parametrize("buckets", [False, True], ids=["square", "buckets"])
def test_another_number_of_workers_changes_nothing(tmp_path, buckets):
    """They take turns, so a run may be resumed with more or fewer of them."""
    options = {"batch_size": 4, "aspect_buckets": buckets}
    whole, recorder = make_module(), Recorder()
    fit(whole, make_data(**options), tmp_path, 5, callbacks=[recorder])
    for workers, then in ((2, 0),) if buckets else ((0, 3),):
        killed = make_module()
        fit(killed, make_data(**options, num_workers=workers), tmp_path, 3, callbacks=[keep_all(tmp_path)])
        resumed, rest = make_module(), Recorder()
        data = make_data(**options, num_workers=then)
        fit(resumed, data, tmp_path, 5, callbacks=[rest], ckpt_path=tmp_path / "step=3.ckpt")
        assert rest.pairs == recorder.pairs[3:]
        assert equal(weights(resumed), weights(whole))


class StopInTheMiddle(L.Callback):
    """Saves and stops between two micro-batches of one step."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Weights and pairs of a run with accumulation, across an epoch's end."""
    torch.set_num_threads(1)
    module, recorder = make_module(caption_dropout=0.2), Recorder()
    fit(
        module,
        make_data(batch_size=4),
        tmp_path_factory.mktemp("whole"),
        9,
        callbacks=[recorder],
        accumulate_grad_batches=2,
    )
    return weights(module), recorder.pairs


@pytest.mark.parametrize(("batch", "consumed", "workers"), [(5, 4, 0), (13, 13, 0), (16, 15, 2)])
def test_a_checkpoint_in_the_middle_of_an_accumulation(tmp_path, whole_run, batch, consumed, workers):
    """13 batches make 7 steps of two, the last of one; an unfinished step is done again as a whole."""
    options = {"accumulate_grad_batches": 2}
    data = {"batch_size": 4, "num_workers": workers}
    whole, pairs = whole_run
    path = tmp_path / "middle.ckpt"
    fit(
        make_module(caption_dropout=0.2),
        make_data(**data),
        tmp_path,
        9,
        callbacks=[StopInTheMiddle(path, batch)],
        **options,
    )
    resumed, rest = make_module(caption_dropout=0.2), Recorder()
    fit(resumed, make_data(**data), tmp_path, 9, callbacks=[rest], ckpt_path=path, **options)
    assert rest.pairs == pairs[consumed:]
    assert equal(weights(resumed), whole)


class Breaks(L.Callback):
    """Fails before a micro-batch is trained on, when the checkpoint of the failure counts it as begun."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("as a machine may")


def test_a_checkpoint_of_a_failure(tmp_path, whole_run):
    """It is written inside a micro-batch, between two of one step."""
    failed = L.pytorch.callbacks.OnExceptionCheckpoint(tmp_path, "failed")
    module = make_module(caption_dropout=0.2)
    with pytest.raises(RuntimeError, match="as a machine may"):
        fit(module, make_data(batch_size=4), tmp_path, 9, callbacks=[Breaks(), failed], accumulate_grad_batches=2)
    resumed, rest = make_module(caption_dropout=0.2), Recorder()
    path = tmp_path / "failed.ckpt"
    fit(resumed, make_data(batch_size=4), tmp_path, 9, ckpt_path=path, callbacks=[rest], accumulate_grad_batches=2)
    assert rest.pairs == whole_run[1][2:]
    assert equal(weights(resumed), whole_run[0])


def test_workers_end_with_a_run_that_fails(tmp_path):
    """Though the traceback still holds their iterator; else the process would wait for them when it ends."""
    before = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="as a machine may") as failure:
        fit(make_module(), make_data(batch_size=4, num_workers=2), tmp_path, 9, callbacks=[Breaks()])
    assert failure.tb is not None
    assert set(multiprocessing.active_children()) <= before


def run_two(folder, steps, ckpt_path):
    """Weights and pairs of each rank."""

    def run():
        module, recorder = make_module(lora=LoRA(rank=2, dropout=0.3), caption_dropout=0.2), Recorder()
        data = make_data(batch_size=3, num_workers=1)
        options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
        trainer = fit(module, data, folder, steps, ckpt_path, [recorder, keep_all(folder)], **options)
        torch.save({"weights": weights(module), "pairs": recorder.pairs}, folder / f"rank{trainer.global_rank}.pt")

    fork_ranks(run)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path):
    """gloo, workers, LoRA with dropout, 8 batches an epoch on each rank, across its end; ranks never share a pair."""
    whole = run_two(tmp_path / "whole", 6, None)
    run_two(tmp_path / "killed", 3, None)
    resumed = run_two(tmp_path / "killed", 6, tmp_path / "killed/step=3.ckpt")
    for rank in (0, 1):
        assert resumed[rank]["pairs"] == whole[rank]["pairs"][6:]
        assert equal(resumed[rank]["weights"], whole[rank]["weights"])
        assert equal(whole[rank]["weights"], whole[0]["weights"])
    epoch = [list(itertools.chain(*result["pairs"][:8])) for result in whole]
    assert [len(pairs) for pairs in epoch] == [24, 24]
    assert len(set(epoch[0]) | set(epoch[1])) == 48


def test_another_number_of_devices_is_refused(tmp_path):
    data = make_data()
    data.setup("fit")
    data.load_state_dict(data.state_dict() | {"world_size": 2})
    with pytest.raises(ValueError, match=r"another order \(world_size was 2, is 1\), so it cannot go on exactly"):
        data.train_dataloader()
