"""Objectives against numbers computed by hand and by an mpmath twin of 60 digits."""

import inspect
import math

import mpmath
import pytest
import torch

from lit_align.objectives import SFT, BalancedDPO, DiffusionDPO, MaPO, Objective, PaperMaPO
from lit_align.objectives.wrappers import NoiseErrors, WinnerGuard, Wrapper
from lit_align.training.metrics import weighted_mean
from lit_align.types import PairErrors

mpmath.mp.dps = 60


def phi(x):
    return x / mpmath.expm1(x)


def released(w, l):
    return w + mpmath.mpf("0.1") * mpmath.log1p(mpmath.exp(-1000 * (phi(w / 2) - phi(l / 2))))


def paper(beta):
    return lambda w, l: w + mpmath.log1p(mpmath.exp(-(phi(w) ** beta - phi(l) ** beta))) / beta


def errors_of_all_sizes(count):
    """Return (2, count) float32 errors from 1e-8 to 100; some pairs are nearly or exactly equal."""
    generator = torch.Generator().manual_seed(0)
    values = (10 ** (torch.rand(2, count, generator=generator, dtype=torch.float64) * 10 - 8)).float()
    near = 1 + 1e-3 * torch.randn(count // 4, generator=generator)
    values[1, : count // 4] = values[0, : count // 4] * near
    values[1, :3] = values[0, :3]
    return values


@pytest.mark.parametrize(
    ("objective", "twin"),
    [(MaPO(), released), (PaperMaPO(), paper(8)), (PaperMaPO(64.0), paper(64)), (PaperMaPO(1024.0), paper(1024))],
    ids=["released", "paper-8", "paper-64", "paper-1024"],
)
def test_mapo_matches_the_twin_in_value_and_gradient(objective, twin):
    values = errors_of_all_sizes(120)
    for w, l in zip(*values, strict=True):
        leaves = [w.reshape(1).requires_grad_(), l.reshape(1).requires_grad_()]
        loss = weighted_mean(objective(PairErrors(*leaves), None).losses, torch.ones(1)).float()
        gradients = torch.autograd.grad(loss, leaves)
        a, b = mpmath.mpf(w.item()), mpmath.mpf(l.item())
        expected = [
            twin(a, b),
            mpmath.diff(lambda x, b=b: twin(x, b), a, h=a * mpmath.mpf(10) ** -20),
            mpmath.diff(lambda x, a=a: twin(a, x), b, h=b * mpmath.mpf(10) ** -20),
        ]
        for ours, exact in zip([loss, *gradients], expected, strict=True):
            # Below float32's smallest normal number only an absolute error makes sense.
            assert abs(ours.item() - exact) <= 1e-5 * abs(exact) + 1e-38


@pytest.mark.parametrize("objective", [MaPO(), PaperMaPO(), PaperMaPO(1024.0)])
def test_mapo_is_finite_at_zero_and_beyond_float_range_of_exp(objective):
    w = torch.tensor([0.0, 0.0, 1e4, 1e4, 1e-30], requires_grad=True)
    l = torch.tensor([0.0, 1e4, 0.0, 1e4, 1e-30], requires_grad=True)
    output = objective(PairErrors(w, l), None)
    output.losses.mean().backward()
    assert torch.isfinite(output.losses).all()
    assert torch.isfinite(w.grad).all()
    assert torch.isfinite(l.grad).all()
    assert output.margin[0] == 0
    assert output.margin[1] > 0 > output.margin[2]


def test_mapo_by_hand():
    # phi(0.1) = 0.1 / (e^0.1 - 1) = 0.95083306; phi(0.05) = 0.97520831; at s = 0.5 they differ by 0.02437525
    output = MaPO()(PairErrors(torch.tensor([0.1]), torch.tensor([0.2])), None)
    assert output.margin.item() == pytest.approx(24.3752, rel=1e-5)  # the logit: T times the difference
    assert output.terms["loss/preference"].item() == pytest.approx(0.1 * math.log1p(math.exp(-24.3752)), rel=1e-3)
    assert output.losses.mean().item() == pytest.approx(0.1, rel=1e-6)
    # equal errors: the margin is 0, its term 0.1 ln 2, the gradients -/+ 0.1 * 1000 / 2 * phi'(s L) s
    w, l = torch.tensor([0.1], requires_grad=True), torch.tensor([0.1], requires_grad=True)
    output = MaPO()(PairErrors(w, l), None)
    output.losses.mean().backward()
    assert output.losses.mean().item() == pytest.approx(0.1 + 0.1 * math.log(2), rel=1e-6)
    assert l.grad.item() == pytest.approx(-12.2918, rel=1e-4)  # 50 * 0.5 * -0.49167
    assert w.grad.item() == pytest.approx(1 + 12.2918, rel=1e-4)


def test_paper_form_by_hand():
    a, b = 0.1 / math.expm1(0.1), 0.2 / math.expm1(0.2)
    margin = a**8 - b**8
    output = PaperMaPO(8.0)(PairErrors(torch.tensor([0.1]), torch.tensor([0.2])), None)
    assert output.margin.item() == pytest.approx(margin, rel=1e-6)
    assert output.losses.mean().item() == pytest.approx(0.1 + math.log1p(math.exp(-margin)) / 8, rel=1e-6)


def test_near_zero_the_released_form_is_dpo_like():
    # the margin is about (T s / 2) (L_l - L_w) = 250 (L_l - L_w)
    output = MaPO()(PairErrors(torch.tensor([1e-6]), torch.tensor([3e-6])), None)
    assert output.margin.item() == pytest.approx(250 * 2e-6, rel=1e-5)


def test_sft_is_the_chosen_error():
    output = SFT()(PairErrors(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.1])), None)
    assert output.losses.mean().item() == pytest.approx(0.2)
    assert output.margin.tolist() == pytest.approx([0.1, -0.2])


