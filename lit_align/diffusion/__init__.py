"""The forward process: noise, targets and errors. Torch and `types` only."""

from lit_align.diffusion.errors import NoisedPair, noise_pair, pair_errors
from lit_align.diffusion.schedule import NoiseSchedule

__all__ = ["NoiseSchedule", "NoisedPair", "noise_pair", "pair_errors"]
