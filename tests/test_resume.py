"""A resumed run goes on with the pair that the unbroken run would have had next."""

import itertools
import os
import subprocess
import sys

import lightning as L
import pytest
import torch

from tests.conftest import ROOT
from tests.test_module import Recorder, equal, fit, make_data, make_module, weights


def keep_all(folder, **options):
    return L.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **options)


@pytest.mark.parametrize("buckets", [False, True], ids=["square", "buckets"])
def test_another_number_of_workers_changes_nothing(tmp_path, buckets):
    """They take turns, so a run may be resumed with more or fewer of them."""
    options = {"batch_size": 4, "aspect_buckets": buckets}
    whole, recorder = make_module(), Recorder()
    fit(whole, make_data(**options), tmp_path, 5, callbacks=[recorder])
    for workers, then in ((0, 2), (2, 1), (1, 0)):
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


@pytest.mark.parametrize("batch", [5, 13, 16], ids=["mid-step", "end of epoch", "mid-step of the next epoch"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_in_the_middle_of_an_accumulation(tmp_path, batch, workers):
    """13 batches make 7 steps of two, the last of one; an unfinished step is done again as a whole."""
    options = {"accumulate_grad_batches": 2}
    data = {"batch_size": 4, "num_workers": workers}
    whole, recorder = make_module(caption_dropout=0.2), Recorder()
    fit(whole, make_data(**data), tmp_path, 9, callbacks=[recorder], **options)
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
    consumed = {5: 4, 13: 13, 16: 15}[batch]
    assert rest.pairs == recorder.pairs[consumed:]
    assert equal(weights(resumed), weights(whole))


TWO = """
import sys, torch
from tests.test_module import Recorder, fit, make_data, make_module, weights
from tests.test_resume import keep_all
torch.set_num_threads(1)
folder, lora, workers, steps, world, ckpt_path = sys.argv[1:]
recorder = Recorder()
module = make_module(lora=LoRA(rank=2, dropout=0.3) if lora == "lora" else None, caption_dropout=0.2)
trainer = fit(module, make_data(batch_size=3, num_workers=int(workers)), folder, int(steps), ckpt_path or None,
              [recorder, keep_all(folder)], devices=int(world), strategy="ddp", accumulate_grad_batches=2)
name = f"{folder}/rank{trainer.global_rank}-{steps}-{bool(ckpt_path)}.pt"
torch.save({"weights": weights(module), "pairs": recorder.pairs}, name)
"""


def run_two(folder, kind, workers, steps, world=2, ckpt_path=""):
    script = folder / "two.py"
    script.write_text(TWO)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [str(folder), kind, str(workers), str(steps), str(world), str(ckpt_path)]
    return subprocess.run(
        [sys.executable, str(script), *words], env=environment, capture_output=True, text=True, timeout=300
    )


def results(folder, steps, resumed):
    return [torch.load(folder / f"rank{rank}-{steps}-{resumed}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("kind", "workers"), [("full", 0), ("lora", 2)])
def test_two_processes_resume_exactly(tmp_path, kind, workers):
    """gloo: 8 batches an epoch on each rank, across its end; ranks never share a pair."""
    for steps, path in ((6, ""), (3, ""), (6, tmp_path / "step=3.ckpt")):
        done = run_two(tmp_path, kind, workers, steps, ckpt_path=path)
        assert done.returncode == 0, done.stderr[-2000:]
    whole, resumed = results(tmp_path, 6, False), results(tmp_path, 6, True)
    for rank in (0, 1):
        assert resumed[rank]["pairs"] == whole[rank]["pairs"][6:]
        assert equal(resumed[rank]["weights"], whole[rank]["weights"])
        assert equal(whole[rank]["weights"], whole[0]["weights"])
    epoch = [list(itertools.chain(*result["pairs"][:8])) for result in whole]
    assert [len(pairs) for pairs in epoch] == [24, 24]
    assert len(set(epoch[0]) | set(epoch[1])) == 48
    if kind == "full":  # another number of devices is refused, and says so
        refused = run_two(tmp_path, kind, workers, 6, world=1, ckpt_path=tmp_path / "step=3.ckpt")
        assert refused.returncode != 0
        assert "another order (world_size was 2, is 1), so it cannot go on exactly" in refused.stderr
