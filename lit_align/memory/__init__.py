"""Estimate the device memory that a training run needs, from shapes on the meta device."""

from lit_align.memory.estimate import Estimate, UnknownPrecision, Work, estimate
from lit_align.memory.optimizer_bytes import OptimizerBytes, measure_optimizer
from lit_align.memory.shares import Shares
from lit_align.memory.weight_bytes import WeightBytes, weigh

__all__ = [
    "Estimate",
    "OptimizerBytes",
    "Shares",
    "UnknownPrecision",
    "WeightBytes",
    "Work",
    "estimate",
    "measure_optimizer",
    "weigh",
]
