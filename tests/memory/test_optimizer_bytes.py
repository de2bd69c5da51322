"""Memory of optimizers, measured on the meta device, against counts by hand."""

import pytest
import torch
from bitsandbytes.optim import AdamW8bit

from lit_align.memory import measure_optimizer
from lit_align.training.compensated import compensated


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, momentum=0.9), 4 * (10_000 + 30)),
        (torch.optim.AdamW, 8 * (10_000 + 30) + 2 * 4),
        (lambda p, fused=True: torch.optim.AdamW(p, fused=fused), 8 * (10_000 + 30) + 2 * 4),
        (torch.optim.Adafactor, 4 * (200 + 30) + 2 * 4),  # rows and columns of a matrix, all of a vector
        (AdamW8bit, 2 * 10_000 + 2 * 4 * 40 + 8 * 30 + 2 * 1024),  # one scale per 256 numbers; two maps of 256 numbers
        (lambda p: torch.optim.LBFGS(p), None),
    ],
    ids=["sgd", "momentum", "adamw", "fused", "adafactor", "8bit", "unknown"],
)
def test_optimizer_states_by_hand(optimizer, state):
    found = measure_optimizer(optimizer, [torch.zeros(100, 100), torch.zeros(30)], foreach=True)
    assert (found and found.state) == state


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (torch.optim.AdamW, 8 * 10_030 + 2 * 4),
        (lambda p, fused=True: torch.optim.AdamW(p, fused=fused), 8 * 10_030 + 2 * 4),
        (AdamW8bit, 2 * 10_000 + 2 * 4 * 40 + 8 * 30 + 2 * 1024),
    ],
    ids=["adamw", "fused", "8bit"],
)
def test_compensation_adds_two_bytes_a_weight_to_the_states_of_float32(optimizer, state):
    weights = [torch.zeros(100, 100), torch.zeros(30)]
    half = [weight.bfloat16() for weight in weights]
    found = measure_optimizer(compensated(optimizer), half, foreach=True)
    assert found.state == state + 2 * 10_030
    assert found.step <= 28 * 10_000  # for the largest weight alone: in float32, with its gradient, and its bits


def test_a_foreach_step_needs_a_copy_of_all_tensors():
    weights = [torch.zeros(100, 100)] * 5
    assert measure_optimizer(torch.optim.AdamW, weights, foreach=True).step == 5 * 40_000
    assert measure_optimizer(torch.optim.AdamW, weights, foreach=False).step <= 3 * 40_000
