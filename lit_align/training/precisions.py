"""Precisions of the Trainer."""

import torch

COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
COMPUTE_DTYPES |= {"16-mixed": torch.float16, "16-true": torch.float16}
SPELLINGS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}


def full_spelling(precision: object) -> str:
    """Return the full spelling of a Trainer's precision."""
    return SPELLINGS.get(str(precision), str(precision))


def compute_dtype(precision: object) -> torch.dtype:
    """Return the precision of frozen weights under a Trainer's precision, in any of its spellings."""
    return COMPUTE_DTYPES.get(full_spelling(precision), torch.float32)
