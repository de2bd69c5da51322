"""What a checkpoint holds, and when it is written."""

import lightning as L
import pytest
import torch
import yaml

from lit_align.backbones import LoRA
from tests.support.paths import ROOT
from tests.support.runs import fit, make_data, make_module


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_save_at_the_last_batch_of_an_epoch_too(config, tmp_path):
    """Without save_on_train_epoch_end Lightning 2.6 defers such a save to the next validation, which may never run."""
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    (settings,) = [c["init_args"] for c in callbacks if c["class_path"].endswith(".ModelCheckpoint")]
    assert settings["save_on_train_epoch_end"]
    if config.stem == "quickstart":  # the others differ in their numbers only
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, **(settings | {"every_n_train_steps": 2}))
        options = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
        data = make_data(batch_size=13)  # 4 batches an epoch
        fit(make_module(), data, tmp_path, 4, callbacks=[checkpoint], **options)
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_checkpoint_holds_only_what_was_trained(tmp_path):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
    module = make_module(lora=LoRA(rank=2))
    fit(module, make_data(), tmp_path, steps=2, callbacks=[checkpoint])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"backbone.{name}" for name in module.backbone.trainable_parameters()}
    assert all(".lora_" in name for name in saved["state_dict"])
    assert saved["global_step"] == 2
    assert saved["lit_align"]["lora"]["rank"] == 2
    assert len(saved["optimizer_states"]) == 1

    with pytest.raises(ValueError, match="trained weights are missing"):
        fit(make_module(), make_data(), tmp_path, steps=3, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="began with seed_everything 0, not 5"):
        fit(make_module(5, LoRA(rank=2)), make_data(5), tmp_path, steps=3, ckpt_path=tmp_path / "last.ckpt")
