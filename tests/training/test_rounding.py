"""Which weights in half precision a step can change, counted by hand."""

import pytest
import torch

from lit_align.callbacks import StartBanner
from lit_align.training.compensated import compensated
from lit_align.training.rounding import moving_share, rounding_line
from tests.support.paths import PIPELINE
from tests.support.runs import fit, make_data, make_module


def test_a_weight_moves_where_the_change_is_half_a_unit_in_its_last_place():
    """In bfloat16, numbers from 1 to 2 are 1/128 apart and those from 1/2 to 1 1/256."""
    weights = torch.tensor([1.5, 0.75, 0.375, 0.0], dtype=torch.bfloat16)
    assert moving_share([weights], 1 / 100) == 1
    assert moving_share([weights], 1 / 300) == 0.75  # not 1.5: it needs 1/256
    assert moving_share([weights], 1 / 1000) == 0.5  # nor 0.75: it needs 1/512
    assert moving_share([weights.float()], 1e-6) == 1
    assert moving_share([weights[:1], weights[1:]], 1 / 300) == 0.75


def test_the_line_says_the_share_and_the_reason():
    weights = [torch.nn.Parameter(torch.tensor([1.5, 0.75, 0.375, 0.0], dtype=torch.bfloat16))]
    adam = torch.optim.AdamW([{"params": weights, "lr": 0.0, "initial_lr": 1 / 1000}])  # a warm-up begins at 0
    line = rounding_line(adam, "bf16-true")
    assert line.startswith(
        "bf16-true: 50.0% of the weights can change in a step of the learning rate 0.001, as changes"
    )
    assert line.endswith(
        "less than 1/512 of a weight are rounded away; bf16-mixed keeps float32 weights, model.compensate_rounding the "
        "bits beyond bfloat16"
    )
    assert rounding_line(adam, "16-true").endswith("rounded away; bf16-mixed keeps float32 weights")
    kept = compensated(torch.optim.AdamW)(weights)
    assert rounding_line(kept, "bf16-true").endswith("so that steps act as on float32 weights")
    assert "of the weights can" not in rounding_line(torch.optim.SGD(weights, lr=0.1), "bf16-true")
    assert rounding_line(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]), "32-true") is None


def test_fit_says_it_at_the_start(tmp_path, caplog):
    module = make_module(repo=PIPELINE)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6)
    with caplog.at_level("INFO"):
        fit(module, make_data(), tmp_path, 1, callbacks=[StartBanner()], precision="bf16-true")
    (line,) = (line for line in caplog.text.splitlines() if line.startswith("  rounding "))
    share = float(line.split("bf16-true: ")[1].split("%")[0])
    assert share == pytest.approx(1.0, abs=0.5)
