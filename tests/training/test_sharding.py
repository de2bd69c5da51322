"""Sharded training (FSDP2) in two CPU processes: results, checkpoints and refusals. GPUs are untested."""

import math
import pickle
import shutil
import warnings

import lightning as L
import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import CheckpointException, save
from torch.distributed.tensor import DTensor

from lit_align.backbones import LoRA
from lit_align.backbones.activations import checkpoint_blocks
from lit_align.backbones.loading.sharded import meta_weights, read_into
from lit_align.backbones.sharding import to_full
from lit_align.callbacks import ChosenErrorRise, DivergenceGuard, ReferenceUpdate, SampleGrid
from lit_align.cli import main
from lit_align.objectives import DiffusionDPO
from lit_align.training.checkpoints.atomic_io import AtomicCheckpointIO
from lit_align.training.checkpoints.last_checkpoint import last_checkpoint
from lit_align.training.strategies import FSDP2, ZeRO2
from tests.support.processes import fork_ranks
from tests.support.runs import KeepLogs, equal, fit, keep_all, make_data, make_module


def make(optimizer=torch.optim.AdamW, rate=1e-3, **options):
    module = make_module(objective=DiffusionDPO(100.0), **options)
    module.optimizer = lambda parameters: optimizer(parameters, lr=rate)
    return module


def two(strategy="ddp", **options):
    return {"devices": 2, "strategy": strategy, "plugins": [AtomicCheckpointIO()], **options}


def full_weights(module):
    """Gather policy and reference; a collective."""
    named = module.backbone.trainable_parameters() | module.backbone.reference_weights()
    return {name: to_full(weight.detach()).clone() for name, weight in named.items()}


class Sharded(L.Callback):
    """Asserts that the weights of both denoisers are sharded between steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        named = pl_module.backbone.trainable_parameters() | pl_module.backbone.reference_weights()
        assert all(isinstance(weight, DTensor) for weight in named.values())
        mine = sum(weight.to_local().numel() for weight in named.values())
        assert mine < 0.6 * sum(weight.numel() for weight in named.values())


def read(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def test_sharded_steps_are_those_of_ddp(tmp_path):
    """Up to the order of sums: weights, moved reference, clipping, distance, held-out values and images.

    Held-out pairs make 7 batches, 3 and 4 on the two devices; the devices share three prompts.
    """

    def run(strategy):
        module, logger = make(torch.optim.SGD, 0.3), KeepLogs()
        grid = SampleGrid(["fox", "tulip", "cactus"], every_n_steps=2, height=32, width=32, steps=2)
        callbacks = [ReferenceUpdate(2, alpha=0.5), ChosenErrorRise(), DivergenceGuard(100.0, "restore"), grid]
        callbacks += [Sharded()] if strategy != "ddp" else []
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "logger": logger, "log_every_n_steps": 1}
        options |= {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
        folder = tmp_path / str(isinstance(strategy, FSDP2))
        trainer = fit(module, make_data(batch_size=4), folder, 3, callbacks=callbacks, **two(strategy), **options)
        rows = [{k: float(v) for k, v in row.items() if "per_second" not in k} for _, row in logger.rows]
        ends = {"weights": full_weights(module), "rows": rows}
        torch.save(ends, folder / f"rank{trainer.global_rank}.pt")

    fork_ranks(lambda: run("ddp"))
    fork_ranks(lambda: run(FSDP2()))
    ddp, sharded = read(tmp_path / "False"), read(tmp_path / "True")
    start = full_weights(make())
    difference = torch.cat([(ddp["weights"][n] - sharded["weights"][n]).flatten() for n in start]).norm()
    moved = torch.cat([(ddp["weights"][n] - start[n]).flatten() for n in start]).norm()
    assert moved > 0.1
    assert difference < 1e-5 * moved
    assert equal(sharded["weights"], read(tmp_path / "True", 1)["weights"])
    assert len(ddp["rows"]) == len(sharded["rows"]) > 6
    for first, second in zip(ddp["rows"], sharded["rows"], strict=True):
        assert second == pytest.approx(first, rel=2e-3, abs=1e-5)
    assert {"val/chosen_error_rise", "val/loss"} <= {name for row in ddp["rows"] for name in row}
    assert (tmp_path / "True/samples/step-0000003.png").is_file()


class Gathered(L.Callback):
    """Counts the trained weights that are gathered before each backward pass."""

    def __init__(self):
        self.counts = []

    def on_before_backward(self, trainer, pl_module, loss):
        weights = pl_module.backbone.trainable_parameters().values()
        self.counts.append(sum(not isinstance(weight, DTensor) for weight in weights))


def test_zero2_keeps_weights_for_the_backward_pass_alone(tmp_path):
    """Steps equal those of FSDP2; generating and validation, without backward passes, keep nothing gathered."""

    def run(strategy):
        module, gathered = make(torch.optim.SGD, 0.3), Gathered()
        grid = SampleGrid(["fox", "tulip"], every_n_steps=1, height=32, width=32, steps=1)
        callbacks = [
            gathered,
            ReferenceUpdate(2),
            DivergenceGuard(100.0, "restore"),
            ChosenErrorRise(),
            grid,
            Sharded(),
        ]
        options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
        options |= {"gradient_clip_val": 0.5}
        folder = tmp_path / type(strategy).__name__
        trainer = fit(module, make_data(batch_size=1), folder, 3, callbacks=callbacks, **two(strategy), **options)
        ends = {
            "weights": full_weights(module),
            "gathered": gathered.counts,
            "count": len(module.backbone.trainable_parameters()),
        }
        torch.save(ends, folder / f"rank{trainer.global_rank}.pt")

    fork_ranks(lambda: (run(FSDP2()), run(ZeRO2())))
    shared, kept = read(tmp_path / "FSDP2"), read(tmp_path / "ZeRO2")
    assert shared["gathered"] == [0, 0, 0]
    assert kept["gathered"] == 3 * [kept["count"]]
    assert equal(shared["weights"], kept["weights"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four steps, and the last one again from a checkpoint, once as a folder and once as a file."""
    torch.set_num_threads(1)
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("folders", "files")}

    def run(kind, name, steps, ckpt_path=None):
        folder, module = folders[kind], make(caption_dropout=0.2)
        strategy = FSDP2(save_distributed_checkpoint=kind == "folders")
        kept = keep_all(folder / name, save_last="link", every_n_train_steps=1)
        callbacks = [ReferenceUpdate(2), kept, Sharded()]
        options = two(strategy, gradient_clip_val=1.0)
        trainer = fit(module, make_data(batch_size=1), folder, steps, ckpt_path, callbacks, **options)
        torch.save(full_weights(module), folder / f"{name}{trainer.global_rank}.pt")

    def both(name, steps, found=None):
        for kind in folders:
            run(kind, name, steps, None if found is None else folders[kind] / found)

    fork_ranks(lambda: both("whole", 4))
    fork_ranks(lambda: both("resumed", 4, "whole/step=3.ckpt"))
    return folders


