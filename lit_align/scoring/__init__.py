"""Preference scorers, and the votes by which they decide which image of a pair is better."""

from lit_align.scoring.base import Scorer
from lit_align.scoring.presets import load_scorers
from lit_align.scoring.scorers.aesthetic import Aesthetic
from lit_align.scoring.scorers.analytic import Colourfulness, Exposure, HighContrast, Sharpness
from lit_align.scoring.scorers.clip import CLIPScore, PickScore
from lit_align.scoring.scorers.hps import HPSv2
from lit_align.scoring.scorers.image_reward import ImageReward

__all__ = [
    "Aesthetic",
    "CLIPScore",
    "Colourfulness",
    "Exposure",
    "HPSv2",
    "HighContrast",
    "ImageReward",
    "PickScore",
    "Scorer",
    "Sharpness",
    "load_scorers",
]
