"""Objectives: formulas from denoising errors to a loss. They only import torch, `types` and user errors."""

from lit_align.objectives.base import Objective
from lit_align.objectives.dpo import BalancedDPO, DiffusionDPO
from lit_align.objectives.mapo import MaPO, PaperMaPO
from lit_align.objectives.sft import SFT
from lit_align.objectives.wrappers import NoiseErrors, WinnerGuard

__all__ = ["SFT", "BalancedDPO", "DiffusionDPO", "MaPO", "NoiseErrors", "Objective", "PaperMaPO", "WinnerGuard"]
