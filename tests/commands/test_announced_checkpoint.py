"""Commands say of which step a checkpoint is, and of a newer one beside it."""

import torch

from lit_align.commands.shared.announced_checkpoint import announce_checkpoint


def test_the_step_is_said_and_a_newer_one_beside_it(tmp_path, capsys):
    for step in (10, 1030):
        torch.save({"global_step": step, "optimizer_states": []}, tmp_path / f"step={step}.ckpt")
    last = tmp_path / "last.ckpt"
    last.symlink_to("step=10.ckpt")
    announce_checkpoint(last)
    said = capsys.readouterr()
    assert said.out == f"{last} -> step=10.ckpt: checkpoint of step 10\n"
    assert said.err == f"warning: a newer one lies beside {last}: step=1030.ckpt of step 1,030\n"
    announce_checkpoint(tmp_path / "step=1030.ckpt")
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/step=1030.ckpt: checkpoint of step 1,030\n"
    assert said.err == ""
