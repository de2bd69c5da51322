"""Settings of every test process, and the pipelines that several files share.

Libraries are imported late: the process that hands out the tests to others needs none.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest

LONGEST = ("slurm", "accelerator_benchmark", "peers_benchmark", "kills", "cli", "notebooks", "sharding")
LONGEST += ("divergence_guard", "resume", "preemption", "reference", "doctor", "test_command", "estimate", "scoring")
LONGEST += ("win_rate_callback", "assets")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that at the end no process waits for another one's long file."""
    names = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import the tests without searches for garbage, and keep what is there then out of all later ones.

    A search through all of it takes half a CPU second, and each training makes some.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _few_threads():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_rank(monkeypatch):
    """A test that takes itself for process 3 leaves no trace: later ones would log and write nothing."""
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 0)


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    from tests.support.pipelines import write_stable_diffusion

    return write_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd15", "epsilon")


@pytest.fixture(scope="session")
def sd21(tmp_path_factory):
    from tests.support.pipelines import write_stable_diffusion

    return write_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd21", "v_prediction")
