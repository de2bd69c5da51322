"""The forward process: noise, targets and errors. Torch and `types` only."""

from lit_align.diffusion.errors import NoisedPair, image_errors, noise_pair, pair_errors, pair_overlap
from lit_align.diffusion.schedule import NoiseSchedule

__all__ = ["NoiseSchedule", "NoisedPair", "image_errors", "noise_pair", "pair_errors", "pair_overlap"]
