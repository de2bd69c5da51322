"""`last.ckpt` follows what is written beside it, in one step."""

import os
from pathlib import Path

import pytest

from lit_align.training.checkpoints.last_checkpoint import resumable_step
from lit_align.training.checkpoints.last_link import link
from tests.support.checkpoints import write, write_in_parts


def test_a_link_is_replaced_in_one_step(tmp_path, monkeypatch):
    """A kill in between leaves the old link."""
    first, second = (write(tmp_path / f"{step}.ckpt", step, optimizer_states=[]) for step in (1, 2))
    last = tmp_path / "last.ckpt"
    link(first, last)

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        link(second, last)
    assert os.readlink(last) == "1.ckpt"
    monkeypatch.undo()
    link(second, last)
    assert os.readlink(last) == "2.ckpt"


def test_a_sharded_last_is_replaced(tmp_path):
    write_in_parts(tmp_path / "last.ckpt", 1, lr_schedulers=[])
    link(write_in_parts(tmp_path / "preempted.ckpt", 2, lr_schedulers=[]), tmp_path / "last.ckpt")
    assert os.readlink(tmp_path / "last.ckpt") == "preempted.ckpt"


def test_a_disk_without_links_gets_a_copy(tmp_path, monkeypatch):
    path = write(tmp_path / "1.ckpt", 1, optimizer_states=[])

    def refused(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refused)
    link(path, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["1.ckpt", "last.ckpt"]


def test_a_disk_without_links_gets_a_copy_of_a_sharded_checkpoint(tmp_path, monkeypatch):
    def refused(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refused)
    for step in (1, 2):
        link(write_in_parts(tmp_path / f"{step}.ckpt", step, lr_schedulers=[]), tmp_path / "last.ckpt")
        assert resumable_step(tmp_path / "last.ckpt") == step
    assert sorted(os.listdir(tmp_path)) == ["1.ckpt", "2.ckpt", "last.ckpt"]
