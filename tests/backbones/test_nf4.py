"""A frozen base in NF4 under a LoRA, against a slow twin and the base in full precision."""

import copy
import sys

import pytest
import torch
from torch import nn

from lit_align.backbones import LoRA
from lit_align.backbones.loading.denoisers import load_denoiser
from lit_align.backbones.nf4 import BLOCK, NF4Linear, count_weights, quantize_linears
from lit_align.backbones.sampling import generate
from lit_align.callbacks.start_banner import model_lines
from lit_align.commands.export import export
from lit_align.objectives import DiffusionDPO
from lit_align.training.checkpoints.resume import check_beginning
from lit_align.user_errors import UserValueError
from tests.support.paths import PIPELINE
from tests.support.runs import equal, fit, keep_all, make_data, make_module, weights

# Values of NF4, from appendix E of arXiv 2305.14314.
CODE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)
NF4 = LoRA(rank=2, base="nf4")


def nearest(weight):
    """Round to the nearest value of NF4 times the block's largest absolute value, block by block."""
    blocks = [block / block.abs().max() for block in weight.flatten().split(BLOCK)]
    return torch.cat(
        [
            CODE[(block[:, None] - CODE).abs().argmin(1)] * part.abs().max()
            for block, part in zip(blocks, weight.flatten().split(BLOCK), strict=True)
        ]
    ).view(weight.shape)