@pytest.mark.parametrize("kind", ["folders", "files"])
def test_resumed_sharded_run_equals_the_unbroken_one(runs, kind):
    ends = [torch.load(runs[kind] / f"{name}.pt", weights_only=True) for name in ("whole0", "resumed0", "resumed1")]
    assert equal(ends[0], ends[1])
    assert equal(ends[0], ends[2])


def test_checkpoints_hold_what_was_trained_and_are_found(runs):
    """They hold the reference once it has moved, and no frozen encoders; `last.ckpt` is a link."""
    file = torch.load(runs["files"] / "whole/step=4.ckpt", weights_only=True)["state_dict"]
    before = torch.load(runs["files"] / "whole/step=1.ckpt", weights_only=True)["state_dict"]
    module = make()
    trained = {f"backbone.{name}" for name in module.backbone.trainable_parameters()}
    assert set(before) == trained
    assert set(file) == trained | {f"backbone.{name}" for name in module.backbone.reference_weights()}
    folder = runs["folders"] / "whole"
    assert {name: value.shape for name, value in meta_weights(folder / "step=4.ckpt").items()} == {
        name: value.shape for name, value in file.items()
    }
    assert (folder / "last.ckpt").is_symlink()
    assert not list(folder.glob(".*part"))
    assert last_checkpoint([folder]).step == 4
    (folder / "step=4.ckpt" / "meta.pt").rename(folder / "step=4.ckpt" / "gone")
    assert last_checkpoint([folder]).step == 3
    (folder / "step=4.ckpt" / "gone").rename(folder / "step=4.ckpt" / "meta.pt")


