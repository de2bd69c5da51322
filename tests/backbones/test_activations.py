"""Activations recomputed or moved to main memory: the plain numbers to the bit, and the bytes that are kept."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from lit_align.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_align.backbones.activations import Offload, is_expensive, offloaded
from lit_align.internals import TorchDispatchMode, allow_graphs
from lit_align.memory.live import LiveBytes, count_saved
from lit_align.memory.main_memory import MeasuredOffload
from lit_align.objectives import DiffusionDPO
from lit_align.training.module import GRAPHS
from lit_align.user_errors import UserValueError
from tests.support.pipelines import small_sdxl, write_stable_diffusion
from tests.support.runs import make_data, make_module

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("lora", [None, LoRA(rank=2, dropout=0.5)], ids=["full", "lora"])


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    return {
        StableDiffusion: write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd15", "epsilon"),
        StableDiffusionXL: small_sdxl(),
    }


class Operators(TorchDispatchMode):
    """Counts the operators that run in this context."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def make(repo, kind=StableDiffusionXL, lora=None, **options):
    """Build a module in training mode whose policy has moved away from its reference."""
    module = make_module(
        lora=lora, objective=DiffusionDPO(), repo=repo, backbone=lambda r, lora: kind(r, lora=lora, **options)
    )
    generator = torch.Generator().manual_seed(0)
    for weight in module.backbone.trainable_parameters().values():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return module.train()


def measure(module, context=None, dtype=None, watch=None):
    """Take a step; return errors (8,) with gradients by name, bytes that are kept, and the backward's operators."""
    backbone = module.backbone
    data = make_data(flip_probability=0.0)
    data.setup("fit")
    encoded = backbone.encode(next(iter(data.train_dataloader())))
    draw = module.validation_draw(encoded, 0)
    torch.manual_seed(0)  # of the dropout
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        reference = backbone.reference_pair_errors(encoded, draw)
        with context or count_saved(backbone.parameters()) as saved:
            policy = backbone.pair_errors(encoded, draw)
            kept = saved()
    watch = watch or Operators()
    with watch:
        (policy.chosen - policy.rejected).sum().backward()
    numbers = {name: weight.grad for name, weight in backbone.trainable_parameters().items()}
    return {"errors": torch.cat([*reference, *policy]), **numbers}, kept, getattr(watch, "counts", {})


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert all(value.abs().max() > 0 for value in expected.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [StableDiffusion, StableDiffusionXL])
@KINDS
def test_recomputed_activations_are_the_plain_ones(repos, kind, lora, dtype):
    settings = (False, "selective", True)
    runs = [measure(make(repos[kind], kind, lora, gradient_checkpointing=value), dtype=dtype) for value in settings]
    for numbers, _, _ in runs[1:]:
        assert_equal(numbers, runs[0][0])
    plain, selective, full = (kept for _, kept, _ in runs)
    assert full < selective < plain
    for operator in ("aten.convolution.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"):
        assert [operators.get(operator, 0) > 0 for _, _, operators in runs] == [False, False, True]
    repeated = [operators.get("aten.native_group_norm.default", 0) for _, _, operators in runs]
    assert 0 == repeated[0] < repeated[1] <= repeated[2]


def test_long_products_are_expensive():
    def factors(terms):
        return torch.empty(2, terms, device="meta"), torch.empty(terms, 3, device="meta")

    bias = torch.empty(3, device="meta")
    assert [is_expensive("aten.mm.default", factors(terms)) for terms in (63, 64)] == [False, True]
    assert [is_expensive("aten.addmm.default", (bias, *factors(terms))) for terms in (63, 64)] == [False, True]
    assert is_expensive(str(torch.ops.aten.convolution.default), ())
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        assert is_expensive(str(getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default), ())
    assert not is_expensive("aten.native_group_norm.default", ())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@KINDS
def test_activations_that_were_moved_give_the_plain_numbers(repos, lora, checkpointing):
    """On the CPU, moved from main memory to main memory; each storage once, weights never."""
    options = {"lora": lora, "gradient_checkpointing": checkpointing}
    plain, kept, _ = measure(make(repos[StableDiffusionXL], **options))
    module = make(repos[StableDiffusionXL], **options)
    offload = MeasuredOffload(module.backbone.denoiser, CPU, LiveBytes(), home=CPU)
    numbers, moved, operators = measure(module, offload.counted())
    assert_equal(numbers, plain)
    assert moved == kept
    assert operators["aten.set_.source_Storage_storage_offset"] >= len(offload.sent) > 20
    contents = [weakref.ref(content) for content in offload.sent]
    offload.sent.clear()
    del module
    gc.collect()
    assert [content for content in contents if content() is not None] == []


def test_activations_of_compiled_blocks_move_too(repos):
    allow_graphs(GRAPHS)
    plain, kept, _ = measure(make(repos[StableDiffusionXL], gradient_checkpointing=True))
    module = make(repos[StableDiffusionXL], gradient_checkpointing=True, compile=True)
    module.backbone.compile_blocks("aot_eager")  # plain kernels
    offload = MeasuredOffload(module.backbone.denoiser, CPU, LiveBytes(), home=CPU)
    numbers, moved, _ = measure(module, offload.counted(), watch=nullcontext())  # no mode, under which none is compiled
    assert 0.9 * kept < moved < 1.1 * kept
    torch.testing.assert_close(numbers["errors"], plain["errors"], rtol=1e-5, atol=1e-6)


def test_moved_tensors_keep_values_order_and_sharing():
    layer = torch.nn.Linear(4, 4)
    image = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = []
    with Offload(layer, CPU):
        first = image * 2
        halves = first.chunk(2, 1)
        (halves[0] * halves[1]).sum().backward()
    expected = 4 * torch.cat([image.detach()[:, 2:], image.detach()[:, :2]], 1)
    torch.testing.assert_close(image.grad, expected)
    offload = Offload(layer, CPU)
    packed = [offload.pack_hook(tensor) for tensor in (first, *halves)]
    assert len(offload.moved) == 1
    found = [offload.unpack_hook(tensor) for tensor in packed]
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for tensor, origin in zip(found, (first, *halves), strict=True):
        assert torch.equal(tensor, origin)
        assert tensor.stride() == origin.stride()
        seen.append(tensor.untyped_storage().data_ptr())
    assert len(set(seen)) == 1
    assert seen[0] != first.untyped_storage().data_ptr()
    before = first.detach().clone()
    old = offload.pack_hook(first)
    with torch.no_grad():
        first.add_(1)
    assert torch.equal(offload.unpack_hook(old), before)
    assert torch.equal(offload.unpack_hook(offload.pack_hook(first)), before + 1)
    for weight in (layer.weight, layer.weight.t(), layer.weight.detach()):
        assert offload.unpack_hook(offload.pack_hook(weight)).data_ptr() == weight.data_ptr()


def test_main_memory_is_not_copied_to_itself(repos):
    module = make(repos[StableDiffusionXL], activation_offload=True)
    assert not isinstance(offloaded(module.backbone.denoiser, CPU), Offload)
    assert isinstance(offloaded(module.backbone.denoiser, torch.device("cuda")), Offload)
    assert_equal(measure(module)[0], measure(make(repos[StableDiffusionXL]))[0])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("compile", "gradient_checkpointing is selective, .* with model.backbone.compile true they are fused"),
        ("activation_offload", "whose results stay on the device, but model.backbone.activation_offload is true"),
    ],
)
def test_what_selective_cannot_do_is_refused(repos, option, message):
    with pytest.raises(UserValueError, match=message):
        make(repos[StableDiffusionXL], gradient_checkpointing="selective", **{option: True})
