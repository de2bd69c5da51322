"""A LoRA's frozen weights, loaded in the compute precision."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.backbones.loading.meta import load_frozen_in
from lit_align.commands.fit import AlignmentCLI, make_cli
from lit_align.objectives import DiffusionDPO
from lit_align.training.precisions import compute_dtype
from tests.support.paths import PIPELINE, ROOT
from tests.support.pipelines import small_sdxl
from tests.support.runs import equal, fit, make_data, make_module, weights

HALF = [torch.bfloat16, torch.float16]


def make(dtype=torch.float32, stored=None, lora=None, folder=None):
    """Build DPO with a LoRA and its reference on a base that its file holds in float32, or in `stored`."""
    repo = small_sdxl() if stored is None else folder
    with load_frozen_in(dtype):
        return make_module(lora=lora or LoRA(rank=2), objective=DiffusionDPO(), repo=repo)


@pytest.fixture(scope="module", params=[None, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def stored(request, tmp_path_factory):
    """Make the arguments of `make` for a UNet whose file is in this precision."""
    if request.param is None:
        return {}
    folder = tmp_path_factory.mktemp("stored") / "sdxl"
    folder.mkdir()
    for part in small_sdxl().iterdir():
        if part.name != "unet":
            (folder / part.name).symlink_to(part)
    unet = UNet2DConditionModel.from_pretrained(small_sdxl(), subfolder="unet")
    unet.to(request.param).save_pretrained(folder / "unet")
    return {"stored": request.param, "folder": folder}


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_bits_are_those_of_weights_that_were_in_float32(stored, dtype):
    """Frozen weights after `cast_frozen`, and the random start of the LoRA and its reference."""
    before, now = make(**stored).backbone, make(dtype, **stored).backbone
    frozen = [weight for name, weight in now.denoiser.named_parameters() if ".lora_" not in name]
    assert {weight.dtype for weight in frozen} == {dtype}
    assert {weight.dtype for weight in now.trainable_parameters().values()} == {torch.float32}
    assert {weight.dtype for weight in now.reference_weights().values()} == {torch.float32}
    for backbone in (before, now):
        backbone.cast_frozen(dtype)
    assert equal(dict(before.denoiser.named_parameters()), dict(now.denoiser.named_parameters()))
    assert len(now.trainable_parameters()) == len(now.reference_weights()) == 64
    assert any(weight.any() for weight in now.trainable_parameters().values())


def test_a_full_denoiser_stays_in_float32():
    with load_frozen_in(torch.bfloat16):
        backbone = StableDiffusionXL(str(small_sdxl()))
    assert {weight.dtype for weight in backbone.denoiser.parameters()} == {torch.float32}
    assert StableDiffusionXL(str(PIPELINE), lora=LoRA()).denoiser.dtype == torch.float32  # outside of the context


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_training_ends_with_equal_bits(tmp_path, precision):
    trained = []
    for dtype in (torch.float32, torch.bfloat16):
        module = make(dtype, lora=LoRA(rank=2, dropout=0.3))
        fit(module, make_data(), tmp_path, 2, precision=precision)
        trained.append(weights(module))
    assert equal(*trained)


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_text_encoders_load_in_the_compute_precision(dtype):
    cast, loaded = (StableDiffusionXL(str(small_sdxl())) for _ in range(2))
    cast.load_encoders()
    for encoders in (cast, loaded):
        encoders.cast_frozen(dtype)
    assert equal(cast.text_encoders.state_dict(), loaded.text_encoders.state_dict())
    assert {weight.dtype for weight in loaded.text_encoders.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("bf16", torch.bfloat16),
        (16, torch.float16),
        ("16-true", torch.float16),
        ("32-true", torch.float32),
        (None, torch.float32),
    ],
)
def test_compute_dtype_knows_the_trainers_spellings(spelling, dtype):
    assert compute_dtype(spelling) == dtype


class Stop(Exception):
    """Ends the command before training."""


class Loaded(AlignmentCLI):
    """Loads all that training needs, and stops."""

    def before_fit(self):
        raise Stop(self.model.backbone.denoiser.dtype)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_the_command_loads_in_the_compute_precision(precision, dtype):
    config = ROOT / "configs/quickstart.yaml"
    words = ["fit", f"--config={config}", f"--trainer.precision={precision}", "--model.backbone.lora.rank=2"]
    with pytest.raises(Stop) as stopped:
        make_cli(Loaded, words, run=True, prog="lit-align")
    assert stopped.value.args == (dtype,)
