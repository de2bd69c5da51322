"""The last complete checkpoint of a run is found, as a file or as a folder of parts."""

import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from lit_align.backbones.loading.sharded import replace_folder
from lit_align.training.checkpoints.atomic_io import AtomicCheckpointIO
from lit_align.training.checkpoints.last_checkpoint import (
    checkpoint_to_resume,
    last_checkpoint,
    last_version,
    newer_beside,
)
from lit_align.training.config_checks import choose_version
from tests.support.checkpoints import write, write_in_parts


def test_last_is_the_greatest_complete_step(tmp_path, lora_run, caplog):
    folder = tmp_path / "version_3/checkpoints"
    shutil.copytree(lora_run, folder)
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
    assert last_version(tmp_path) == 3  # the later folder holds none
    torch.save({"global_step": 9, "state_dict": {}}, later / "restored.ckpt")
    with pytest.raises(ValueError, match=r"can resume from none of the 1 checkpoints in .*version_12"):
        last_version(tmp_path)  # weights alone; version 3 is another run
    assert last_checkpoint([tmp_path / "none"]) is None


def test_the_greatest_step_is_last_whatever_was_written_last(tmp_path):
    """A copied or restored file is new, and not the newest state; of equal steps the newest file counts."""
    third = write(tmp_path / "a.ckpt", 3, optimizer_states=[])
    second = write(tmp_path / "b.ckpt", 2, optimizer_states=[])
    os.utime(third, (1, 1))
    assert last_checkpoint([tmp_path]) == (third, 3)
    assert newer_beside(second) == (2, (third, 3))
    assert newer_beside(third) == (3, None)
    again = write(tmp_path / "c.ckpt", 3, optimizer_states=[])
    assert last_checkpoint([tmp_path]) == (again, 3)


@pytest.mark.parametrize("kind", ["damaged", "weights alone"])
def test_last_is_an_error_where_no_run_can_resume(tmp_path, kind):
    """It would begin at step 0 in a job that is requeued."""
    path = write(tmp_path / "version_4/checkpoints/x.ckpt", 9)
    if kind == "damaged":
        path.write_bytes(b"cut")
    with pytest.raises(
        ValueError, match=r"ckpt_path last: a run can resume from none of the 1 checkpoints in .*x\.ckpt"
    ):
        checkpoint_to_resume([tmp_path, path.parent])
    assert checkpoint_to_resume([tmp_path / "none"]) is None
    write(tmp_path / "version_3/checkpoints/y.ckpt", 2, optimizer_states=[])
    with pytest.raises(ValueError, match="can resume from none"):
        last_version(tmp_path)  # not another run's


def test_last_resumes_in_the_logger_s_last_folder(tmp_path, lora_run):
    shutil.copytree(lora_run, tmp_path / "mapo/version_3/checkpoints")
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


def test_a_folder_counts_if_it_is_complete_and_has_the_optimizer(tmp_path, caplog):
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


def test_replacing_a_folder_keeps_one_of_both_complete(tmp_path, monkeypatch):
    """A kill between the two renames leaves the old folder under a name that is found."""
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
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace_folder(old, new)
    assert last_checkpoint([tmp_path]) == (old, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["preempted.ckpt"]
    assert synced == [str(new / "meta.pt")]  # before it is renamed