def errors(chosen, rejected):
    return PairErrors(torch.tensor(chosen), torch.tensor(rejected))


# inside / beta: -0.5 ((0.10 - 0.30) - (0.15 - 0.20)) = 0.075, and of the second pair -0.5 (0.1 - 0.0) = -0.05
POLICY, REFERENCE = errors([0.10, 0.30], [0.30, 0.20]), errors([0.15, 0.20], [0.20, 0.20])


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        ({"beta_dpo": 20.0}, [math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.0))]),
        (
            {"beta_dpo": 20.0, "label_smoothing": 0.1},
            [
                0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5)),
                0.9 * math.log1p(math.exp(1.0)) + 0.1 * math.log1p(math.exp(-1.0)),
            ],
        ),
        ({"beta_dpo": 20.0, "loss_type": "hinge"}, [0.0, 2.0]),
        ({"beta_dpo": 20.0, "loss_type": "ipo"}, [(1.5 - 0.5) ** 2, (-1.0 - 0.5) ** 2]),
        ({"beta_dpo": 20.0, "loss_type": "hinge", "sft_mix": 0.25}, [0.0 + 0.25 * 0.10, 2.0 + 0.25 * 0.30]),
    ],
)
@pytest.mark.parametrize("objective", [DiffusionDPO, BalancedDPO])
def test_dpo_by_hand(objective, options, losses):
    output = objective(**options)(POLICY, REFERENCE)
    assert output.losses.tolist() == pytest.approx(losses, rel=1e-5, abs=1e-7)
    assert output.margin.tolist() == pytest.approx([1.5, -1.0], rel=1e-5)
    assert output.terms["chosen_drift"].tolist() == pytest.approx([-0.05, 0.10], rel=1e-5)
    assert output.terms["rejected_drift"].tolist() == pytest.approx([0.10, 0.0], rel=1e-5, abs=1e-7)
    assert output.terms["chosen_worse"].tolist() == [0, 1]


def test_dpo_matches_the_twin_in_value_and_gradient():
    """Also where reference and policy nearly agree, so that float32 loses digits in the difference."""
    policy, reference = errors_of_all_sizes(100), errors_of_all_sizes(100).flip(1)
    policy[:, 50:] = reference[:, 50:] * (1 + 1e-5 * torch.randn(2, 50, generator=torch.Generator().manual_seed(1)))

    def twin(w, l, rw, rl):
        return mpmath.log1p(mpmath.exp(mpmath.mpf(2500) * ((w - l) - (rw - rl))))

    for w, l, rw, rl in zip(*policy, *reference, strict=True):
        leaves = [w.reshape(1).requires_grad_(), l.reshape(1).requires_grad_()]
        fixed = PairErrors(rw.reshape(1), rl.reshape(1))
        loss = DiffusionDPO(5000.0)(PairErrors(*leaves), fixed).losses.mean()
        gradients = torch.autograd.grad(loss, leaves)
        a, b, c, d = (mpmath.mpf(x.item()) for x in (w, l, rw, rl))
        inside = -2500 * ((a - b) - (c - d))
        slope = 2500 / (1 + mpmath.exp(inside))
        for ours, exact in zip([loss, *gradients], [twin(a, b, c, d), slope, -slope], strict=True):
            assert abs(ours.item() - exact) <= 1e-5 * abs(exact) + 1e-38


@pytest.mark.parametrize("beta", [1.0, 5000.0])
def test_dpo_is_ln_2_at_the_reference(beta):
    values = PairErrors(*errors_of_all_sizes(50))
    output = DiffusionDPO(beta)(values, values)
    assert output.losses.mean().item() == pytest.approx(math.log(2), abs=1e-7)
    assert output.margin.abs().max() == 0  # an exact tie: accuracy one half


def test_dpo_swapped_images_and_swapped_vote_are_the_same_pair():
    """Choosing image 0 equals choosing image 1 after both images have changed places."""
    images, swapped = (POLICY, REFERENCE), tuple(PairErrors(e.rejected, e.chosen) for e in (POLICY, REFERENCE))

    def order(errors, vote):
        return PairErrors(*(errors if vote > 0 else errors[::-1]))

    for vote in (1, -1):
        one = DiffusionDPO()(*(order(e, vote) for e in images))
        other = DiffusionDPO()(*(order(e, -vote) for e in swapped))
        assert torch.equal(one.losses, other.losses)
        assert torch.equal(one.margin, other.margin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_dpo": 0.0}, "beta_dpo is 0.0; it must be greater than 0"),
        ({"loss_type": "log"}, "loss_type is 'log'; it must be one of sigmoid, hinge, ipo, dmpo, linear"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "which loss_type 'ipo' does not have"),
        ({"sft_mix": -0.1}, "sft_mix is -0.1; it must be at least 0"),
    ],
)
def test_senseless_dpo_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDPO(**options)


