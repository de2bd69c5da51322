"""A chosen kernel of attention: it is the one that runs, in the denoiser only, and gives the plain numbers."""

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.backbones.attention import check_kernel, use_kernel
from lit_align.internals import allow_graphs
from lit_align.objectives import DiffusionDPO
from lit_align.training.module import GRAPHS
from lit_align.user_errors import UserValueError
from tests.support.runs import fit, make_data, make_module

FLASH = "_scaled_dot_product_flash_attention_for_cpu"
KINDS = pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])


class Operators(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def make(lora=None, **options):
    def backbone(repo, lora):
        return StableDiffusionXL(repo, lora=lora, gradient_checkpointing=True, **options)

    return make_module(lora=lora, objective=DiffusionDPO(), backbone=backbone)


def batch(module):
    data = make_data(flip_probability=0.0)
    data.setup("fit")
    images = next(iter(data.train_dataloader()))
    with Operators() as encoding:
        encoded = module.backbone.encode(images)
    return encoded, encoding.calls


def measure(module, encoded):
    """Return errors of reference and policy, gradients, and the calls of flash in forward and backward."""
    draw = module.validation_draw(encoded, 0)
    with Operators() as forward:
        reference = module.backbone.reference_pair_errors(encoded, draw)
        policy = module.backbone.pair_errors(encoded, draw)
    with Operators() as backward:
        (policy.chosen - policy.rejected).sum().backward()
    gradients = {name: weight.grad for name, weight in module.backbone.trainable_parameters().items()}
    return torch.cat([*reference, *policy]), gradients, (forward.calls[FLASH], backward.calls[FLASH])


@KINDS
def test_each_kernel_gives_the_numbers_of_torchs_choice(lora):
    found = {}
    for kernel in ("auto", "flash", "math"):
        module = make(lora)
        module.backbone.train()
        use_kernel(module.backbone, "math")
        use_kernel(module.backbone, kernel)  # the last choice counts
        check_kernel(module.backbone.denoiser, kernel, torch.device("cpu"), torch.float32)
        encoded, encoding = batch(module)
        assert encoding[FLASH] > 0  # encoders keep torch's choice
        found[kernel] = measure(module, encoded)
    errors, gradients, calls = found["auto"]
    assert calls[0] > calls[1] > 0  # forward of policy and reference, and the policy's recomputation
    assert found["flash"][2] == calls
    assert found["math"][2] == (0, 0)
    for kernel in ("flash", "math"):
        torch.testing.assert_close(found[kernel][0], errors, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[kernel][1][name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_a_kernel_breaks_no_compiled_block():
    plain, compiled = make(), make(compile=True)
    for module in (plain, compiled):
        use_kernel(module.backbone, "math")
    allow_graphs(GRAPHS)
    counters.clear()
    compiled.backbone.compile_blocks("aot_eager")
    encoded, _ = batch(plain)
    draw = plain.validation_draw(encoded, 0)
    expected, found = (module.backbone.pair_errors(encoded, draw) for module in (plain, compiled))
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    assert not counters["graph_break"]
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_cannot_run_is_refused_before_the_first_step(tmp_path):
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    for kernel in ("efficient", "cudnn"):
        message = rf"model\.attention is {kernel}, which cannot .* in bfloat16 on cpu: .*Set model\.attention to auto"
        with pytest.raises(UserValueError, match=message):
            fit(make_module(attention=kernel), make_data(), tmp_path, 1, precision="bf16-mixed")
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == before


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_fit_uses_the_kernel(tmp_path, kernel):
    module = make_module(attention=kernel)
    with Operators() as seen:
        fit(module, make_data(), tmp_path, 1, precision="bf16-mixed")
    assert seen.calls[FLASH] > 0
    kernels = {layer.processor.kernel for layer in module.backbone.denoiser.modules() if hasattr(layer, "processor")}
    assert kernels == {kernel}
