"""Exported weights whose images differ from those of the pretrained model."""

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from lit_align.backbones import LoRA, StableDiffusionXL
from tests.support.paths import PIPELINE


def darker(folder):
    """Write a UNet whose images are darker than the base's."""
    unet = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias.add_(0.1)
    unet.save_pretrained(folder)
    return folder


def adapter(folder):
    """Write a LoRA far from zero, in the layout of `lit-align export`."""
    backbone = StableDiffusionXL(str(PIPELINE), lora=LoRA(rank=2, alpha=6))
    torch.manual_seed(0)
    layers = {}
    for name, weight in backbone.denoiser.named_parameters():
        if "lora_" in name:
            layers[name.replace(".default.weight", ".weight")] = torch.randn_like(weight) * 0.1
    metadata = {"r": 2, "lora_alpha": 6, "target_modules": LoRA().target_modules}
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata, safe_serialization=True
    )
    return folder
