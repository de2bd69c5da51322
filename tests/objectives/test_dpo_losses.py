"""The DPO family's losses against an mpmath twin of 60 digits: value, gradient and limits."""

import math

import mpmath
import pytest
import torch

from lit_align.objectives import BalancedDPO, DiffusionDPO
from lit_align.objectives.dpo_losses import EDGE, FLOOR, LOSSES, soft_sigmoid
from lit_align.types import PairErrors, PairFacts

mpmath.mp.dps = 60
POINTS = [-700.0, -40.0, -3.0, -1.3, -0.7, -1e-7, 0.0, 1e-7, 0.4, 0.9, 1.3, 4.595, 40.0, 700.0]


def s(x):
    return 1 / (1 + mpmath.exp(-x))


def log_s(x):
    return -mpmath.log1p(mpmath.exp(-x))


def dmpo(x):
    wrong = mpmath.mpf("0.01")
    return s(x) * (log_s(x) - mpmath.log(1 - wrong)) + s(-x) * (log_s(-x) - mpmath.log(wrong))


def linear(x):
    """The integral of the slope from the point where it is about 0, up to a constant."""

    def slope(t):
        return -min(max(mpmath.mpf("0.5") - mpmath.mpf("0.4") * t, mpmath.mpf("0.001")), mpmath.mpf("0.999"))

    edge = (mpmath.mpf("0.5") - mpmath.mpf("0.001")) / mpmath.mpf("0.4")
    cuts = sorted({mpmath.mpf(0), *(c for c in (-edge, edge) if 0 < c < x or x < c < 0), x})
    area = mpmath.quad(slope, cuts) if len(cuts) > 1 else mpmath.mpf(0)
    return mpmath.mpf("0.3125") + (area if x > 0 else -area)


TWINS = {
    "sigmoid": lambda x: -log_s(x),
    "hinge": lambda x: max(1 - x, 0),
    "ipo": lambda x: (x - mpmath.mpf("0.5")) ** 2,
    "dmpo": dmpo,
    "linear": linear,
}


def value_and_slope(function, point):
    x = torch.tensor([point], dtype=torch.float64, requires_grad=True)
    value = function(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.item(), slope.item()


@pytest.mark.parametrize("name", TWINS)
def test_losses_match_their_twin_in_value_and_gradient(name):
    assert TWINS.keys() == LOSSES.keys()
    for point in POINTS:
        value, slope = value_and_slope(LOSSES[name], point)
        x = mpmath.mpf(point)
        # The step is far below the digits of float64, and on one side of each kink.
        expected = mpmath.diff(TWINS[name], x, h=mpmath.mpf(10) ** -25)
        assert abs(value - TWINS[name](x)) <= 1e-9 * abs(TWINS[name](x)) + 1e-15, point
        assert abs(slope - expected) <= 1e-9 * abs(expected) + 1e-15, point


@pytest.mark.parametrize("right", [0.5, 0.6, 0.9, 0.98])
def test_a_soft_label_has_its_optimum_at_its_logit(right):
    """Slope 0.5 - q at the reference, -q and 1 - q in the tails, 0 at logit(q)."""
    q = torch.tensor([right], dtype=torch.float64)
    found = [value_and_slope(lambda x: soft_sigmoid(x, q), x)[1] for x in (0.0, -700.0, 700.0)]
    assert found == pytest.approx([0.5 - right, -right, 1 - right], abs=1e-12)
    assert value_and_slope(lambda x: soft_sigmoid(x, q), math.log(right / (1 - right)))[1] == pytest.approx(
        0, abs=1e-12
    )


def test_slopes_at_the_reference_and_far_away():
    """The table of docs/objectives.md: slopes at 0, far on the right side, far on the wrong side."""
    slopes = {name: [value_and_slope(loss, x)[1] for x in (0.0, 700.0, -700.0)] for name, loss in LOSSES.items()}
    assert slopes["sigmoid"] == pytest.approx([-0.5, 0, -1], abs=1e-12)
    assert slopes["hinge"] == [-1, 0, -1]
    assert slopes["ipo"] == [-1, 1399, -1401]
    assert slopes["dmpo"] == pytest.approx([-math.log(99) / 4, 0, 0], abs=1e-12)  # -1.15
    assert slopes["linear"] == pytest.approx([-0.5, -FLOOR, FLOOR - 1], abs=1e-12)
    assert LOSSES["linear"](torch.tensor([EDGE])).item() == pytest.approx(0, abs=2e-3)


def test_the_mix_adds_its_share_of_the_chosen_error_and_its_gradient():
    policy = [torch.tensor([0.10, 0.30], requires_grad=True), torch.tensor([0.30, 0.20], requires_grad=True)]
    reference = PairErrors(torch.tensor([0.15, 0.20]), torch.tensor([0.20, 0.20]))
    plain, mixed = (DiffusionDPO(20.0, sft_mix=mix)(PairErrors(*policy), reference) for mix in (0.0, 0.25))
    assert (mixed.losses - plain.losses).tolist() == pytest.approx([0.025, 0.075], rel=1e-6)
    assert torch.equal(mixed.margin, plain.margin)
    one, two = (torch.autograd.grad(output.losses.sum(), policy) for output in (plain, mixed))
    assert (two[0] - one[0]).tolist() == pytest.approx([0.25, 0.25], rel=1e-5)
    assert torch.equal(two[1], one[1])


def test_soft_labels_come_from_the_vote():
    """Inside is 1.5 and -1.0; the second pair was tied, and a clear vote is believed to 0.98."""
    policy = PairErrors(torch.tensor([0.10, 0.30]), torch.tensor([0.30, 0.20]))
    reference = PairErrors(torch.tensor([0.15, 0.20]), torch.tensor([0.20, 0.20]))
    objective = BalancedDPO(20.0, soft=True)
    assert objective.needs == {"confidence"}
    losses = objective(policy, reference, PairFacts(confidence=torch.tensor([1.0, 0.5]))).losses.tolist()
    first = -0.98 * math.log(1 / (1 + math.exp(-1.5))) - 0.02 * math.log(1 / (1 + math.exp(1.5)))
    second = 0.5 * math.log1p(math.exp(1.0)) + 0.5 * math.log1p(math.exp(-1.0))
    assert losses == pytest.approx([first, second], rel=1e-6)
    hard = BalancedDPO(20.0)
    assert hard.needs == set()
    assert hard(policy, reference).losses[0].item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-6)
    for options in ({"label_smoothing": 0.1}, {"loss_type": "hinge"}):
        with pytest.raises(ValueError, match="soft is true, which gives each pair a label_smoothing"):
            BalancedDPO(soft=True, **options)
