"""The scripts in docs/examples run as the pages say."""

import subprocess
import sys

import torch

from lit_align.data.importers.folders import open_folders
from tests.support.paths import ROOT


def run(*words):
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def test_training_without_the_command_line(tmp_path):
    run("docs/examples/train.py", "--max_steps", 1, "--output", tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    assert checkpoint["lit_align"]["objective"] == "MaPO"


def test_unpacked_pairs_are_two_folders_with_captions(tmp_path):
    shard = ROOT / "assets/emoji/pairs/flat-over-color/held_out/00002.tar"
    run("docs/examples/unpack_pairs.py", shard, tmp_path)
    folders = open_folders(tmp_path / "good", tmp_path / "bad", None)
    assert folders.rows > 10
    assert all(len(name.chosen) == len(name.rejected) == len(name.captions) == 1 for name in folders.names)
