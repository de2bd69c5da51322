"""Full disks, damaged and foreign checkpoints, hostile files: an error, and nothing is lost or executed."""

import os
import pickle
import resource
import shutil
import tarfile
from io import BytesIO

import pytest
import torch

from lit_align import cli
from lit_align.backbones import LoRA, StableDiffusion
from lit_align.commands.export import export
from lit_align.objectives import SFT
from lit_align.training.checkpoints.atomic_io import AtomicCheckpointIO, check_writable
from lit_align.training.checkpoints.last_checkpoint import last_checkpoint
from tests.support.paths import PAIRS
from tests.support.processes import fork_ranks
from tests.support.runs import equal, fit, keep_all, make_data, make_module, weights


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path, io = tmp_path / "run.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"global_step": 1, "weights": torch.arange(4.0)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the greatest size of a written file
    try:
        with pytest.raises(OSError, match=r"step 2 cannot be written to .*run\.ckpt: .*0\.00 GB.* resume with"):
            io.save_checkpoint({"global_step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_leftovers_of_a_killed_save_are_deleted_by_the_next(tmp_path):
    (tmp_path / ".old.ckpt.0123abcd.part").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "new.ckpt")
    assert os.listdir(tmp_path) == ["new.ckpt"]


def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(tmp_path):
    check_writable(tmp_path / "new/checkpoints")
    assert list((tmp_path / "new/checkpoints").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Checkpoints cannot be written to .*file/checkpoints: .*Make it writable, or"):
        check_writable(tmp_path / "file/checkpoints")


def resume(module, path, folder):
    io = AtomicCheckpointIO()
    return fit(module, make_data(), folder, 4, ckpt_path=path, plugins=[io])


def other_target(lora):
    """Make a module whose scheduler asks for another target."""
    module = make_module(lora=lora)
    module.backbone.schedule.prediction_type = "v_prediction"
    return module


def test_foreign_checkpoints_are_refused(tmp_path, lora_run, sd15):
    whole = lora_run / "step=3.ckpt"
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
            r"began with another backbone: lora\.alpha was 8, is 16\. Resume with the model\.backbone",
        ),
        (
            other_target(lora),
            whole,
            r"began with another backbone: prediction_type was \"epsilon\", is \"v_prediction\"",
        ),
    ):
        before = weights(module)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            resume(module, path, tmp_path)
        assert equal(weights(module), before)


def test_devices_that_see_different_checkpoints_are_refused(tmp_path):
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


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_planted_pickle_does_not_run(tmp_path, lora_run):
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
    shutil.copy(lora_run / "step=2.ckpt", tmp_path / "good.ckpt")
    assert last_checkpoint([tmp_path]) == (tmp_path / "good.ckpt", 2)
    assert not target.exists()
    pickle.loads((tmp_path / "raw.ckpt").read_bytes())  # proves that the file was hostile
    assert target.exists()


def test_a_tar_member_does_not_escape(tmp_path):
    """Members are read, never unpacked: a path that leads outside is only a sample's name."""
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