@pytest.mark.parametrize("shape", [(8, 32), (5, 14), (6, 50), (64, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_weights_are_rounded_to_the_nearest_value(shape, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    rounded = NF4Linear(layer)
    assert rounded.restored().dtype == dtype
    assert torch.equal(rounded.restored(), nearest(layer.weight.detach().float()).to(dtype))
    assert rounded.weight.nbytes == (layer.weight.numel() + 1) // 2
    assert rounded.scales.nbytes == 4 * -(-layer.weight.numel() // BLOCK)
    assert count_weights(rounded) == count_weights(layer)


@pytest.fixture(scope="module")
def pair():
    """The bundled model with a LoRA that is no longer zero: on a base in NF4, and on its base in full precision."""
    modules = []
    for lora in (NF4, LoRA(rank=2)):
        module = make_module(lora=lora, repo=PIPELINE)
        generator = torch.Generator().manual_seed(1)
        for weight in module.backbone.trainable_parameters().values():
            weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
        modules.append(module)
    return modules


def restored(module, dtype=torch.float32):
    """Copy a module with plain layers that hold the weights restored in this precision."""
    module = copy.deepcopy(module)
    module.backbone.cast_frozen(dtype)
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, NF4Linear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight, plain.bias = nn.Parameter(layer.restored(), requires_grad=False), layer.bias
                setattr(parent, name, plain)
    return module


def step(module, dtype=torch.float32):
    """Compute the chosen errors of held-out pairs, and the gradients of the LoRA as one vector."""
    backbone, data = copy.deepcopy(module).backbone, make_data(batch_size=4)
    data.setup("fit")
    backbone.cast_frozen(dtype)
    encoded = backbone.encode(next(iter(data.val_dataloader())))
    trained = list(backbone.trainable_parameters().values())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        errors = backbone.pair_errors(encoded, module.validation_draw(encoded, 0))
    gradients = torch.autograd.grad((errors.chosen - errors.rejected).sum(), trained)
    return errors.chosen.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def test_all_linear_layers_are_rounded_and_nothing_else(pair):
    denoiser, full = (module.backbone.denoiser for module in pair)
    layers = {name.replace(".base_layer", ""): layer for name, layer in denoiser.named_modules()}
    linear = {name.replace(".base_layer", "") for name, layer in full.named_modules() if type(layer) is nn.Linear}
    linear = {name for name in linear if ".lora_" not in name}
    assert linear == {name for name, layer in layers.items() if isinstance(layer, NF4Linear)}
    assert len(linear) > 50
    others = {name: w for name, w in full.named_parameters() if name.rpartition(".")[0] in dict(full.named_modules())}
    own = dict(denoiser.named_parameters())
    kept = [name for name in others if name in own and own[name].dtype == torch.float32]
    assert all(torch.equal(own[name], others[name]) for name in kept)
    assert any("conv" in name for name in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_errors_and_gradients_equal_those_of_the_restored_weights(pair, dtype):
    """Restoring at each product changes nothing but the memory; in bfloat16 matrix products round by their layout."""
    errors, gradients = step(pair[0], dtype)
    wanted = step(restored(pair[0], dtype), dtype)
    assert torch.equal(errors, wanted[0])
    assert torch.cosine_similarity(gradients, wanted[1], dim=0) > (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)
    assert dtype == torch.bfloat16 or torch.equal(gradients, wanted[1])


def test_errors_and_gradients_are_near_those_of_full_precision(pair):
    """Within the rounding of 4 bits (6 % and 0.963 here), which scales that are wrong in a few layers leave."""
    (errors, gradients), (full, wanted) = step(pair[0]), step(pair[1])
    torch.testing.assert_close(errors, full, rtol=0.1, atol=0)
    assert torch.cosine_similarity(gradients, wanted, dim=0) > 0.95
    wrong = copy.deepcopy(pair[0])
    layers = [layer for layer in wrong.modules() if isinstance(layer, NF4Linear)]
    for layer in layers[:: len(layers) // 4]:
        layer.scales.data = (1.5 * layer.scales.view(torch.float32)).view(torch.int32)
    errors, gradients = step(wrong)
    assert ((errors - full).abs() > 0.1 * full).any()
    assert torch.cosine_similarity(gradients, wanted, dim=0) < 0.95


def test_casts_of_the_module_leave_the_scales(pair):
    backbone = copy.deepcopy(pair[0].backbone)
    before = {name: layer.restored() for name, layer in backbone.named_modules() if isinstance(layer, NF4Linear)}
    backbone.cast_frozen(torch.bfloat16)
    nn.Module.to(backbone, torch.bfloat16)
    backbone.cast_frozen(torch.float32)
    after = {name: layer.restored() for name, layer in backbone.named_modules() if isinstance(layer, NF4Linear)}
    assert equal(before, after)


def test_images_are_drawn(pair):
    options = {"prompts": ["a fox"], "seeds": [0], "height": 32, "width": 32, "steps": 2}
    images = generate(pair[0].backbone, **options)
    assert torch.equal(images, generate(restored(pair[0]).backbone, **options))
    assert not torch.equal(images, generate(pair[1].backbone, **options))


def test_the_lora_starts_as_without_nf4():
    quantized, full = (make_module(lora=lora, objective=DiffusionDPO()) for lora in (NF4, LoRA(rank=2)))
    assert equal(weights(quantized), weights(full))
    assert quantized.backbone.reference_weights().keys() == full.backbone.reference_weights().keys()
    assert any(line.endswith("; base in NF4") for line in model_lines(quantized, []))
    trainable = [next(line for line in model_lines(module, []) if "trainable" in line) for module in (quantized, full)]
    assert trainable[0] == trainable[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_resumed_run_ends_like_the_unbroken_one(tmp_path, precision):
    """With DPO's second adapter and gradient checkpointing; the checkpoint holds the LoRA alone."""

    def make():
        module = make_module(lora=NF4, objective=DiffusionDPO())
        module.backbone.denoiser.enable_gradient_checkpointing()
        return module

    whole, again = make(), make()
    fit(whole, make_data(), tmp_path, 2, callbacks=[keep_all(tmp_path, every_n_train_steps=1)], precision=precision)
    path = tmp_path / "step=1.ckpt"
    fit(again, make_data(), tmp_path, 2, path, precision=precision)
    assert equal(weights(whole), weights(again))
    saved = torch.load(path, weights_only=True)
    assert {name.split(".")[-3] for name in saved["state_dict"]} == {"lora_A", "lora_B"}
    export(path, tmp_path / "out")
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()
    began = saved["lit_align"]
    older = began | {"lora": {name: value for name, value in began["lora"].items() if name != "base"}}
    now = began | {"lora": began["lora"] | {"base": "compute"}}
    check_beginning(older, now, "stop")  # a version without `base` had no other
    with pytest.raises(UserValueError, match=r"another backbone: .*base"):
        check_beginning(older, began, "stop")
    with pytest.raises(UserValueError, match=r"another backbone: .*base"):
        check_beginning(began, now, "stop")


def test_what_cannot_work_is_refused(pair, monkeypatch):
    with pytest.raises(UserValueError, match=r"lora\.base is 'fp4'; it must be compute or nf4"):
        LoRA(base="fp4")
    with pytest.raises(UserValueError, match="cannot be merged into weights in NF4"):
        load_denoiser(pair[0].backbone, "last.ckpt")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserValueError, match=r"lora\.base is nf4, which needs bitsandbytes: pip install"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)))
