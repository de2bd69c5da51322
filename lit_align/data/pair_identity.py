"""What decides the pairs of a run, and what a run sees of them, whatever its batches and devices."""

from typing import Any

from lit_align.data.datamodule import PreferenceDataModule
from lit_align.user_errors import UserValueError

BATCHING = ("batch_size", "world_size", "shuffle_window")  # of an order, without effect on a pair


def describe_pairs(data: PreferenceDataModule) -> dict[str, Any]:
    """Describe labels, shards, shapes, seed, augmentation and caches of a data module that is set up for `fit`.

    Raises:
        UserValueError: if votes are cast while training, which nobody knows before.
    """
    if data.live_vote is not None:
        raise UserValueError(
            "data.scorers order the pairs while a run trains, so that their errors cannot be computed before. Run "
            "lit-align score, and set data.vote alone."
        )
    found = {}
    for split in (data.train, data.val):
        if split is not None:
            order = data.order(split, 0, 0, 1).fingerprint()
            kept = {name: value for name, value in order.items() if name not in BATCHING}
            found[split.name] = {**kept, "augmentation": str(split.transform), "cached": split.cache is not None}
    return found
