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
    current, total = progress["current"], progress["total"]
    done = current["processed"]  # one that is only begun is begun again
    unused = 0 if done >= batches else done % accumulate_grad_batches
    back = {name: current[name] - (done - unused) for name in ("ready", "started", "processed")}
    # `completed` stays one behind where it was: by that Lightning knows that the batch's end was under way.
    back["completed"] = unused
    for counters in (current, total):
        for name, count in back.items():
            counters[name] -= count
    return unused
