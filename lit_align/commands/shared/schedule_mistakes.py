"""Explain a learning-rate schedule that a config cannot hold."""

import re

OURS = "lit_align.training.lr_schedulers"
OBJECTS = ("SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")  # of torch; ours have the same names
FUNCTIONS = ("LambdaLR", "MultiplicativeLR")


def explain_schedule(message: str) -> str | None:
    """Explain jsonargparse's message about `model.lr_scheduler`; None if it is about something else."""
    wanted = re.search(r"Given value:.*?class_path'?[=:] ?'([\w.]+)'", message, re.DOTALL)
    if 'model.lr_scheduler"' not in message or wanted is None:
        return None
    path = wanted[1]
    name = path.rpartition(".")[2]
    if path.startswith("torch.") and name in OBJECTS:
        return f"model.lr_scheduler: a config can hold {OURS}.{name}, not torch's {name}. Set it as class_path."
    if name in FUNCTIONS:
        return (
            f"model.lr_scheduler: {name} takes a function, which a config cannot hold. Choose a schedule that takes "
            "numbers, or write a class in a file of the working directory and name it."
        )
    reason = re.search(r"callable class: (.*?)(?:\. Got value|\n\s*- Expected|$)", message, re.DOTALL)
    return f"model.lr_scheduler: {path}: {' '.join(reason[1].split())}." if reason else None
