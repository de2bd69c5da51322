"""A resumed run continues with the pair that the unbroken run would have had next, and ends with its weights."""

import itertools
import multiprocessing

import bitsandbytes
import lightning as L
import pytest
import torch

from lit_align.backbones import LoRA
from tests.support.processes import fork_ranks
from tests.support.runs import KeepLogs, Recorder, equal, fit, keep_all, make_data, make_module, weights


def train_whole(folder, lora=None, **data):
    """Train 9 steps with accumulation, across an epoch's end; return the weights, the pairs, and what is counted."""
    module, recorder, logger = make_module(lora=lora, caption_dropout=0.2), Recorder(), KeepLogs()
    options = {"accumulate_grad_batches": 2, "logger": logger, "log_every_n_steps": 1}
    trainer = fit(module, make_data(batch_size=4, **data), folder, 9, callbacks=[recorder], **options)
    return weights(module), recorder.pairs, counted(trainer, logger)


def counted(trainer, logger):
    """Return the Trainer's counters by name, and the step and loss of each logged row."""
    loops = {"": trainer.fit_loop.state_dict()}
    while any(isinstance(value, dict) for value in loops.values()):
        parts = [(name, value.items() if isinstance(value, dict) else [("", value)]) for name, value in loops.items()]
        loops = {f"{name}/{key}".rstrip("/"): value for name, items in parts for key, value in items}
    # After a resume at an epoch's last batch Lightning does not count the epoch that begins; nothing reads these.
    unread = ("epoch_progress/total", "epoch_progress/current")
    counters = {name: value for name, value in loops.items() if not name.strip("/").startswith(unread)}
    return counters, [(step, row["train/loss"]) for step, row in logger.rows if "train/loss" in row]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    torch.set_num_threads(1)
    return train_whole(tmp_path_factory.mktemp("whole"))


def test_one_seed_gives_the_same_weights_bit_for_bit(tmp_path):
    runs = []
    for seed in (0, 0, 1):
        module = make_module(seed, caption_dropout=0.2)
        fit(module, make_data(seed), tmp_path, steps=3)
        runs.append(weights(module))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


@pytest.mark.parametrize(("lora", "workers"), [(None, 0), (LoRA(rank=2, dropout=0.3), 2)], ids=["full", "lora"])
def test_resumed_run_ends_with_the_weights_of_the_unbroken_one(tmp_path, whole_run, workers, lora):
    """Mid-epoch and across an epoch's end, with accumulation and prefetching workers."""
    options = {"accumulate_grad_batches": 2}
    data = {"num_workers": workers, "batch_size": 4}  # 13 batches an epoch
    whole, pairs, _ = whole_run if lora is None else train_whole(tmp_path, lora=lora, num_workers=workers)
    assert len(pairs) == 18 - 1  # 13 batches make 7 steps, the last of one batch

    killed, kept = make_module(lora=lora, caption_dropout=0.2), keep_all(tmp_path, every_n_train_steps=1)
    fit(killed, make_data(**data), tmp_path, steps=8, callbacks=[kept], **options)
    for step, consumed in ((3, 6), (8, 15)):
        resumed, rest = make_module(lora=lora, caption_dropout=0.2), Recorder()
        path = tmp_path / f"step={step}.ckpt"
        fit(resumed, make_data(**data), tmp_path, steps=9, ckpt_path=path, callbacks=[rest], **options)
        assert rest.pairs == pairs[consumed:]
        assert equal(weights(resumed), whole)


def test_resume_at_the_end_of_an_epoch_begins_the_next(tmp_path):
    whole, recorder = make_module(), Recorder()
    fit(whole, make_data(batch_size=13), tmp_path, steps=6, callbacks=[recorder])  # 4 batches an epoch
    kept = keep_all(tmp_path, every_n_train_steps=4)
    fit(make_module(), make_data(batch_size=13), tmp_path, steps=4, callbacks=[kept])
    resumed, rest = make_module(), Recorder()
    fit(resumed, make_data(batch_size=13), tmp_path, 6, ckpt_path=tmp_path / "step=4.ckpt", callbacks=[rest])
    assert rest.pairs == recorder.pairs[4:]
    assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("buckets", [False, True], ids=["square", "buckets"])
