"""The page of metrics names what runs log, no more and no less."""

import re

import pytest

from lit_align.callbacks import ChosenErrorRise, DivergenceGuard, ReferenceUpdate, SampleGrid, Throughput, WinRate
from lit_align.data import PreferenceDataModule
from lit_align.objectives import BalancedDPO, MaPO, WinnerGuard
from lit_align.scoring import Sharpness
from lit_align.scoring.vote import Vote
from tests.support.paths import PAIRS, ROOT
from tests.support.runs import KeepLogs, fit, make_data, make_module

ROW = re.compile(r"^\| (`[^|]+) \|", re.MULTILINE)
INCIDENTAL = {"epoch"}  # Lightning's own


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Names that a run without and one with reference and votes log, with all callbacks."""
    folder = tmp_path_factory.mktemp("runs")
    vote = Vote(["clip", "style", "colour"], margins={"clip": 0.004, "style": 0.4, "colour": 4.0})
    options = {"resolution": 32, "batch_size": 2, "num_workers": 0, "vote": vote}
    voted = PreferenceDataModule(str(PAIRS / "train/00000.tar"), str(PAIRS / "held_out/00002.tar"), **options)
    names, guarded = set(), WinnerGuard(BalancedDPO(soft=True))
    for objective, data, more in ((MaPO(), make_data(), []), (guarded, voted, [ReferenceUpdate(1)])):
        logs = KeepLogs()
        sampling = {"height": 32, "width": 32, "steps": 1}
        watching = [ChosenErrorRise(), DivergenceGuard(), Throughput()]
        drawing = [SampleGrid(["fox"], **sampling), WinRate(["fox"], {"sharpness": Sharpness()}, **sampling)]
        validation = {"limit_val_batches": 2, "val_check_interval": 1, "check_val_every_n_epoch": None}
        callbacks = [*watching, *drawing, *more]
        # Two of four ranges of timesteps and more are seen in a few steps; the page describes ranges by a pattern.
        fit(make_module(objective=objective), data, folder, 3, callbacks=callbacks, logger=logs, log_every_n_steps=1,
            **validation)  # fmt: skip
        names |= {name for _, values in logs.rows for name in values}
    return names - INCIDENTAL


def patterns():
    """Names in the first column of the page's tables, as regular expressions."""
    cells = ROW.findall((ROOT / "docs/metrics.md").read_text())
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) == len(set(names)) > 50
    return {name: re.escape(name).replace("LOW\\-HIGH", r"\d+-\d+").replace("SCORER", "[a-z]+") for name in names}


def test_page_describes_all_that_is_logged(logged):
    known = [re.compile(pattern) for pattern in patterns().values()]
    assert sorted(name for name in logged if not any(pattern.fullmatch(name) for pattern in known)) == []


def test_all_that_the_page_describes_is_logged(logged):
    assert [name for name, pattern in patterns().items() if not any(re.fullmatch(pattern, n) for n in logged)] == []
