"""The reference: frozen, equal to the policy after a copy, in the checkpoint once it has moved."""

import itertools
import math

import lightning as L
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from lit_align.backbones import LoRA
from lit_align.backbones.reference import FrozenAdapter, FrozenCopy
from lit_align.callbacks import ReferenceUpdate, StartBanner
from lit_align.cli import main
from lit_align.objectives import DiffusionDPO, MaPO
from tests.support.paths import PIPELINE
from tests.support.processes import fork_ranks
from tests.support.published_unets import PUBLISHED
from tests.support.runs import KeepLogs, equal, fit, make_data, make_module, weights

KINDS = pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])


def make(lora=None, beta_dpo=100.0, learning_rate=1e-3, **options):
    module = make_module(lora=lora, objective=DiffusionDPO(beta_dpo), **options)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate)
    return module


def reference(module):
    return {name: value.detach().clone() for name, value in module.backbone.reference_weights().items()}


class Watch(L.Callback):
    """Losses before each step, the reference after each batch, and whether it ever had a gradient."""

    def __init__(self):
        self.losses, self.references = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, value in pl_module.backbone.named_parameters():
            if name in pl_module.backbone.reference_weights():
                assert value.grad is None
                assert not value.requires_grad

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.references.append(reference(pl_module))


@KINDS
def test_policy_and_reference_give_equal_errors(lora):
    """Without the care of `force_contiguous_proj_in` they do not in 20 of 26 batches in bfloat16."""
    module, data = make(lora), make_data()
    data.setup("fit")
    for batch in itertools.islice(data.train_dataloader(), 3):
        with torch.autocast("cpu", torch.bfloat16):
            encoded = module.backbone.encode(batch)
            draw = module.validation_draw(encoded, 0)
            twin, policy = (
                module.backbone.reference_pair_errors(encoded, draw),
                module.backbone.pair_errors(encoded, draw),
            )
        assert torch.equal(policy.chosen.detach(), twin.chosen)
        assert torch.equal(policy.rejected.detach(), twin.rejected)


@KINDS
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_loss_is_ln_2_right_after_a_copy(tmp_path, lora, precision):
    """At the start, and after the updates at steps 2 and 4."""
    module, watch = make(lora, beta_dpo=1000.0), Watch()
    fit(module, make_data(), tmp_path, 5, callbacks=[ReferenceUpdate(2), watch], precision=precision)
    for step, loss in enumerate(watch.losses):
        if step in (0, 2, 4):
            assert loss == pytest.approx(math.log(2), abs=1e-6)
        else:
            assert abs(loss - math.log(2)) > 1e-4


@KINDS
def test_reference_changes_only_at_an_update(tmp_path, lora):
    module, watch = make(lora), Watch()
    before = reference(module)
    callbacks = [ReferenceUpdate(every_n_steps=2, start_step=4), watch]
    fit(module, make_data(), tmp_path, 5, callbacks=callbacks, accumulate_grad_batches=2)
    assert len(watch.references) == 10
    for batch, seen in enumerate(watch.references, start=1):
        assert equal(seen, before) == (batch < 8)  # step 4 ends with the eighth batch
        assert equal(seen, watch.references[7]) == (batch >= 8)
    assert callbacks[0].updates == 1


def test_copy_and_blend_by_hand(tmp_path):
    module = make()
    start = weights(module)
    fit(module, make_data(), tmp_path, 2, callbacks=[ReferenceUpdate(2, alpha=0.25)])
    blended, policy = reference(module), weights(module)
    for name, value in policy.items():
        expected = 0.75 * start[name] + 0.25 * value
        torch.testing.assert_close(blended[name.replace("denoiser", "reference.denoiser")], expected)
    module.backbone.reference.update(1.0)
    assert module.backbone.reference.distance() == 0
    assert all(torch.equal(a, b) for a, b in zip(reference(module).values(), policy.values(), strict=True))


def test_distance_is_euclidean():
    module = make()
    with torch.no_grad():
        first, second = list(module.backbone.trainable_parameters().values())[:2]
        first.view(-1)[0] += 3
        second.view(-1)[0] += 4
    assert module.backbone.reference.distance().item() == pytest.approx(5, rel=1e-5)