def test_export_is_the_same_of_folder_and_file(runs, tmp_path):
    for kind, folder in runs.items():
        main(["export", f"--ckpt_path={folder}/whole/step=4.ckpt", f"--output={tmp_path}/{kind}"])
    units = [UNet2DConditionModel.from_pretrained(tmp_path / kind).state_dict() for kind in runs]
    ends = torch.load(runs["folders"] / "whole0.pt", weights_only=True)
    assert equal(units[0], units[1])
    assert all(torch.equal(value, ends[f"denoiser.{name}"]) for name, value in units[0].items())


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_nothing_is_unpickled(runs, tmp_path):
    """Neither the index nor the values of a folder may run code."""
    folder = tmp_path / "foreign.ckpt"
    shutil.copytree(runs["folders"] / "whole/step=4.ckpt", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"its index names pathlib\.\S+Path\.touch|which no checkpoint needs"):
        main(["export", f"--ckpt_path={folder}", f"--output={tmp_path}/out"])
    assert not (tmp_path / "ran").exists()
    save({"optimizer_0": {"lr": Planted(tmp_path / "ran")}}, checkpoint_id=tmp_path / "values", no_dist=True)
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        read_into({"optimizer_0": {"lr": 0.1}}, tmp_path / "values")
    assert not (tmp_path / "ran").exists()
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
        main(["export", f"--ckpt_path={folder}", f"--output={tmp_path}/out"])


def test_unsupported_settings_are_refused(runs, tmp_path):
    """On both devices, with what to set instead."""

    def run():
        cases = [
            (make(lora=LoRA(rank=2)), FSDP2(), {}, r"model\.backbone\.lora is set.*trainer\.strategy to ddp"),
            (make(), FSDP2(), {"precision": "bf16-true"}, r"trainer\.precision is bf16-true, .*32-true and bf16-mixed"),
            (make(Foreign), FSDP2(), {}, r"model\.optimizer is \S+\.Foreign, .*torch\.optim\.AdamW"),
            (
                make(),
                ModelParallelStrategy(2, 1),
                {},
                r"is ModelParallelStrategy, .*set it to \S+\.strategies\.FSDP2",
            ),
            (make_module(), FSDP2(), {"ckpt_path": runs["folders"] / "whole/step=4.ckpt"}, "does not fit this model"),
        ]
        for module, strategy, options, message in cases:
            with pytest.raises(ValueError, match=message):
                fit(module, make_data(), tmp_path, 1, **two(strategy), **options)

    fork_ranks(run)


class PoisonedShard(L.Callback):
    """Makes a part of the first device's gradients NaN at the second step."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1 and trainer.is_global_zero:
            next(iter(pl_module.backbone.trainable_parameters().values())).grad.to_local().fill_(math.nan)


def test_all_devices_skip_what_one_could_not_compute(tmp_path):
    def run():
        module, stopped = make(non_finite="skip"), make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = fit(module, make_data(), tmp_path, 2, callbacks=[PoisonedShard()], **two(FSDP2()))
        with pytest.raises(FloatingPointError, match="step 2: the gradient norm is nan"):
            fit(stopped, make_data(), tmp_path, 2, callbacks=[PoisonedShard()], **two(FSDP2()))
        assert module.skipping.count == 1
        assert equal(full_weights(module), full_weights(stopped))
        assert all(weight.isfinite().all() for weight in full_weights(module).values())
        assert trainer.global_step == 2

    fork_ranks(run)


class Foreign(torch.optim.SGD):
    """An optimizer of another package."""


def test_bfloat16_gathers_half_and_rounds_policy_and_reference_equally(tmp_path):
    """After a copy the loss is ln 2; gathered weights are bfloat16, sharded ones float32.

    Also with gradient checkpointing, and with ZeRO2.
    """

    def run():
        ends = []
        ways = [(False, FSDP2()), (True, FSDP2()), ("selective", FSDP2()), (True, ZeRO2())]
        for checkpointing, strategy in ways:
            module, watch = make(), Losses()
            checkpoint_blocks(module.backbone.denoiser, checkpointing, offload=False, compiles=False)
            seen = set()
            module.backbone.denoiser.conv_in.register_forward_hook(
                lambda conv, *_, seen=seen: seen.add(conv.weight.dtype)
            )
            callbacks = [ReferenceUpdate(2), Sharded(), watch]
            trainer = fit(
                module,
                make_data(batch_size=1),
                tmp_path,
                3,
                callbacks=callbacks,
                **two(strategy, precision="bf16-mixed"),
            )
            ends.append({"losses": watch.losses, "weights": full_weights(module), "gathered": seen})
        torch.save(ends, tmp_path / f"rank{trainer.global_rank}.pt")

    fork_ranks(run)
    plain, recomputed, selective, kept = read(tmp_path)
    assert [abs(loss - math.log(2)) < 1e-6 for loss in plain["losses"]] == [True, False, True]
    for end in (plain, recomputed, selective, kept):
        assert end["gathered"] == {torch.bfloat16}
        assert {weight.dtype for weight in end["weights"].values()} == {torch.float32}
        assert equal(plain["weights"], end["weights"])


class Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
