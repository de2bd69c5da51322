"""Checkpoints without a run."""

import torch
from torch.distributed.checkpoint import save as save_in_parts


def write(path, step, **entries):
    """Write a checkpoint without weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {}, **entries}, path)
    return path


def write_in_parts(folder, step, **meta):
    """Write a checkpoint as sharded runs do."""
    save_in_parts({"state_dict": {"backbone.x": torch.arange(6.0)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": step, **meta}, folder / "meta.pt")
    return folder
