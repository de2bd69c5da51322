"""Disks that are full, files that are damaged or foreign, numbers that are not finite: an error, and nothing lost."""

import logging
import math
import os
import pickle
import re
import resource
import shutil
import tarfile
import warnings
from io import BytesIO
from pathlib import Path

import bitsandbytes
import lightning as L
import pytest
import torch
from jsonargparse import Namespace
from torch.distributed.checkpoint import save as save_in_parts

from lit_align import cli
from lit_align.backbones import LoRA, StableDiffusion
from lit_align.backbones.loading.sharded import replace_folder
from lit_align.callbacks import DivergenceGuard
from lit_align.commands.export import export
from lit_align.objectives import SFT, DiffusionDPO
from lit_align.training.checkpoints.atomic_io import AtomicCheckpointIO, check_writable
from lit_align.training.checkpoints.last_checkpoint import last_checkpoint, last_version
from lit_align.training.config_checks import choose_version
from tests.support.paths import PAIRS
from tests.support.processes import fork_ranks
from tests.support.runs import equal, fit, keep_all, make_data, make_module, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of steps 1 to 3 of a run with LoRA."""
    folder = tmp_path_factory.mktemp("run")
    keep = keep_all(folder, every_n_train_steps=1)
    fit(make_module(lora=LoRA(rank=2)), make_data(), folder, 3, callbacks=[keep])
    return folder


# -- saving


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path):
    path, io = tmp_path / "run.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"global_step": 1, "weights": torch.arange(4.0)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # of a file that is written
    try:
        with pytest.raises(OSError, match=r"step 2 cannot be written to .*run\.ckpt: .*0\.00 GB.* go on with"):
            io.save_checkpoint({"global_step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_what_a_killed_save_left_behind_goes_with_the_next(tmp_path):
    (tmp_path / ".old.ckpt.0123abcd.part").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "new.ckpt")
    assert os.listdir(tmp_path) == ["new.ckpt"]


def test_a_folder_that_cannot_be_written_to_is_said_at_the_start(tmp_path):
    check_writable(tmp_path / "new/checkpoints")
    assert list((tmp_path / "new/checkpoints").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Checkpoints cannot be written to .*file/checkpoints: .*Make it writable, or"):
        check_writable(tmp_path / "file/checkpoints")


# -- the last one


def test_last_is_the_greatest_whole_step(tmp_path, run, caplog):
    folder = tmp_path / "version_3/checkpoints"
    shutil.copytree(run, folder)
    (folder / "last.ckpt").symlink_to("step=3.ckpt")
    assert last_checkpoint([folder]) == (folder / "step=3.ckpt", 3)
    assert last_version(tmp_path) == 3

    whole = (folder / "step=3.ckpt").read_bytes()
    (folder / "step=3.ckpt").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint([folder]) == (folder / "step=2.ckpt", 2)
    assert "step=3.ckpt is damaged" in caplog.text

    later = tmp_path / "version_12/checkpoints"
    later.mkdir(parents=True)
    assert last_version(tmp_path) == 3  # the later one holds none
    torch.save({"global_step": 9, "state_dict": {}}, later / "restored.ckpt")
    assert last_version(tmp_path) == 3  # weights alone, from which no run goes on
    assert last_checkpoint([tmp_path / "none"]) is None


def test_last_goes_on_in_the_logger_s_last_folder(tmp_path, run):
    shutil.copytree(run, tmp_path / "mapo/version_3/checkpoints")
    (tmp_path / "mapo/version_4").mkdir()
    numbered = {"save_dir": str(tmp_path), "name": "mapo", "version": None}
    for init_args, version in (
        (numbered, 3),
        (numbered | {"version": "mine"}, "mine"),
        (numbered | {"name": "x"}, None),
    ):
        logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=Namespace(init_args))
        choose_version(logger)
        assert logger.init_args.version == version
    choose_version(None)  # Lightning's own


def write_in_parts(folder, step, **meta):
    """A checkpoint as sharded runs write it."""
    save_in_parts({"state_dict": {"backbone.x": torch.arange(6.0)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": step, **meta}, folder / "meta.pt")
    return folder


def test_a_checkpoint_in_parts_counts_if_it_is_whole_and_has_the_optimizer(tmp_path, caplog):
    whole = write_in_parts(tmp_path / "a.ckpt", 1, lr_schedulers=[])
    write_in_parts(tmp_path / "restored.ckpt", 9)  # weights alone
    cut, short = (write_in_parts(tmp_path / f"{name}.ckpt", 8, lr_schedulers=[]) for name in ("cut", "short"))
    (part,) = cut.glob("*.distcp")
    part.unlink()
    (part,) = short.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-40])
    assert last_checkpoint([tmp_path]).path == whole
    assert re.search(r"cut\.ckpt is damaged \(its part \S+ is missing\)", caplog.text)
    assert re.search(r"short\.ckpt is damaged \(its part \S+ is cut\)", caplog.text)
    with pytest.raises(ValueError, match=r"each device of a sharded run.*training\.strategies\.FSDP2 or ZeRO2"):
        AtomicCheckpointIO().load_checkpoint(whole)


def test_a_folder_takes_the_place_of_another_that_stays_whole(tmp_path, monkeypatch):
    """A kill between the two renames leaves the old one under a name that is found."""
    old = write_in_parts(tmp_path / "preempted.ckpt", 1, lr_schedulers=[])
    new = write_in_parts(tmp_path / ".preempted.ckpt.part", 2, lr_schedulers=[])
    rename = Path.rename

    def killed(self, target):
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(old, new)
    assert last_checkpoint([tmp_path]).step == 1
    monkeypatch.undo()
    replace_folder(old, new)
    assert last_checkpoint([tmp_path]) == (old, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["preempted.ckpt"]


# -- resuming from the wrong file


def resume(module, path, folder):
    io = AtomicCheckpointIO()
    return fit(module, make_data(), folder, 4, ckpt_path=path, plugins=[io])


def other_target(lora):
    """The same network, whose scheduler asks for another target."""
    module = make_module(lora=lora)
    module.backbone.schedule.prediction_type = "v_prediction"
    return module


def test_foreign_checkpoints_are_refused(tmp_path, run, sd15):
    whole = run / "step=3.ckpt"
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole.read_bytes()[:20_000])
    lora = LoRA(rank=2)
    for module, path, message in (
        (make_module(lora=lora), cut, r"cut\.ckpt is not a checkpoint, or is damaged .* Resume with --ckpt_path last"),
        (make_module(lora=lora), tmp_path / "no.ckpt", r"there is no such file\. --ckpt_path last finds"),
        (make_module(), whole, r"212 trained weights are missing .* Resume with the model\.backbone"),
        (
            make_module(lora=LoRA(rank=4)),
            whole,
            r"64 weights have another shape, such as .*\(2, 64\) in the",
        ),
        (make_module(lora=lora, repo=sd15, backbone=StableDiffusion), whole, "64 weights have another shape"),
        (
            make_module(lora=lora, objective=SFT()),
            whole,
            "began with the objective MaPO, not SFT. Resume with",
        ),
        (make_module(1, lora=lora), whole, "began with seed_everything 0, not 1"),
        (
            make_module(lora=LoRA(rank=2, alpha=16)),
            whole,
            r"began with lora \{'rank': 2, 'alpha': 8, .*'alpha': 16, .*Resume with the model\.backbone",
        ),
        (other_target(lora), whole, "began with prediction_type epsilon, not v_prediction"),
    ):
        before = weights(module)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            resume(module, path, tmp_path)
        assert equal(weights(module), before)


def test_devices_that_see_different_checkpoints_do_not_begin(tmp_path):
    def train(steps, path, *callbacks):
        two = {"devices": 2, "strategy": "ddp"}
        fit(make_module(lora=LoRA(rank=2)), make_data(), tmp_path, steps, path, callbacks, **two)

    def resume():
        rank = int(os.environ["RANK"])
        begins = f"Device {rank} begins at epoch 0, batch {(2, 0)[rank]}, has 52 pairs"
        with pytest.raises(ValueError, match=begins):
            train(4, (tmp_path / "step=2.ckpt", None)[rank])

    fork_ranks(lambda: train(2, None, keep_all(tmp_path)))
    fork_ranks(resume)


# -- nothing is executed


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_planted_pickle_does_not_run(tmp_path, run):
    target = tmp_path / "it_ran"
    for name, save in (
        ("zip.ckpt", torch.save),
        ("raw.ckpt", lambda value, path: path.write_bytes(pickle.dumps(value))),
    ):
        path = tmp_path / name
        save({"global_step": 7, "optimizer_states": [], "state_dict": {}, "lit_align": Evil(target)}, path)
        with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
            resume(make_module(lora=LoRA(rank=2)), path, tmp_path)
        with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
            export(path, tmp_path / "unet")
    shutil.copy(run / "step=2.ckpt", tmp_path / "good.ckpt")
    assert last_checkpoint([tmp_path]) == (tmp_path / "good.ckpt", 2)
    assert not target.exists()
    pickle.loads((tmp_path / "raw.ckpt").read_bytes())  # it would have
    assert target.exists()


def test_a_tar_member_does_not_escape(tmp_path):
    """Members are read, never unpacked: one of another folder is a sample like any other, or a broken one."""
    shard, inside = tmp_path / "shards/00000.tar", tmp_path / "shards"
    inside.mkdir()
    with tarfile.open(PAIRS / "train/00000.tar") as source, tarfile.open(shard, "w") as tar:
        for member in source:
            data = source.extractfile(member).read()
            for name in (member.name, f"../../escaped/{member.name}", f"{tmp_path}/escaped/{member.name}"):
                copy = tarfile.TarInfo(name)
                copy.size = len(data)
                tar.addfile(copy, BytesIO(data))
        link = tarfile.TarInfo("link.jpg_0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(SystemExit):  # broken samples
        cli.main(["inspect", "--shards", str(shard), "--output", str(tmp_path / "report")])
    assert sorted(os.listdir(tmp_path)) == ["report", "shards"]
    assert not any("escaped" in path.name for path in tmp_path.rglob("*"))


# -- the optimizer in 8 bits


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
    assert {moment.dtype for moment in moments} == {torch.uint8, torch.float32}  # those of 4,096 elements, and less
    resumed = module()
    fit(resumed, make_data(), tmp_path, 5, ckpt_path=tmp_path / "step=3.ckpt")
    assert equal(weights(resumed), weights(whole))


# -- numbers that are not finite


class Poison(L.Callback):
    """Makes gradients of one rank infinite at some steps."""

    def __init__(self, *steps):
        self.steps, self.remove = steps, lambda: None

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step in self.steps and trainer.is_global_zero:
            weight = next(iter(pl_module.backbone.trainable_parameters().values()))
            weight.register_hook(
                lambda gradient: gradient * float("nan") if trainer.global_step in self.steps else None
            )


def test_a_step_without_finite_gradients_stops_the_run(tmp_path):
    module = make_module(lora=LoRA(rank=2))
    with pytest.raises(FloatingPointError, match=r"^step 3: the gradient norm is nan.* from before this step"):
        fit(module, make_data(), tmp_path, 5, callbacks=[Poison(2)])
    two = make_module(lora=LoRA(rank=2))
    fit(two, make_data(), tmp_path, 2)
    assert equal(weights(module), weights(two))


def test_skipped_steps_are_counted_up_to_a_limit_and_over_a_resume(tmp_path):
    def module():
        return make_module(lora=LoRA(rank=2), non_finite="skip", skip_limit=2)

    first = module()
    callbacks = [Poison(1, 2), keep_all(tmp_path, every_n_train_steps=1), DivergenceGuard(max_rise=100.0)]
    with pytest.warns(UserWarning, match=r"step 3: the gradient norm is nan.*\(2 of model\.skip_limit 2\)"):
        fit(first, make_data(), tmp_path, 3, callbacks=callbacks)
    one = make_module(lora=LoRA(rank=2))
    fit(one, make_data(), tmp_path, 1)
    assert equal(weights(first), weights(one))
    assert first.skipping.count == 2

    resumed = module()
    with pytest.raises(FloatingPointError, match=r"step 4: .* one more than model\.skip_limit 2"):
        fit(resumed, make_data(), tmp_path, 5, ckpt_path=tmp_path / "step=3.ckpt", callbacks=[Poison(3)])


class PoisonErrors(L.Callback):
    """The chosen errors of a step, and so its gradients, are not finite."""

    def __init__(self, *steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            with torch.no_grad():
                self.weight = next(iter(pl_module.backbone.trainable_parameters().values()))
                self.kept = self.weight.clone()
                self.weight.fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps:
            with torch.no_grad():
                self.weight.copy_(self.kept)


def test_the_guard_lets_a_skipped_step_be(tmp_path):
    """Its errors are not finite either, and are no sign of a run that has gone too far."""
    module, guard = make_module(lora=LoRA(rank=2), non_finite="skip"), DivergenceGuard(max_rise=100.0, window=1)
    with pytest.warns(UserWarning, match="step 3: the gradient norm is nan"):
        trainer = fit(module, make_data(), tmp_path, 5, callbacks=[PoisonErrors(2), guard])
    assert trainer.global_step == 5
    assert guard.seen is None
    assert math.isfinite(sum(step[0] for step in guard.recent))


def test_a_run_that_was_stopped_does_not_go_on_past_the_step(tmp_path):
    """Its checkpoint of that step says so; `skip` goes on from there."""
    module = make_module(lora=LoRA(rank=2))
    with pytest.raises(FloatingPointError):
        fit(module, make_data(), tmp_path, 5, callbacks=[Poison(2), keep_all(tmp_path, every_n_train_steps=1)])
    path = tmp_path / "step=3.ckpt"
    with pytest.raises(ValueError, match=r"ended at this checkpoint's step: the gradient norm is nan.*non_finite skip"):
        fit(make_module(lora=LoRA(rank=2)), make_data(), tmp_path, 5, ckpt_path=path)
    skipping = make_module(lora=LoRA(rank=2), non_finite="skip")
    fit(skipping, make_data(), tmp_path, 5, ckpt_path=path)
    assert skipping.skipping.count == 1


class Scaled(L.Callback):
    """Gives the Trainer a gradient scaler, as it has in 16-mixed on a GPU."""

    def __init__(self, scale):
        self.scale = scale

    def on_train_start(self, trainer, pl_module):
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
        trainer.precision_plugin.scaler.scale(torch.ones(1))  # which makes the scale a tensor


@pytest.mark.parametrize(("scale", "left_out"), [(0.5, 1), (2.0, 0)])
def test_with_a_scaler_steps_count_once_half_precision_is_not_to_blame(tmp_path, scale, left_out):
    module = make_module(lora=LoRA(rank=2), non_finite="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, make_data(), tmp_path, 2, callbacks=[Poison(1), Scaled(scale)])
    assert module.skipping.count == left_out


def test_all_ranks_skip_what_one_could_not_compute(tmp_path):
    def work():
        module = make_module(lora=LoRA(rank=2), objective=DiffusionDPO(), non_finite="skip")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(module, make_data(), tmp_path, 3, callbacks=[Poison(1)], devices=2, strategy="ddp")
        result = {"weights": weights(module), "skipped": module.skipping.count}
        torch.save(result, tmp_path / f"{os.environ['RANK']}.pt")

    fork_ranks(work)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [result["skipped"] for result in results] == [1, 1]
    assert equal(results[0]["weights"], results[1]["weights"])
    assert all(weight.isfinite().all() for weight in results[0]["weights"].values())


@pytest.mark.parametrize(
    ("options", "message"), [({"non_finite": "go"}, "must be stop or skip"), ({"skip_limit": 0}, "at least 1")]
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_module(lora=LoRA(rank=2), **options)
