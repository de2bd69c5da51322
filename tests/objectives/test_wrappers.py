"""Objectives around another one: factors on residual vectors, values and gradients by hand."""

import pytest
import torch

from lit_align.diffusion import pair_errors, pair_overlap
from lit_align.objectives import BalancedDPO, DiffusionDPO, MaPO, NoiseErrors, WinnerGuard
from lit_align.types import PairErrors, PairFacts

REFERENCE = PairErrors(torch.tensor([0.9]), torch.tensor([0.8]))


def guarded(mu, chosen, rejected, objective=None):
    """Return factor, loss and gradients of both residual vectors under the guard, and of the plain objective."""
    found = []
    for wrap in (lambda inner: WinnerGuard(inner, mu), lambda inner: inner):
        residuals = torch.tensor([chosen, rejected], requires_grad=True)
        policy, facts = pair_errors(residuals, torch.zeros(2, 2)), PairFacts(pair_overlap(residuals, torch.zeros(2, 2)))
        made = wrap(objective or DiffusionDPO(5.0))
        output = made(policy, REFERENCE, facts) if made.needs else made(policy, REFERENCE)
        (gradient,) = torch.autograd.grad(output.losses.sum(), residuals)
        found.append((output.terms.get("guard_factor"), output.losses.item(), gradient))
    return found


@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(
    ("chosen", "rejected", "factor"),
    [
        ((1.0, 2.0), (1.0, 2.0), lambda mu: 1 - mu),  # equal
        ((1.0, 2.0), (-2.0, 1.0), lambda mu: 1.0),  # orthogonal
        ((1.0, 2.0), (-1.0, -2.0), lambda mu: 1.0),  # opposed
        ((1.0, 2.0), (2.0, 4.0), lambda mu: (1 - mu) / 2),  # twice as long
        ((1.0, 2.0), (0.05, 0.1), lambda mu: min(20 * (1 - mu), 1)),  # much shorter
        ((0.0, 0.0), (1.0, 2.0), lambda mu: 1.0),  # none
        ((1e-6, 0.0), (1.0, 2.0), lambda mu: (1 - mu) * 1e-6),  # nearly none
    ],
)
def test_the_guard_scales_the_rejected_gradient_alone(mu, chosen, rejected, factor):
    (found, loss, gradient), (_, plain_loss, plain) = guarded(mu, chosen, rejected)
    assert found.item() == pytest.approx(factor(mu), rel=1e-5, abs=1e-12)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert torch.equal(gradient[0], plain[0])
    assert gradient[1].tolist() == pytest.approx((factor(mu) * plain[1]).tolist(), rel=1e-5, abs=1e-12)


def test_the_guard_keeps_the_chosen_error_from_rising_to_first_order():
    """A step along both gradients changes the chosen error by -|g_w|^2 + factor <g_w, g_l>; with mu 0 it is at most 0.

    The step is in a layer that both images share: both residuals move by the same vector.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        chosen, rejected = torch.randn(2, 8, generator=generator).tolist()
        residuals = torch.tensor([chosen, rejected])
        overlap = pair_overlap(residuals, torch.zeros(2, 8))
        policy = pair_errors(residuals, torch.zeros(2, 8))
        output = WinnerGuard(DiffusionDPO(5.0), 0.0)(policy, REFERENCE, PairFacts(overlap))
        factor = output.terms["guard_factor"].item()
        first, second = residuals
        assert (first @ first - factor * (first @ second)).item() >= -1e-5
        assert 0 <= factor <= 1


def test_factors_are_of_each_pair():
    """A pair's factor does not depend on the others of its batch."""
    generator = torch.Generator().manual_seed(1)
    residuals, nothing = torch.randn(8, 16, generator=generator), torch.zeros(8, 16)
    overlap, policy = pair_overlap(residuals, nothing), pair_errors(residuals, nothing)
    reference = PairErrors(policy.chosen + 0.1, policy.rejected)
    whole = WinnerGuard(DiffusionDPO(5.0), 0.5)(policy, reference, PairFacts(overlap))
    for row in range(4):
        one = slice(row, row + 1)
        alone = WinnerGuard(DiffusionDPO(5.0), 0.5)(
            PairErrors(*(e[one] for e in policy)), PairErrors(*(e[one] for e in reference)), PairFacts(overlap[one])
        )
        assert torch.equal(alone.losses, whole.losses[one])
        assert torch.equal(alone.terms["guard_factor"], whole.terms["guard_factor"][one])


def test_errors_of_v_become_those_of_the_noise():
    """With one prediction, the noise's error is alpha_bar times v's: v = sqrt(a) n - sqrt(1-a) x, x_t fixed."""
    generator = torch.Generator().manual_seed(2)
    alpha = torch.tensor([0.0047, 0.5, 0.99])
    clean, noise, guess = torch.randn(3, 3, 64, generator=generator)
    signal, spread = alpha.sqrt()[:, None], (1 - alpha).sqrt()[:, None]
    noisy = signal * clean + spread * noise
    v = signal * noise - spread * clean
    predicted_noise = signal * guess + spread * noisy  # of the prediction `guess` of v
    v_error, noise_error = (guess - v).square().mean(1), (predicted_noise - noise).square().mean(1)
    assert (alpha * v_error).tolist() == pytest.approx(noise_error.tolist(), rel=1e-3)
    other, reference = torch.rand(2, 3, generator=generator)
    policy, fixed = PairErrors(v_error, other), PairErrors(reference, reference)
    wrapped = NoiseErrors(DiffusionDPO(20.0))(policy, fixed, PairFacts(alpha_bar=alpha))
    plain = DiffusionDPO(20.0)(*(PairErrors(*(alpha * e for e in errors)) for errors in (policy, fixed)))
    assert wrapped.losses.tolist() == pytest.approx(plain.losses.tolist(), rel=1e-6)
    mapo = NoiseErrors(MaPO())(policy, None, PairFacts(alpha_bar=alpha))
    assert mapo.losses.tolist() == pytest.approx(
        MaPO()(PairErrors(alpha * v_error, alpha * other), None).losses.tolist(), rel=1e-6
    )


def test_wrappers_need_what_their_objective_needs_and_say_what_they_do():
    made = WinnerGuard(NoiseErrors(BalancedDPO(soft=True)), mu=0.6)
    assert made.needs == {"overlap", "alpha_bar", "confidence"}
    assert (made.needs_reference, made.needs_vote, made.form) == (True, True, 1)
    assert made.name() == "WinnerGuard(NoiseErrors(BalancedDPO))"
    assert made.formula().startswith("BalancedDPO: mean(-q logsigmoid(inside)")
    assert made.formula().endswith("the gradient of L_l times clamp(0.4 L_w / mean(e_w e_l), 0, 1)")
    assert WinnerGuard(DiffusionDPO(loss_type="ipo")).form == 2
    assert WinnerGuard(MaPO()).needs_reference is False
    with pytest.raises(ValueError, match=r"mu is 1\.5; it must lie between 0 and 1"):
        WinnerGuard(MaPO(), mu=1.5)
