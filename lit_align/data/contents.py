"""What shards hold, in a few digests: a run goes on only with the images and prompts that it began with.

An index, or stored scores, has a digest of each pair. Without them the digests are of the prompts, which are read with
the labels, of the pairs' sizes, and of a few bytes of the images: no shard is read as a whole.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_align.common.manifest import differences, in_words
from lit_align.common.progress import BRIEF, track
from lit_align.data.shards.filesystems import is_url
from lit_align.data.shards.scan import Shard
from lit_align.data.shards.storage import open_binary, read_range
from lit_align.user_errors import UserValueError

PAIRS, PROMPTS = "images and prompts", "prompts"
SIZES, SAMPLE, SMALL_SAMPLE = "sizes", "sampled bytes", "a few sampled bytes"  # the last alone of shards at addresses
SAMPLED_PAIRS, FEW_PAIRS = 256, 4  # of a shard
WINDOW = 64  # bytes in each image
UNSAMPLED = ("pipe:", "http:", "https:")  # a part of a file may take all of it


def contents(shards: Sequence[Shard], timeout: float | None, sampled: bool = False) -> dict[str, str]:
    """Describe what scanned shards hold.

    Args:
        shards: in their order.
        timeout: of a read, in seconds; None waits forever.
        sampled: also describe sizes and sampled bytes where the pairs' digests are known.
    """
    filled = [shard for shard in shards if len(shard)]
    found = {}
    if all(shard.content_known_from for shard in filled):
        found[PAIRS] = _digest(shard.pairs.content.tobytes() for shard in filled)
    if all(shard.prompts for shard in filled):
        found[PROMPTS] = _digest(shard.prompts.encode() for shard in filled)
    if sampled or PAIRS not in found:
        found[SIZES] = _digest(shard.pairs.size.tobytes() for shard in filled)
        for name, pairs in ((SMALL_SAMPLE, FEW_PAIRS), (SAMPLE, SAMPLED_PAIRS)):
            with ThreadPoolExecutor(8) as pool:
                sampled_bytes = pool.map(partial(_sample, timeout, pairs), filled)
                samples = track(sampled_bytes, len(filled), "sampling", "shard", delay=BRIEF)
                known = [sample for sample in samples if sample is not None]
            found |= {name: _digest(known)} if len(known) == len(filled) else {}  # else nothing is compared
    return found


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:12]


def _sample(timeout: float | None, pairs: int, shard: Shard) -> bytes | None:
    """Read bytes at a quarter and three quarters of some pairs, in both images; None where that is not possible."""
    remote = is_url(shard.path)
    if shard.path.startswith(UNSAMPLED) or (remote and pairs > FEW_PAIRS):
        return None
    rows = range(0, len(shard), -(-len(shard) // pairs))
    places = [int(shard.pairs.offset[i] + shard.pairs.size[i] * share // 4) for i in rows for share in (1, 3)]
    try:
        if remote:
            return b"".join(read_range(shard.path, place, WINDOW, timeout) for place in places)
        with open_binary(shard.path, timeout) as file:
            return b"".join(file.read(WINDOW) for place in places if file.seek(place) == place)
    except OSError:  # a cache may replace the shards
        return None


def check_resumed(began: Mapping[str, Any], now: Mapping[str, Any], shards: Sequence[Shard]) -> None:
    """Refuse to resume a run with another order, or with shards of other images or prompts.

    Args:
        began: the data module's state in the checkpoint.
        now: its state in this run.
        shards: of this run.

    Raises:
        UserValueError: naming what differs.
    """
    old, new = dict(began), dict(now)
    then, held = old.pop("contents", {}), new.pop("contents")
    _compare_held_out(old.pop("held_out", None), new.pop("held_out", None))
    if changed := differences(old, new):
        raise UserValueError(
            f"The checkpoint's run read its pairs in another order ({in_words(changed)}), so it cannot go on "
            "exactly. Resume with the old values, or export the weights and start a new run from them."
        )
    if SIZES in then and SIZES not in held:  # the run began without the index
        held |= contents(shards, None, sampled=True)
    both = then.keys() & held.keys()
    if changed := _known_differences(then, held):
        raise UserValueError(
            f"data.train_shards hold other {in_words(changed)} than those that the checkpoint's run began with, under "
            "equal names, keys and labels. Resume with the old shards, or export the weights and start a new run."
        )
    if not both & {PAIRS, SIZES}:
        rank_zero_info(
            "The checkpoint does not say which images and prompts its run began with: only the shards' names, keys and "
            "labels are compared."
        )


def _known_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    both = [name for name in then if name in now]
    return differences({name: then[name] for name in both}, {name: now[name] for name in both})


def _compare_held_out(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Say that the held-out pairs are others than before: nothing is trained on them, so the run goes on."""
    if then is not None and now is not None and (changed := _known_differences(then, now)):
        rank_zero_warn(
            f"data.val_shards hold other pairs than those that the checkpoint's run began with ({in_words(changed)}): "
            "do not compare values of validations before and after this step."
        )
