"""DDP with two CPU processes computes what one process would from all of their pairs."""

import pickle
from types import SimpleNamespace

import lightning as L
import torch

from lit_align.backbones import LoRA
from lit_align.callbacks import ReferenceUpdate
from lit_align.objectives import DiffusionDPO
from tests.support.processes import fork_ranks
from tests.support.runs import KeepLogs, equal, fit, make_data, make_module, weights

TWO = {"devices": 2, "strategy": "ddp"}
RATE = 0.02


def make(**options):
    """Make a module with plain SGD: Adam would enlarge differences in the last bit of a gradient."""
    module = make_module(**options)
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=RATE)
    return module


class Witness(L.Callback):
    """Records the micro-batches of a run, and when the ranks averaged their gradients."""

    def __init__(self):
        self.inputs, self.losses, self.errors = [], [], []
        self.averaged = []  # number of the micro-batch at each average of all gradients

    def on_train_start(self, trainer, pl_module):
        def average(_, bucket):
            if bucket.is_last():
                self.averaged.append(len(self.losses))
            done = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
            return done.get_future().then(lambda future: future.value()[0])

        trainer.strategy.model.register_comm_hook(None, average)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        encoded = pl_module.backbone.encode(batch)
        self.inputs.append((encoded, *pl_module.training_draw(encoded)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.errors.append(outputs["chosen_error"])


def steps_by_hand(ranks):
    """Train one process on the micro-batches of both ranks, two of each per step; returns its weights."""
    module = make()
    module.train()
    optimizer = module.configure_optimizers()
    for first in range(0, len(ranks[0].inputs), 2):
        micro_batches = [one for rank in ranks for one in rank.inputs[first : first + 2]]
        for encoded, draw, dropped in micro_batches:
            policy = module.backbone.pair_errors(encoded.drop_prompts(dropped), draw)
            (module.objective(policy, None).losses.mean() / len(micro_batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(module)


def test_two_processes_take_the_steps_of_one(tmp_path):
    """With two accumulated micro-batches: gradients are averaged once per step, metrics over all pairs."""

    def run():
        module, witness, logger = make(), Witness(), KeepLogs()
        options = {"accumulate_grad_batches": 2, "logger": logger, "log_every_n_steps": 2}
        trainer = fit(module, make_data(), tmp_path, 4, callbacks=[witness], **TWO, **options)
        rows = [row for _, row in logger.rows if "train/loss" in row]
        logged = {name: [row[name] for row in rows] for name in ("train/loss", "train/chosen_error")} if rows else {}
        seen = {name: getattr(witness, name) for name in ("inputs", "losses", "errors", "averaged")}
        result = {"weights": weights(module), "logged": logged, "seen": SimpleNamespace(**seen)}
        (tmp_path / f"rank{trainer.global_rank}").write_bytes(pickle.dumps(result))

    fork_ranks(run)
    results = [pickle.loads((tmp_path / f"rank{rank}").read_bytes()) for rank in (0, 1)]
    ranks = [result["seen"] for result in results]
    assert equal(results[0]["weights"], results[1]["weights"])
    assert [rank.averaged for rank in ranks] == [[1, 3, 5, 7]] * 2

    start, by_hand = weights(make()), steps_by_hand(ranks)
    moved = torch.cat([(by_hand[name] - start[name]).flatten() for name in start]).norm()
    off = torch.cat([(by_hand[name] - results[0]["weights"][name]).flatten() for name in start]).norm()
    assert moved > 1e-2
    assert off < 1e-5 * moved

    pairs = [[number for encoded, *_ in rank.inputs for number in encoded.pairs.numbers] for rank in ranks]
    assert len(set(pairs[0])) == len(set(pairs[1])) == 16
    assert not set(pairs[0]) & set(pairs[1])
    losses = torch.tensor([rank.losses for rank in ranks])
    expected = losses.view(2, 2, 4).mean((0, 2))  # of steps 1 and 2, and of 3 and 4
    torch.testing.assert_close(torch.tensor(results[0]["logged"]["train/loss"]), expected, rtol=1e-5, atol=0)
    expected = torch.stack([torch.cat(rank.errors).view(2, 8) for rank in ranks]).mean((0, 2))
    logged = torch.tensor(results[0]["logged"]["train/chosen_error"])
    torch.testing.assert_close(logged, expected, rtol=1e-5, atol=0)


def test_gradient_checkpointing_in_two_processes_changes_nothing(tmp_path):
    """A LoRA with dropout is recomputed; its reference is not."""

    def run():
        ends = []
        for checkpointing in (False, True):
            module = make(lora=LoRA(rank=2, dropout=0.3), objective=DiffusionDPO())
            if checkpointing:
                module.backbone.denoiser.enable_gradient_checkpointing()
            forwards, resnet = [], module.backbone.denoiser.up_blocks[0].resnets[0]
            resnet.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
            trainer = fit(module, make_data(), tmp_path, 3, callbacks=[ReferenceUpdate(2)], **TWO)
            assert len(forwards) == (9 if checkpointing else 6)  # policy, reference, and the policy again, in 3 steps
            ends.append(weights(module))
        torch.save(ends, tmp_path / f"rank{trainer.global_rank}.pt")

    fork_ranks(run)
    plain, recomputed = torch.load(tmp_path / "rank0.pt", weights_only=True)
    other = torch.load(tmp_path / "rank1.pt", weights_only=True)
    start = weights(make(lora=LoRA(rank=2, dropout=0.3), objective=DiffusionDPO()))
    assert not any(torch.equal(plain[name], start[name]) for name in start if "lora_B" in name)
    assert equal(plain, recomputed)
    assert equal(recomputed, other[1])
