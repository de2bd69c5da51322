"""Compiled blocks and weights in channels_last order: the numbers of the plain denoiser, and its checkpoints."""

from functools import partial

import bitsandbytes
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.utils import counters

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.commands.export import export
from lit_align.internals import allow_graphs
from lit_align.objectives import DiffusionDPO
from lit_align.training.module import GRAPHS
from lit_align.training.strategy_checks import refusals
from lit_align.user_errors import UserValueError
from tests.support.runs import equal, fit, keep_all, make_data, make_module, weights

BACKEND = "aot_eager"  # torch's own capture and gradients with plain kernels: inductor takes minutes on a CPU
KINDS = pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])


def make(lora, **options):
    """Build a module whose policy has moved away from its reference."""
    module = make_module(lora=lora, objective=DiffusionDPO(), backbone=lambda r, lora: backbone(r, lora, **options))
    generator = torch.Generator().manual_seed(0)
    for weight in module.backbone.trainable_parameters().values():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return module


def backbone(repo, lora, **options):
    return StableDiffusionXL(repo, lora=lora, gradient_checkpointing=True, **options)


def measure(module):
    """Return errors of the reference and the policy, (8,), and the gradients of the trained weights by name."""
    data = make_data(flip_probability=0.0)
    data.setup("fit")
    encoded = module.backbone.encode(next(iter(data.train_dataloader())))
    draw = module.validation_draw(encoded, 0)
    reference = module.backbone.reference_pair_errors(encoded, draw)
    policy = module.backbone.pair_errors(encoded, draw)
    (policy.chosen - policy.rejected).sum().backward()
    gradients = {name: weight.grad for name, weight in module.backbone.trainable_parameters().items()}
    return torch.cat([*reference, *policy]), gradients


def assert_alike(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@KINDS
def test_compiled_blocks_give_the_plain_numbers(lora):
    plain, compiled = make(lora), make(lora, compile=True)
    counters.clear()
    allow_graphs(GRAPHS)
    compiled.backbone.compile_blocks(BACKEND)
    compiled.backbone.compile_blocks("no such backend")  # nothing is left to do
    expected = measure(plain)
    errors = expected[0].chunk(2)
    assert not torch.allclose(*errors, rtol=1e-3)  # policy and reference
    assert_alike(measure(compiled), expected)
    for size in (1, 3):  # as in a last batch, without gradients
        more = make_data(flip_probability=0.0, batch_size=size)
        more.setup("fit")
        encoded = compiled.backbone.encode(next(iter(more.train_dataloader())))
        with torch.no_grad():
            compiled.backbone.pair_errors(encoded, compiled.validation_draw(encoded, 0))
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0  # none was left uncompiled
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@KINDS
def test_weights_in_channels_last_order_give_the_plain_numbers(lora):
    assert_alike(measure(make(lora, channels_last=True)), measure(make(lora)))


def test_a_run_in_channels_last_order_is_exported_and_goes_on_without(tmp_path):
    def module(channels_last):
        built = make_module(backbone=lambda r, lora: StableDiffusionXL(r, lora=lora, channels_last=channels_last))
        built.optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=True)  # walks weights and their state side by side
        kernels = [weight for weight in built.backbone.denoiser.parameters() if weight.ndim == 4]
        ordered = [weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels]
        assert all(ordered) if channels_last else not all(ordered)
        return built

    first = module(True)
    fit(first, make_data(), tmp_path, 1, callbacks=[keep_all(tmp_path, every_n_train_steps=1)])
    export(tmp_path / "step=1.ckpt", tmp_path / "unet")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert equal(unet, {name.removeprefix("denoiser."): value for name, value in weights(first).items()})

    second, unbroken = module(False), module(False)
    fit(second, make_data(), tmp_path, 2, ckpt_path=tmp_path / "step=1.ckpt")
    fit(unbroken, make_data(), tmp_path, 2)
    start, end, other = (
        torch.cat([w.flatten() for w in weights(m).values()]) for m in (module(False), unbroken, second)
    )
    assert (end - other).norm() < 0.01 * (end - start).norm()


def test_what_would_undo_channels_last_order_is_refused(tmp_path):
    assert refusals("FSDP2") == []
    (refusal,) = refusals("FSDP2", channels_last=True)
    assert refusal.startswith("model.backbone.channels_last is true, but FSDP2 shards weights")
    module = make_module(backbone=lambda r, lora: StableDiffusionXL(r, lora=lora, channels_last=True))
    module.optimizer = partial(bitsandbytes.optim.AdamW8bit, lr=1e-4)
    with pytest.raises(UserValueError, match=r"AdamW8bit of bitsandbytes.*channels_last is true\. Set it to false"):
        fit(module, make_data(), tmp_path, 1)
