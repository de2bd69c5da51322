"""Objectives in a run: the facts that they ask for, and those that make no sense."""

import math

import pytest
import torch

from lit_align.backbones import StableDiffusion
from lit_align.cli import main
from lit_align.commands.fit import ConfigCLI, make_cli
from lit_align.diffusion import NoiseSchedule
from lit_align.diffusion.draws import Draw
from lit_align.objectives import BalancedDPO, DiffusionDPO, MaPO, NoiseErrors, Objective, WinnerGuard
from lit_align.training.config_checks import inherited_init_args
from lit_align.training.judging import judge, term_names
from lit_align.types import ObjectiveOutput, PairErrors, PairInfo
from tests.support.configs import small_options
from tests.support.paths import ROOT
from tests.support.runs import KeepLogs, equal, fit, keep_all, make_data, make_module, weights

ALPHAS = torch.linspace(0.99, 0.01, 10)


def pairs(balance=(0.5, 0.0, 1.0), voted=True):
    ones = torch.ones(3)
    return PairInfo([0, 1, 2], ones, ones < 0, ones.long(), ones, torch.tensor(balance), voted=voted)


class Spy(DiffusionDPO):
    """Keeps the facts."""

    needs = frozenset({"overlap", "alpha_bar", "confidence"})
    needs_vote = True

    def __call__(self, policy, reference, facts=None):
        self.facts = facts
        return super().__call__(policy, reference)


def test_facts_are_those_of_each_pair():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 6, 4, 2, 3, generator=generator)
    prediction.requires_grad_()
    draw = Draw(target[:3], torch.tensor([0, 4, 9]), None)
    objective, reference = Spy(), PairErrors(torch.ones(3), torch.ones(3))
    output, policy = judge(
        objective, NoiseSchedule(ALPHAS, "v_prediction"), prediction, target, reference, draw, pairs()
    )
    residuals = (prediction - target).detach()
    for row in range(3):
        product = residuals[row] * residuals[row + 3]
        assert objective.facts.overlap[row].item() == pytest.approx(product.mean().item(), rel=1e-5)
        assert policy.chosen[row].item() == pytest.approx(residuals[row].square().mean().item(), rel=1e-6)
    assert objective.facts.alpha_bar.tolist() == ALPHAS[[0, 4, 9]].tolist()
    assert objective.facts.confidence.tolist() == [0.75, 0.5, 1.0]
    assert not any(fact.requires_grad for fact in objective.facts)
    assert output.losses.requires_grad
    assert set(term_names(WinnerGuard(MaPO()))) == {"loss/preference", "loss/sft", "guard_factor"}


class NeedsMore(Objective):
    needs_reference = False
    needs = frozenset({"colour"})

    def __call__(self, policy, reference, facts=None):
        return ObjectiveOutput(policy.chosen, policy.chosen.detach(), {})

    def formula(self):
        return "none"


def test_objectives_that_ask_in_vain_are_refused(sd21):
    with pytest.raises(ValueError, match=r"NeedsMore needs \['colour'\]; known are overlap, alpha_bar, confidence"):
        make_module(objective=NeedsMore())
    with pytest.raises(ValueError, match=r"NoiseErrors\(MaPO\), but this model predicts the noise"):
        make_module(objective=NoiseErrors(MaPO()))
    module = make_module(objective=NoiseErrors(MaPO()), repo=sd21, backbone=StableDiffusion)
    assert module.backbone.schedule.prediction_type == "v_prediction"
    soft = BalancedDPO(soft=True)
    ones = torch.ones(6, 1)
    with pytest.raises(ValueError, match="BalancedDPO learns from votes"):
        judge(soft, NoiseSchedule(ALPHAS, "epsilon"), ones, ones, None, Draw(ones, ones, None), pairs(voted=False))


def test_a_guarded_run_logs_its_factor_and_resumes(tmp_path):
    def module(**options):
        return make_module(objective=WinnerGuard(DiffusionDPO(5000.0, **options), mu=0.9))

    made, logs = module(), KeepLogs()
    fit(made, make_data(), tmp_path, 4, logger=logs, callbacks=[keep_all(tmp_path)], log_every_n_steps=1)
    factors = [row["train/guard_factor"] for _, row in logs.rows if "train/guard_factor" in row]
    assert len(factors) == 4
    assert all(0 < factor <= 1 for factor in factors)
    assert min(factors) < 0.9
    whole, resumed = module(), module()
    fit(whole, make_data(), tmp_path / "whole", 5)
    fit(resumed, make_data(), tmp_path, 5, ckpt_path=tmp_path / "step=4.ckpt")
    assert equal(weights(resumed), weights(whole))
    other = module(sft_mix=0.5)
    fit(other, make_data(), tmp_path / "other", 5, ckpt_path=tmp_path / "step=4.ckpt")
    assert "step 4: model.objective.objective.sft_mix was 0.0, is 0.5" in other.run_record.history
    with pytest.raises(ValueError, match=r"began with the objective WinnerGuard\(DiffusionDPO\), not DiffusionDPO"):
        fit(make_module(objective=DiffusionDPO(5000.0)), make_data(), tmp_path, 5, ckpt_path=tmp_path / "step=4.ckpt")


