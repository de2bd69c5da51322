"""LoRA: which layers get an adapter, and that exports carry the adapter's scale."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.callbacks.start_banner import model_lines
from lit_align.commands.export import export
from lit_align.user_errors import UserValueError
from tests.support.paths import PIPELINE
from tests.support.published_unets import PUBLISHED
from tests.support.runs import make_module


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return UNet2DConditionModel(**PUBLISHED["SD1.5"])


def test_each_target_counts_its_layers(published):
    targets = ["to_q", "attn2.to_k", "to_out.0", "proj_in", "ff.net.2", "conv_in", "time_embedding.linear_1"]
    assert LoRA(target_modules=targets).matches(published) == {
        "to_q": 32,  # self- and cross-attention of 16 transformers
        "attn2.to_k": 16,
        "to_out.0": 32,
        "proj_in": 16,
        "ff.net.2": 16,
        "conv_in": 1,
        "time_embedding.linear_1": 1,
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_kk", "to_vv", "ff.0", "add_k_proj"], r"no layer 'to_kk' \(did you mean to_k\?\), 'to_vv' \(did"),
        (["to_q", "add_k_proj"], r"no layer 'add_k_proj'.*It has .*to_out\.0"),
        (["all-linear"], "no layer 'all-linear'"),
        ([".*to_q"], r"no layer '\.\*to_q'"),
        (["attn1"], "'attn1' is a part of several layers"),
        (["to_out"], "'to_out' is a part of several layers"),
    ],
)
def test_a_target_that_is_no_layer_is_named(published, targets, message):
    with pytest.raises(UserValueError, match=rf"model\.backbone\.lora\.target_modules: .*{message}"):
        LoRA(target_modules=targets).matches(published)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"lora\.rank is 0"),
        ({"alpha": 0}, r"lora\.alpha is 0"),
        ({"dropout": 1.0}, r"lora\.dropout is 1\.0"),
        ({"target_modules": []}, r"lora\.target_modules is empty"),
    ],
)
def test_settings_that_train_nothing_are_named(options, message):
    with pytest.raises(UserValueError, match=message):
        LoRA(**options)


def test_the_banner_counts_layers_and_says_the_scale():
    module = make_module(lora=LoRA(rank=4, alpha=16, target_modules=["to_q", "attn2.to_k"]), repo=PIPELINE)
    assert "  lora        rank 4, alpha 16, scale 4; layers: to_q in 8, attn2.to_k in 4" in model_lines(module, [])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A LoRA of scale 4 with random weights, its export, and its true changes of weights by layer."""
    folder = tmp_path_factory.mktemp("lora")
    backbone = StableDiffusionXL(str(PIPELINE), lora=LoRA(rank=4, alpha=16, target_modules=["to_q", "conv1"]))
    generator = torch.Generator().manual_seed(0)
    for weight in backbone.trainable_parameters().values():
        weight.data = torch.randn(weight.shape, generator=generator)
    weights = {f"backbone.{name}": weight.detach() for name, weight in backbone.trainable_parameters().items()}
    torch.save({"state_dict": weights, "lit_align": backbone.export_info(), "global_step": 1}, folder / "last.ckpt")
    export(folder / "last.ckpt", folder / "out")
    return folder / "out", changes(backbone.denoiser)


def changes(unet):
    """What the only adapter adds to each layer's weight."""
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert layers
    return {name: layer.get_delta_weight(next(iter(layer.lora_A))).detach() for name, layer in layers.items()}


def load(path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
    pipeline.load_lora_weights(path)
    return changes(pipeline.unet)


def test_diffusers_loads_an_export_at_its_scale(exported):
    folder, wanted = exported
    torch.testing.assert_close(load(folder), wanted)


def test_the_kohya_converter_keeps_the_scale_of_an_export(exported, tmp_path):
    """The converter writes alpha equal to the rank, whatever it was."""
    folder, wanted = exported
    converted = convert_state_dict_to_kohya(load_file(folder / "pytorch_lora_weights.safetensors"))
    alphas = {value.item() for name, value in converted.items() if name.endswith(".alpha")}
    assert alphas == {4}
    save_file(converted, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(load(tmp_path / "kohya.safetensors"), wanted)
