"""Objectives around another one: factors on residual vectors, values and gradients by hand."""

import pytest
import torch

from lit_align.diffusion import pair_errors, pair_overlap
from lit_align.objectives import SFT, BalancedDPO, DiffusionDPO, MaPO, NoiseErrors, WinnerGuard
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


def test_a_step_that_moves_both_outputs_alike_does_not_raise_the_chosen_error():
    """With mu 0: a vector that both residuals share, and the slope of the chosen error along the loss's gradient."""
    generator, rises = torch.Generator().manual_seed(0), {True: 0, False: 0}
    for _ in range(50):
        residuals = torch.randn(2, 8, generator=generator) + torch.tensor([[0.0], [0.5]])
        for guarded in (True, False):
            shared = torch.zeros(8, requires_grad=True)
            moved, nothing = residuals + shared, torch.zeros(2, 8)
            policy, facts = pair_errors(moved, nothing), PairFacts(pair_overlap(moved, nothing))
            plain = DiffusionDPO(5.0)
            output = WinnerGuard(plain, 0.0)(policy, REFERENCE, facts) if guarded else plain(policy, REFERENCE)
            (step,) = torch.autograd.grad(output.losses.sum(), shared, retain_graph=True)
            (slope,) = torch.autograd.grad(policy.chosen.sum(), shared)
            rises[guarded] += int((slope @ step).item() < -1e-7)  # a step goes against the gradient
    assert rises[True] == 0
    assert rises[False] > 0


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


def test_the_order_of_wrappers_does_not_matter():
    generator = torch.Generator().manual_seed(3)
    residuals, nothing = torch.randn(8, 16, generator=generator), torch.zeros(8, 16)
    residuals[4:] = 0.6 * residuals[:4] + 0.4 * residuals[4:]
    policy = pair_errors(residuals, nothing)
    reference = PairErrors(policy.chosen + 0.1, policy.rejected)
    facts = PairFacts(pair_overlap(residuals, nothing), torch.tensor([0.01, 0.3, 0.6, 0.99]))
    inner = DiffusionDPO(5.0)
    first, second = WinnerGuard(NoiseErrors(inner), 0.5), NoiseErrors(WinnerGuard(inner, 0.5))
    one, two = (made(policy, reference, facts) for made in (first, second))
    assert (one.terms["guard_factor"] < 1).any()
    assert one.terms["guard_factor"].tolist() == pytest.approx(two.terms["guard_factor"].tolist(), rel=1e-5)
    assert one.losses.tolist() == pytest.approx(two.losses.tolist(), rel=1e-6)


def test_wrappers_need_what_their_objective_needs_and_say_what_they_do():
    made = WinnerGuard(NoiseErrors(BalancedDPO(soft=True)), mu=0.6)
    assert made.needs == {"overlap", "alpha_bar", "confidence"}
    assert (made.needs_reference, made.needs_vote, made.form, made.needs_v) == (True, True, 2, True)
    assert made.name() == "WinnerGuard(NoiseErrors(BalancedDPO))"
    assert made.formula().startswith("BalancedDPO: mean(-q logsigmoid(inside)")
    assert made.formula().endswith("the gradient of L_l times clamp(0.4 L_w / mean(e_w e_l), 0, 1)")
    assert NoiseErrors(BalancedDPO()).needs == {"alpha_bar"}
    assert BalancedDPO().needs == set()
    assert WinnerGuard(DiffusionDPO(5.0)).concerns()[0].startswith("model.objective.objective.beta_dpo 5000: at 5")
    with pytest.raises(ValueError, match=r"WinnerGuard\(NoiseErrors\(WinnerGuard\(MaPO\)\)\) has WinnerGuard twice"):
        WinnerGuard(NoiseErrors(WinnerGuard(MaPO())))
    with pytest.raises(ValueError, match="SFT does not train on the rejected image"):
        WinnerGuard(SFT())
    assert WinnerGuard(MaPO()).needs_reference is False
    with pytest.raises(ValueError, match=r"mu is 1\.5; it must lie between 0 and 1"):
        WinnerGuard(MaPO(), mu=1.5)