def test_lora_reference_costs_an_adapter_and_full_one_a_unet():
    lora, full = make(LoRA(rank=2), repo=PIPELINE).backbone, make(repo=PIPELINE).backbone
    assert isinstance(lora.reference, FrozenAdapter)
    assert isinstance(full.reference, FrozenCopy)
    size = {name: sum(v.numel() for v in b.reference_weights().values()) for name, b in (("l", lora), ("f", full))}
    assert size["l"] == sum(p.numel() for p in lora.trainable_parameters().values()) == 16_384
    assert size["f"] == sum(p.numel() for p in full.trainable_parameters().values()) == 4_115_652
    without = make_module(lora=LoRA(rank=2), repo=PIPELINE).backbone
    extra = sum(p.numel() for p in lora.parameters()) - sum(p.numel() for p in without.parameters())
    assert extra == 16_384  # nothing beside the second adapter


def test_lora_reference_of_sdxl_is_half_a_percent_of_a_copy():
    """The README's figure, on the meta device: rank 8 on the published UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED["SDXL"]).requires_grad_(False)
        full = sum(p.numel() for p in unet.parameters())
        unet.add_adapter(LoRA().config())
        adapter = sum(p.numel() for p in unet.parameters()) - full
        reference = FrozenAdapter(unet, LoRA().config())
    assert (full, adapter) == (2_567_463_684, 11_612_160)
    assert sum(frozen.numel() for frozen, _ in reference.pairs().values()) == adapter
    assert sum(p.numel() for p in unet.parameters()) == full + 2 * adapter


@KINDS
def test_reference_is_saved_once_it_has_moved(tmp_path, lora):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = make(lora)
    fit(module, make_data(), tmp_path, 2, callbacks=[ReferenceUpdate(2), checkpoint])
    saved = [set(torch.load(tmp_path / f"step={n}.ckpt", weights_only=True)["state_dict"]) for n in (1, 2)]
    trained = {f"backbone.{name}" for name in module.backbone.trainable_parameters()}
    assert saved[0] == trained
    assert saved[1] == trained | {f"backbone.{name}" for name in module.backbone.reference_weights()}
    with pytest.raises(ValueError, match="with an objective that has a reference"):
        fit(make_module(lora=lora), make_data(), tmp_path, 3, tmp_path / "step=2.ckpt")


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, dropout=0.3)], ids=["full", "lora"])
def test_resumed_run_with_a_moving_reference_equals_the_unbroken_one(tmp_path, lora):
    """Killed before the first update, right after one, and between two; workers and accumulation as well."""
    options = {"accumulate_grad_batches": 2}

    def callbacks():
        return [ReferenceUpdate(3, alpha=1.0 if lora else 0.5)]

    whole = make(lora)
    fit(whole, make_data(num_workers=1), tmp_path, 7, callbacks=callbacks(), **options)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(make(lora), make_data(num_workers=1), tmp_path, 6, callbacks=[*callbacks(), checkpoint], **options)
    for step in (2, 3, 4, 6):
        resumed, again = make(lora), callbacks()
        path = tmp_path / f"step={step}.ckpt"
        fit(resumed, make_data(num_workers=1), tmp_path, 7, path, callbacks=again, **options)
        assert equal(weights(resumed), weights(whole))
        assert equal(reference(resumed), reference(whole))
        assert again[0].updates == 2


def test_updates_and_distance_are_logged(tmp_path, caplog):
    logger = KeepLogs()
    with caplog.at_level("INFO"):
        fit(make(), make_data(), tmp_path, 4, callbacks=[ReferenceUpdate(2)], logger=logger, log_every_n_steps=1)
    rows = [row for _, row in logger.rows if "reference/distance" in row]
    assert [row["reference/updates"] for row in rows] == [0, 0, 1, 1]
    assert all(row["reference/distance"] > 0 for row in rows)
    assert rows[1]["reference/distance"] > rows[0]["reference/distance"]
    assert rows[2]["reference/distance"] < rows[1]["reference/distance"]  # one step after the copy
    assert {"train/chosen_drift", "train/rejected_drift", "train/chosen_worse", "train/margin"} <= set(rows[0])
    assert caplog.text.count("reference copied from the policy") == 2


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (ReferenceUpdate(5), lambda: make_module(objective=MaPO()), "MaPO has no reference model"),
        (ReferenceUpdate(5, alpha=0.5), lambda: make(LoRA(rank=2)), "alpha is 0.5, but a LoRA reference can only be"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(tmp_path, callback, module, message):
    with pytest.raises(ValueError, match=message):
        fit(module(), make_data(), tmp_path, 1, callbacks=[callback])


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_steps": 1, "alpha": 0.0}])
def test_senseless_schedules_are_named(options):
    with pytest.raises(ValueError, match=r"ReferenceUpdate\.(every_n_steps|alpha) is 0"):
        ReferenceUpdate(**options)


@KINDS
def test_gradient_checkpointing_recomputes_the_policy_and_not_the_reference(tmp_path, lora):
    ends = []
    for checkpointing in (False, True):
        module = make(lora)
        if checkpointing:
            module.backbone.denoiser.enable_gradient_checkpointing()
        fit(module, make_data(), tmp_path, 3, callbacks=[ReferenceUpdate(2)])
        ends.append(weights(module))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


@KINDS
def test_export_holds_the_policy_and_not_the_reference(tmp_path, lora):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True)
    module = make(lora)
    fit(module, make_data(), tmp_path, 3, callbacks=[ReferenceUpdate(2), checkpoint])
    main(["export", f"--ckpt_path={tmp_path}/last.ckpt", f"--output={tmp_path}/out"])
    (file,) = (tmp_path / "out").glob("*.safetensors")
    exported, trained = load_file(file), weights(module)
    assert len(exported) == len(trained)
    scale = 1 if lora is None else lora.scale  # folded into the second factor
    total = sum(value.double().sum() * (scale if ".lora_B." in name else 1) for name, value in trained.items())
    assert sum(value.double().sum() for value in exported.values()).item() == pytest.approx(total.item(), rel=1e-9)


def test_banner_names_the_reference_and_its_schedule(tmp_path):
    module = make(LoRA(rank=2), repo=PIPELINE)
    trainer = fit(module, make_data(), tmp_path, 1, callbacks=[ReferenceUpdate(250, start_step=500)])
    text = StartBanner().text(trainer, module)
    assert "a second, frozen adapter, 16,384 parameters; copied every 250 steps from step 500" in text
    trainer = fit(make(repo=PIPELINE), make_data(), tmp_path, 1)
    assert "a frozen copy, 4,115,652 parameters; static" in StartBanner().text(trainer, make(repo=PIPELINE))


@KINDS
def test_two_processes_move_the_same_reference(tmp_path, lora):
    """DDP on two CPU processes: both ranks end with one policy, and with the reference that it was at the update."""
    steps = []

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append(weights(pl_module))

    def run():
        module = make(lora)
        options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
        trainer = fit(module, make_data(), tmp_path, 3, callbacks=[ReferenceUpdate(2), Steps()], **options)
        ends = {"p": weights(module), "r": reference(module), "steps": steps}
        torch.save(ends, tmp_path / f"rank{trainer.global_rank}.pt")

    fork_ranks(run)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("p", "r"):
        assert equal(first[part], second[part])
    assert len(first["steps"]) == 6
    second_step = first["steps"][3]
    assert all(torch.equal(a, b) for a, b in zip(first["r"].values(), second_step.values(), strict=True))
    for batch in (1, 5):
        assert not any(torch.equal(first["steps"][batch][name], value) for name, value in second_step.items())


def dropping():
    """A backbone in training whose LoRA drops half of its inputs, with encoded held-out pairs and their draw."""
    module, data = make(LoRA(rank=2, dropout=0.5)), make_data()
    data.setup("fit")
    for name, weight in module.backbone.denoiser.named_parameters():
        if ".lora_B." in name:
            weight.data.fill_(0.1)  # policy and reference alike, so that dropout shows
    module.backbone.reference.moved = True
    encoded = module.backbone.encode(next(iter(data.val_dataloader())))
    module.train()
    return module.backbone, encoded, module.validation_draw(encoded, 0)


def test_a_lora_reference_drops_nothing_and_the_policy_goes_on_dropping():
    backbone, encoded, draw = dropping()
    before = {name: module.training for name, module in backbone.denoiser.named_modules()}
    assert all(before.values())
    first, second = (backbone.reference_pair_errors(encoded, draw) for _ in range(2))
    assert {name: module.training for name, module in backbone.denoiser.named_modules()} == before
    assert torch.equal(first.chosen, second.chosen)
    assert not torch.equal(backbone.pair_errors(encoded, draw).chosen, backbone.pair_errors(encoded, draw).chosen)
    backbone.eval()
    assert torch.equal(backbone.pair_errors(encoded, draw).chosen, first.chosen)  # equal weights, nothing dropped
    backbone.reference_pair_errors(encoded, draw)
    assert not any(module.training for module in backbone.denoiser.modules())
