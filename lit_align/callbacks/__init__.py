"""Lightning callbacks: what happens around the training step."""

from lit_align.callbacks.chosen_error_rise import ChosenErrorRise
from lit_align.callbacks.divergence_guard import DivergenceGuard
from lit_align.callbacks.due_validation import DueValidation
from lit_align.callbacks.preemption import Preemption
from lit_align.callbacks.reference_update import ReferenceUpdate
from lit_align.callbacks.sample_grid import SampleGrid
from lit_align.callbacks.start_banner import StartBanner
from lit_align.callbacks.step_progress import StepProgress
from lit_align.callbacks.superseded_checkpoints import SupersededCheckpoints
from lit_align.callbacks.throughput import Throughput
from lit_align.callbacks.win_rate import WinRate

__all__ = [
    "ChosenErrorRise",
    "DivergenceGuard",
    "DueValidation",
    "Preemption",
    "ReferenceUpdate",
    "SampleGrid",
    "StartBanner",
    "StepProgress",
    "SupersededCheckpoints",
    "Throughput",
    "WinRate",
]
