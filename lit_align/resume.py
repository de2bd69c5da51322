"""What a checkpoint says of how far the run is."""

from typing import Any


def rewind_to_step(loops: dict[str, Any], accumulate_grad_batches: int, batches: float) -> int:
    """Count only the micro-batches that an optimizer step has used, and return how many do not count any more.

    A checkpoint may be written in the middle of an accumulation (at a time interval, on an error). It holds no
    gradients, so the resumed run must see the pairs of the unfinished step again.

    Args:
        loops: the Trainer's state, see `Trainer.fit_loop`; it is changed.
        accumulate_grad_batches: micro-batches per step; an epoch's last step may have fewer.
        batches: of an epoch.
    """
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    done = progress["current"]["ready"]
    unused = 0 if done >= batches else done % accumulate_grad_batches
    for counters in (progress["current"], progress["total"]):
        for name, value in counters.items():
            if isinstance(value, int) and not isinstance(value, bool):
                counters[name] = value - unused
    return unused
