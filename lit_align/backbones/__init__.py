"""Pretrained diffusion models behind one face: what they encode, denoise and export."""

from lit_align.backbones.base import Backbone
from lit_align.backbones.lora import LoRA
from lit_align.backbones.sdxl import StableDiffusionXL
from lit_align.backbones.stable_diffusion import StableDiffusion

__all__ = ["Backbone", "LoRA", "StableDiffusion", "StableDiffusionXL"]