@pytest.mark.parametrize("objective", [MaPO(), PaperMaPO(), SFT(), DiffusionDPO(20.0), DiffusionDPO(20.0, "ipo")])
def test_pairs_without_weight_count_for_nothing(objective):
    w = torch.tensor([0.1, 5.0, 0.3], requires_grad=True)
    l = torch.tensor([0.2, 0.0, 0.1])
    reference = PairErrors(torch.full((3,), 0.2), torch.full((3,), 0.3))
    losses = objective(PairErrors(w, l), reference).losses
    some = weighted_mean(losses, torch.tensor([1.0, 0.0, 1.0]))
    rest = PairErrors(reference.chosen[[0, 2]], reference.rejected[[0, 2]])
    kept = objective(PairErrors(w[[0, 2]], l[[0, 2]]), rest).losses
    assert kept.shape == (2,)
    assert some.item() == pytest.approx(kept.mean().item(), rel=1e-6)
    some.backward(retain_graph=True)
    assert w.grad[1] == 0
    nothing = weighted_mean(losses, torch.zeros(3))
    assert nothing.item() == 0
    w.grad = None
    nothing.backward()
    assert w.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("objective", [MaPO(), PaperMaPO(), SFT(), DiffusionDPO(20.0), DiffusionDPO(20.0, "ipo")])
def test_only_losses_have_gradients(objective):
    """A margin or a term with a gradient would keep the graph of every step that is logged."""
    policy = PairErrors(torch.tensor([0.1], requires_grad=True), torch.tensor([0.2], requires_grad=True))
    output = objective(policy, PairErrors(torch.tensor([0.3]), torch.tensor([0.2])))
    assert output.losses.requires_grad
    assert not output.margin.requires_grad
    assert not any(term.requires_grad for term in output.terms.values())
    assert {value.dtype for value in (output.margin, *output.terms.values())} == {torch.float32}


def test_weighted_mean_of_fractions():
    assert weighted_mean(torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.25])).item() == 1.5


def own_subclasses(kind):
    """Without those of other tests."""
    return [found for found in kind.__subclasses__() if found.__module__.startswith("lit_align.")]


def test_parameter_names_are_unique_among_families_of_objectives():
    """A parameter shared by two families would survive a change of class in a config; BalancedDPO is a DiffusionDPO."""
    families = own_subclasses(Objective)
    assert {cls.__name__ for cls in families} == {"MaPO", "PaperMaPO", "SFT", "DiffusionDPO", "Wrapper"}
    families = [*(cls for cls in families if cls is not Wrapper), WinnerGuard]
    names = [name for cls in families for name in inspect.signature(cls).parameters]
    assert len(names) == len(set(names)) == 10
    assert own_subclasses(DiffusionDPO) == [BalancedDPO]
    assert own_subclasses(Wrapper) == [WinnerGuard, NoiseErrors]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_senseless_parameters_are_named(value):
    with pytest.raises(ValueError, match=r"beta_mapo is .*greater than 0"):
        MaPO(beta_mapo=value)
    with pytest.raises(ValueError, match="beta_paper is"):
        PaperMaPO(beta_paper=value)


def test_formula_shows_its_numbers():
    assert "0.25 mean(logsigmoid(1000 (phi(0.5 L_w)" in MaPO(beta_mapo=0.25).formula()
    assert "1/64 mean(logsigmoid(phi(L_w)^64" in PaperMaPO(64.0).formula()
    assert BalancedDPO(500.0).formula() == (
        "BalancedDPO: mean(-logsigmoid(inside)), inside = -0.5 500 ((L_w - L_l) - (R_w - R_l))"
    )
    assert "mean((inside - 1/2)^2), inside = -0.5 20 (" in DiffusionDPO(20.0, "ipo").formula()
    assert "mean(-logsigmoid(inside)) + 0.25 mean(L_w), inside" in DiffusionDPO(sft_mix=0.25).formula()
    assert "q logsigmoid(inside) - (1 - q) logsigmoid(-inside)), q by the vote" in BalancedDPO(soft=True).formula()
    assert "0.9 logsigmoid(inside) - 0.1 logsigmoid(-inside)" in DiffusionDPO(label_smoothing=0.1).formula()


@pytest.mark.parametrize(
    ("loss", "beta", "count"),
    [("ipo", 5000, 1), ("ipo", 500, 0), ("ipo", 9.5, 1), ("sigmoid", 9.5, 1), ("hinge", 10, 0)],
)
def test_unusual_betas_are_a_concern(loss, beta, count):
    assert len(DiffusionDPO(beta, loss_type=loss).concerns()) == count
    assert DiffusionDPO().concerns() == MaPO().concerns() == []
