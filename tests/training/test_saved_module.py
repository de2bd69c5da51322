"""What a module reads from a checkpoint and writes into the next, without a Trainer and with torch.compile."""

import lightning as L
import pytest
import torch

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.backbones.loading.trained import read_trained
from lit_align.objectives import DiffusionDPO, MaPO
from lit_align.training.module import AlignmentModule
from tests.support.pipelines import small_sdxl
from tests.support.runs import equal, make_module, weights


def saved(module):
    """Return the checkpoint that a module writes at step 1, as far as it is the module's."""
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)  # whose settings it records
    checkpoint = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def moved(module):
    """Change the trained weights."""
    with torch.no_grad():
        for number, weight in enumerate(module.backbone.trainable_parameters().values()):
            weight += 0.01 * (number + 1)
    return module


def test_weights_are_loaded_without_a_trainer(tmp_path, lora_run):
    whole = torch.load(lora_run / "step=3.ckpt", weights_only=True)["state_dict"]
    backbone = StableDiffusionXL(str(small_sdxl()), lora=LoRA(rank=2))
    module = AlignmentModule.load_from_checkpoint(lora_run / "step=3.ckpt", backbone=backbone, objective=MaPO())
    assert equal({f"backbone.{name}": value for name, value in weights(module).items()}, whole)


def compiled(module, part):
    """Wrap the denoiser, or a block of it."""
    owner, name = (module.backbone, "denoiser") if part == "denoiser" else (module.backbone.denoiser, "mid_block")
    setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
    return module


@pytest.mark.parametrize("part", ["denoiser", "block"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_compiled_modules_name_weights_as_others_do(tmp_path, lora, part):
    """A run begins with torch.compile and goes on without it, or the other way round."""
    plain = make_module(lora=lora, objective=DiffusionDPO())
    other = compiled(moved(make_module(lora=lora, objective=DiffusionDPO())), part)
    other.backbone.reference.update(1.0)
    checkpoint = saved(other)
    assert set(checkpoint["state_dict"]) == {f"backbone.{name}" for name in plain.backbone.trainable_parameters()} | {
        f"backbone.{name}" for name in plain.backbone.reference_weights()
    }
    plain.on_load_checkpoint(checkpoint)
    plain.load_state_dict(checkpoint["state_dict"], strict=False)
    assert equal(weights(plain), weights(other))
    again = compiled(make_module(lora=lora, objective=DiffusionDPO()), part)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"], strict=False)
    assert equal(weights(again), weights(other))

    names = {name: name.replace(".denoiser.", ".denoiser._orig_mod.") for name in checkpoint["state_dict"]}
    old = checkpoint | {"state_dict": {names[name]: value for name, value in checkpoint["state_dict"].items()}}
    torch.save(old, tmp_path / "old.ckpt")  # of an earlier version
    trained = read_trained(tmp_path / "old.ckpt").weights
    assert equal({f"denoiser.{name}": value for name, value in trained.items()}, weights(other))
    resumed = make_module(lora=lora, objective=DiffusionDPO())
    resumed.on_load_checkpoint(old)
    resumed.load_state_dict(old["state_dict"], strict=False)
    assert equal(weights(resumed), weights(other))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_reference_that_has_moved_is_in_the_next_checkpoint_too(lora):
    """Else the run would go on from the pretrained model after a second resume."""
    first = moved(make_module(lora=lora, objective=DiffusionDPO()))
    assert not any("reference" in name for name in saved(first)["state_dict"])  # has not moved
    first.backbone.reference.update(1.0)
    checkpoint = saved(first)
    resumed = make_module(lora=lora, objective=DiffusionDPO())
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"], strict=False)
    again = saved(resumed)["state_dict"]
    names = {f"backbone.{name}" for name in first.backbone.reference_weights()}
    assert names <= set(again)
    assert equal({name: again[name] for name in names}, {name: checkpoint["state_dict"][name] for name in names})
