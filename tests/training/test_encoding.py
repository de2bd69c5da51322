"""Images and prompts are encoded once for any number of draws, and the reference runs only where it is needed."""

from collections import Counter

import lightning as L
import pytest
import torch

from lit_align.callbacks import DivergenceGuard, StartBanner
from lit_align.objectives import DiffusionDPO, MaPO
from lit_align.types import CacheOrigin, EncodedBatch
from tests.support.runs import fit, make_data, make_module


def count_calls(module, monkeypatch):
    """Count calls of the VAE, the text encoders, the policy and the reference of a module."""
    calls, backbone = Counter(), module.backbone
    for name in ("posterior", "encode_prompts", "denoise", "denoise_by_reference"):
        original = getattr(backbone, name)

        def counted(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(backbone, name, counted)
    return calls


@pytest.mark.parametrize(("objective", "references"), [(MaPO(), 0), (DiffusionDPO(), 4)], ids=["mapo", "dpo"])
def test_validation_encodes_a_batch_once(monkeypatch, objective, references):
    module, data = make_module(objective=objective, validation_draws=4), make_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    calls = count_calls(module, monkeypatch)
    with torch.no_grad():
        module.validation_step(batch, 0)
    assert calls["posterior"] == 1
    assert calls["encode_prompts"] == 2  # the prompts, and the empty one once in a run
    assert calls["denoise"] == 4
    assert calls["denoise_by_reference"] == references
    with torch.no_grad():
        module.validation_step(batch, 0)
    assert calls["encode_prompts"] == 3


def test_the_guard_measures_its_start_with_the_policy_and_one_encoding(tmp_path, monkeypatch):
    module = make_module(objective=DiffusionDPO())
    calls = count_calls(module, monkeypatch)
    fit(module, make_data(), tmp_path, steps=1, callbacks=[DivergenceGuard()])
    assert calls["posterior"] == 2  # of the guard, and of the step
    assert calls["denoise"] == 8 + 1
    assert calls["denoise_by_reference"] == 1


def test_the_banner_loads_the_encoders_before_the_first_step(tmp_path):
    loaded = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            loaded.append(len(pl_module.backbone.loaded_encoders()))

    fit(make_module(), make_data(), tmp_path, steps=1, callbacks=[StartBanner(), Look()])
    assert loaded == [2]  # the VAE, and the list of text encoders


def test_an_encoded_batch_passes_through():
    module, data = make_module(), make_data()
    data.setup("fit")
    encoded = module.backbone.encode(next(iter(data.val_dataloader())))
    again = module.backbone.encode(encoded)
    assert isinstance(encoded, EncodedBatch)
    assert again.moments is encoded.moments
    assert torch.equal(again.time_ids, encoded.time_ids)
    assert all(torch.equal(again.conditioning[name], value) for name, value in encoded.conditioning.items())


def test_the_empty_prompt_of_a_validation_serves_training(tmp_path):
    """Tensors of inference mode could not be saved for the backward pass."""
    module, data = make_module(caption_dropout=0.9), make_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    with torch.inference_mode():
        module.validation_step(batch, 0)
    assert not any(value.is_inference() for value in module.backbone.empty_conditioning().values())
    fit(module, make_data(), tmp_path, steps=1)


def test_encoders_are_digested_once_for_all_caches_that_they_made(monkeypatch):
    module, data = make_module(), make_data()
    data.setup("fit")
    encoded = module.backbone.encode(next(iter(data.val_dataloader())))
    own, calls = module.backbone.encoders_identity(), Counter()
    monkeypatch.setattr(module.backbone, "encoders_identity", lambda: calls.update(["identity"]) or own)
    for folder in ("train", "val", "train"):
        module.backbone.encode(encoded._replace(origin=CacheOrigin(folder, dict(own))))
    assert calls["identity"] == 1
    with pytest.raises(ValueError, match=r'The cache other does not fit this run: encoders\.vae was "x", is '):
        module.backbone.encode(encoded._replace(origin=CacheOrigin("other", own | {"vae": "x"})))


def test_dropped_prompts_become_the_empty_one():
    module, data = make_module(), make_data()
    data.setup("fit")
    encoded = module.backbone.encode(next(iter(data.val_dataloader())))
    dropped = encoded.drop_prompts(torch.tensor([True, False]))
    empty = module.backbone.encode_prompts([""])
    for name, value in dropped.conditioning.items():
        assert torch.equal(value[0], empty[name][0])
        assert torch.equal(value[1], encoded.conditioning[name][1])
        assert not torch.equal(value[0], encoded.conditioning[name][0])
