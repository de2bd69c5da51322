"""Lightning callbacks: what happens around the training step."""

from lit_align.callbacks.reference_update import ReferenceUpdate
from lit_align.callbacks.sample_grid import SampleGrid
from lit_align.callbacks.start_banner import StartBanner
from lit_align.callbacks.step_progress import StepProgress
from lit_align.callbacks.throughput import Throughput

__all__ = ["ReferenceUpdate", "SampleGrid", "StartBanner", "StepProgress", "Throughput"]
