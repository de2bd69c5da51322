"""`lit-align generate`: the chosen side from another pipeline, the rejected one from another UNet."""

import io
import json

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from lit_align.backbones import StableDiffusionXL, sampling
from lit_align.cli import main
from lit_align.data.shards.layout import read_samples
from tests.support.exports import darker
from tests.support.paths import PIPELINE
from tests.support.pipelines import small_sdxl


def pixels(data):
    """Decode an image to (3, height, width) float32."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1).float()


def test_each_side_is_drawn_by_its_own_model(tmp_path):
    (tmp_path / "prompts.txt").write_text("fox\n")
    unet = darker(tmp_path / "unet")
    words = [f"--prompts={tmp_path}/prompts.txt", f"--output={tmp_path}/out", f"--repo={PIPELINE}"]
    words += [f"--chosen_repo={small_sdxl()}", f"--rejected_unet={unet}", "--guidance_scale=5", "--image_format=png"]
    main(["generate", *words, "--steps=2", "--accelerator=cpu"])
    (sample,) = read_samples(str(tmp_path / "out/00000.tar"))
    about = json.loads(sample.fields["json"])

    chosen, rejected = StableDiffusionXL(str(small_sdxl())), StableDiffusionXL(str(PIPELINE))
    rejected.denoiser.load_state_dict(UNet2DConditionModel.from_pretrained(unet).state_dict())
    sides = {}
    for number in (0, 1):
        image = about[f"image_{number}"]
        backbone = chosen if image["side"] == "chosen" else rejected
        expected = sampling.generate(backbone, ["fox"], [image["seed"]], 32, 32, 2, 5.0)[0]
        assert (pixels(sample.fields[f"jpg_{number}.png"]) - expected).abs().max() <= 1
        sides[image["side"]] = (image["repo"], image["unet"])
    assert sides == {"chosen": (str(small_sdxl()), None), "rejected": (str(PIPELINE), str(unet))}