def test_another_number_of_workers_changes_nothing(tmp_path, buckets):
    """Workers take turns, so a run may be resumed with more or fewer of them."""
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


@pytest.mark.parametrize(("batch", "consumed", "workers"), [(5, 4, 0), (13, 13, 0), (16, 15, 2)])
def test_a_checkpoint_in_the_middle_of_an_accumulation(tmp_path, whole_run, batch, consumed, workers):
    """13 batches make 7 steps, the last of a single batch; an unfinished step is repeated from its first batch."""
    options = {"accumulate_grad_batches": 2}
    data = {"batch_size": 4, "num_workers": workers}
    whole, pairs, (counters, rows) = whole_run
    path = tmp_path / "middle.ckpt"
    fit(
        make_module(caption_dropout=0.2),
        make_data(**data),
        tmp_path,
        9,
        callbacks=[StopInTheMiddle(path, batch)],
        **options,
    )
    resumed, rest, logger = make_module(caption_dropout=0.2), Recorder(), KeepLogs()
    options |= {"logger": logger, "log_every_n_steps": 1}
    trainer = fit(resumed, make_data(**data), tmp_path, 9, callbacks=[rest], ckpt_path=path, **options)
    assert rest.pairs == pairs[consumed:]
    assert equal(weights(resumed), whole)
    found, logged = counted(trainer, logger)
    assert found == counters
    assert logged == rows[-len(logged) :]


class Breaks(L.Callback):
    """Fails before training on a micro-batch, which the checkpoint of the failure counts as begun."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("the machine fails")


def test_a_checkpoint_of_a_failure(tmp_path, whole_run):
    """The checkpoint is written between two micro-batches of one step."""
    failed = L.pytorch.callbacks.OnExceptionCheckpoint(tmp_path, "failed")
    module = make_module(caption_dropout=0.2)
    with pytest.raises(RuntimeError, match="the machine fails"):
        fit(module, make_data(batch_size=4), tmp_path, 9, callbacks=[Breaks(), failed], accumulate_grad_batches=2)
    resumed, rest, logger = make_module(caption_dropout=0.2), Recorder(), KeepLogs()
    path = tmp_path / "failed.ckpt"
    options = {"accumulate_grad_batches": 2, "logger": logger, "log_every_n_steps": 1}
    trainer = fit(resumed, make_data(batch_size=4), tmp_path, 9, ckpt_path=path, callbacks=[rest], **options)
    assert rest.pairs == whole_run[1][2:]
    assert equal(weights(resumed), whole_run[0])
    found, logged = counted(trainer, logger)
    assert found == whole_run[2][0]
    assert logged == whole_run[2][1][-len(logged) :]


def test_workers_end_with_a_run_that_fails(tmp_path):
    """Workers end although the traceback still refers to their iterator; otherwise the process would wait for them."""
    before = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="the machine fails") as failure:
        fit(make_module(), make_data(batch_size=4, num_workers=2), tmp_path, 9, callbacks=[Breaks()])
    assert failure.tb is not None
    assert set(multiprocessing.active_children()) <= before


def run_two(folder, steps, ckpt_path):
    """Train in two processes; return the weights and the pairs of each rank."""

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
    """With gloo, workers and LoRA dropout, across an epoch's end (8 batches a rank); ranks never share a pair."""
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


def test_eight_bit_adamw_resumes_exactly(tmp_path):
    def module():
        made = make_module()
        made.optimizer = lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)
        return made

    whole = module()
    fit(whole, make_data(), tmp_path, 5, callbacks=[keep_all(tmp_path, every_n_train_steps=3)])
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    states = saved["optimizer_states"][0]["state"].values()
    moments = [state["__bnb_optimizer_quant_state__"]["state1"] for state in states]
    assert {moment.dtype for moment in moments} == {
        torch.uint8,
        torch.float32,
    }  # large and small weights
    resumed = module()
    fit(resumed, make_data(), tmp_path, 5, ckpt_path=tmp_path / "step=3.ckpt")
    assert equal(weights(resumed), weights(whole))
