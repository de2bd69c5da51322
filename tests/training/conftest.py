"""Runs that several files of this folder start from."""

import pytest

from lit_align.backbones import LoRA
from tests.support.runs import fit, keep_all, make_data, make_module


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory):
    """Folder with the checkpoints of steps 1 to 3 of a run that trains a LoRA."""
    folder = tmp_path_factory.mktemp("run")
    keep = keep_all(folder, every_n_train_steps=1)
    fit(make_module(lora=LoRA(rank=2)), make_data(), folder, 3, callbacks=[keep])
    return folder