def test_a_run_of_the_old_ipo_is_refused(tmp_path):
    ipo = DiffusionDPO(500.0, "ipo")
    fit(make_module(objective=ipo), make_data(), tmp_path, 1, callbacks=[keep_all(tmp_path)])
    path = tmp_path / "step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["lit_align"].pop("objective_form") == 2
    torch.save(checkpoint, path)
    fit(make_module(objective=WinnerGuard(ipo)), make_data(), tmp_path / "new", 1)  # nothing to refuse
    with pytest.raises(ValueError, match=r"earlier form of DiffusionDPO: its ipo was 1 / beta_dpo\^2 times"):
        fit(make_module(objective=ipo), make_data(), tmp_path, 2, ckpt_path=path)


def test_recommended_losses_by_overlay_and_a_guard_by_options(tmp_path, sd15, sd21, caplog):
    folders = [tmp_path / name for name in ("soft", "guard")]
    for folder in folders:
        folder.mkdir()
    words = small_options(ROOT / "configs/quickstart_balanced_dpo.yaml", folders[0], sd15, sd21)
    main(["fit", *words, f"--config={ROOT / 'configs/objectives/soft_mix.yaml'}", "--trainer.max_steps=1"])
    assert "q by the vote, at most 0.98 + 0.25 mean(L_w), inside" in caplog.text
    words = small_options(ROOT / "configs/dpo_mix_sdxl_lora.yaml", folders[1], sd15, sd21)
    guard = ["--model.objective=WinnerGuard", "--model.objective.mu=0.6", "--model.objective.objective=DiffusionDPO"]
    main(["fit", *words, *guard, "--model.objective.objective.sft_mix=0.25", "--trainer.max_steps=1"])
    assert "model.objective: WinnerGuard's DiffusionDPO lacks" not in caplog.text  # the mix is given
    assert "+ 0.25 mean(L_w), inside = -0.5 5000 ((L_w - L_l) - (R_w - R_l)); WinnerGuard: the gradient" in caplog.text


def test_an_old_sigmoid_run_may_change_to_ipo(tmp_path):
    """Its loss was never ipo's old one."""
    fit(make_module(objective=DiffusionDPO(500.0)), make_data(), tmp_path, 1, callbacks=[keep_all(tmp_path)])
    path = tmp_path / "step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["lit_align"]["objective_form"]
    torch.save(checkpoint, path)
    module = make_module(objective=DiffusionDPO(500.0, "ipo"))
    fit(module, make_data(), tmp_path, 2, ckpt_path=path)
    assert "step 1: model.objective.loss_type was 'sigmoid', is 'ipo'" in module.run_record.history


def test_numbers_that_a_wrapper_loses_are_said():
    def found(*words):
        config = f"--config={ROOT / 'configs/diffusion_dpo_sd15.yaml'}"
        cli = make_cli(ConfigCLI, [config, *words], run=False, prog="lit-align")
        return inherited_init_args(cli.config)

    mix = f"--config={ROOT / 'configs/objectives/mix.yaml'}"
    guard = ["--model.objective=WinnerGuard", "--model.objective.objective=DiffusionDPO"]
    assert found(mix) == []
    assert found(mix, *guard) == [
        "model.objective: WinnerGuard's DiffusionDPO lacks sft_mix 0.25 of the config files. Give them as "
        "--model.objective.objective.NAME."
    ]
    assert found(mix, *guard, "--model.objective.objective.sft_mix=0.25") == []
    assert found(mix, "--model.objective=BalancedDPO") == [
        "model.objective: BalancedDPO keeps beta_dpo 5000.0, sft_mix 0.25 of DiffusionDPO, which the config file names."
    ]
    assert found("--model.objective=MaPO") == []


def test_a_soft_vote_that_was_tied_pulls_the_preference_back():
    """Slope sigmoid(x) - 1/2: at the reference nothing, and back towards it elsewhere."""
    chosen = torch.tensor([0.1, 0.1, 0.1], requires_grad=True)
    zeros = torch.zeros(3)
    schedule, draw = NoiseSchedule(ALPHAS, "epsilon"), Draw(zeros, zeros.long(), None)
    prediction = torch.cat([chosen.sqrt(), torch.full((3,), 0.1).sqrt()])[:, None]
    reference = PairErrors(torch.tensor([0.1, 0.2, 0.0]), torch.full((3,), 0.1))
    objective = BalancedDPO(20.0, soft=True)
    output, _ = judge(objective, schedule, prediction, torch.zeros(6, 1), reference, draw, pairs(balance=(0, 0, 0)))
    (slope,) = torch.autograd.grad(output.losses.sum(), chosen)
    inside = [0.0, 1.0, -1.0]
    expected = [-10 * (1 / (1 + math.exp(-x)) - 0.5) for x in inside]
    assert slope.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
