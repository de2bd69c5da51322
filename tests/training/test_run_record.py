"""A resumed run keeps its settings, takes what may change, and says both."""

import pytest
import torch
from torch.optim import lr_scheduler

from lit_align.objectives import MaPO
from tests.support.runs import fit, keep_all, make_data, make_module

CLIPPED = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"}  # the Trainer keeps the name as an enum


def make(rate, gamma, **options):
    """Build a module whose learning rate falls by gamma in each step."""
    module = make_module(**options)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    module.lr_scheduler = lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma)
    return module


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Checkpoint of step 2 of a run with the learning rate 0.001, halved in each step."""
    folder = tmp_path_factory.mktemp("begun")
    fit(make(1e-3, 0.5), make_data(), folder, 2, callbacks=[keep_all(folder)], **CLIPPED)
    return folder / "step=2.ckpt"


def go_on(module, begun, **options):
    """Resume for a step, and return the rate and the weight decay of the next one."""
    fit(module, make_data(), begun.parent / "on", 3, ckpt_path=begun, **(CLIPPED | options))
    (group,) = module.trainer.optimizers[0].param_groups
    return group["lr"], module.trainer.lr_scheduler_configs[0].scheduler.gamma


def test_a_resumed_run_keeps_the_numbers_of_its_optimizer_and_says_so(begun, caplog):
    with caplog.at_level("INFO"):
        changed = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
        assert go_on(make(1e-5, 0.1, objective=MaPO(0.3)), begun, **changed) == (1e-3 * 0.5**3, 0.5)
    for line in (
        "model.optimizer.lr was 0.001, is 1e-05: kept, unless --model.optimizer_on_resume take asks",
        "model.lr_scheduler.gamma was 0.5, is 0.1: kept",
        "model.objective.beta_mapo was 0.1, is 0.3: taken",
        "trainer.gradient_clip_val was 1.0, is 0.5: taken",
        "trainer.gradient_clip_algorithm was 'norm', is 'value': taken",
    ):
        assert line in caplog.text


def test_a_new_schedule_leads_as_if_from_the_first_step_where_it_is_asked_for(begun):
    module = make(1e-5, 0.1, optimizer_on_resume="take")
    rate, gamma = go_on(module, begun)
    assert rate == pytest.approx(1e-5 * 0.1**3, rel=1e-12)
    assert gamma == 0.1
    assert "step 2: model.optimizer.lr was 0.001, is 1e-05" in module.run_record.history


def test_an_argument_that_no_checkpoint_holds_changes_nothing_else(begun):
    """The kept rate and schedule stay, though the other argument is taken."""
    checkpoint, module = torch.load(begun, weights_only=True), make(1e-5, 0.1)
    module.run_record.config = {"model.optimizer": "AdamW", "model.optimizer.lr": 1e-5, "model.optimizer.own": 1}
    before = {"model.optimizer": "AdamW", "model.optimizer.lr": 1e-3, "model.optimizer.own": 2}
    checkpoint["lit_align"]["run"] |= {"settings": before, "from_config": True}
    changed = begun.with_name("own.ckpt")
    torch.save(checkpoint, changed)
    assert go_on(module, changed) == (1e-3 * 0.5**3, 0.5)
    assert module.run_record.kept == {"model.optimizer.lr": 1e-3}
    assert [str(one) for one in module.run_record.taken] == [
        "model.optimizer.own was 2, is 1: taken, no checkpoint holds it"
    ]


def test_what_cannot_go_on_is_refused_with_its_name(begun):
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches was 1, is 2: refused"):
        go_on(make(1e-3, 0.5), begun, accumulate_grad_batches=2)
    other = make(1e-3, 0.5)
    other.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e-3)
    with pytest.raises(ValueError, match=r"model\.optimizer was 'AdamW', is 'SGD': refused"):
        go_on(other, begun)


def test_an_equal_run_has_nothing_to_say(begun, caplog):
    checkpoint, module = torch.load(begun, weights_only=True), make(1e-3, 0.5)
    module.run_record.config = checkpoint["lit_align"]["run"]["settings"]
    checkpoint["lit_align"]["run"]["from_config"] = True
    with caplog.at_level("INFO"):
        module.run_record.resume(checkpoint, module)
    assert caplog.text == ""


def test_of_an_old_checkpoint_the_optimizer_is_compared(begun, caplog):
    checkpoint, module = torch.load(begun, weights_only=True), make(1e-3, 0.5)
    module.run_record.config = {
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-6,
        "model.optimizer.betas": [0.9, 0.999],
    }
    del checkpoint["lit_align"]["run"]
    with caplog.at_level("INFO"):
        module.run_record.resume(checkpoint, module)
    assert "only its optimizer's are compared" in caplog.text
    assert module.run_record.kept == {"model.optimizer.lr": 1e-3}


def test_of_an_old_checkpoint_it_is_known_whether_it_had_a_schedule(begun):
    old, module = torch.load(begun, weights_only=True), make(1e-3, 0.5, optimizer_on_resume="take")
    del old["lit_align"]["run"]
    for states, now, was in ((old["lr_schedulers"], None, "'a schedule'"), ([], "ExponentialLR", "None")):
        module.run_record.on_resume, module.run_record.config = "keep", {"model.lr_scheduler": now}
        with pytest.raises(ValueError, match=rf"model\.lr_scheduler was {was}, is {now!r}: refused"):
            module.run_record.resume(old | {"lr_schedulers": states}, module)
        module.run_record.on_resume = "take"
        module.run_record.resume(old | {"lr_schedulers": states}, module)


def test_an_old_run_follows_the_new_schedule_where_it_is_asked_for(begun, tmp_path):
    old, module = torch.load(begun, weights_only=True), make(1e-3, 0.1, optimizer_on_resume="take")
    del old["lit_align"]["run"]
    torch.save(old, tmp_path / "old.ckpt")
    fit(module, make_data(), tmp_path, 3, ckpt_path=tmp_path / "old.ckpt", gradient_clip_val=1.0)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**3, rel=1e-12)
