"""What all shards hold together: counts, sizes, repeated prompts and images, as plain values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lit_align.commands.inspect.shard_report import Look, digest

EXAMPLES = 20  # of each kind of duplicate, that are named
FREQUENT = 10  # sizes and prompts that are named
Column = NDArray[Any]


class Pairs(NamedTuple):
    """The samples that are pairs, ties among them, in the order of the shards."""

    columns: dict[str, Column]  # each (pairs,)
    shard: Column  # (pairs,) number of the shard
    row: Column  # (pairs,) number of the sample in its shard

    def places(self, chosen: Column) -> list[tuple[int, int]]:
        """Shard and row of some pairs."""
        return list(zip(self.shard[chosen].tolist(), self.row[chosen].tolist(), strict=True))


def pairs_of(looks: Sequence[Look]) -> Pairs:
    """The sound rows of all shards as columns of numbers."""
    rows = pa.concat_tables([look.rows for look in looks])
    counts = [look.rows.num_rows for look in looks]
    sound = rows["fault"].is_null().to_numpy()
    shard = np.repeat(np.arange(len(looks), dtype=np.int32), counts)
    row = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    numbers = [name for name in rows.column_names if name not in ("key", "fault")]
    return Pairs({name: rows[name].to_numpy()[sound] for name in numbers}, shard[sound], row[sound])


def draw_pairs(pairs: Pairs, count: int) -> list[tuple[int, int]]:
    """Places of some pairs, the same ones however the shards were shared out, in the order of the shards."""
    return pairs.places(np.sort(np.argsort(pairs.columns["draw"], kind="stable")[:count]))


def summarise(
    looks: Sequence[Look], pairs: Pairs, prompts_of: Callable[[list[tuple[int, int]]], list[str]]
) -> dict[str, Any]:
    """The report as plain values; `prompts_of` gives the prompts at some places."""
    columns = pairs.columns
    label = columns["label_0"]
    ties = int((label == 0.5).sum())
    decided = len(label) - ties
    samples = sum(look.rows.num_rows for look in looks)
    return {
        "shards": len(looks),
        "broken_shards": sum(look.fault is not None for look in looks),
        "bytes": sum(look.bytes for look in looks),
        "image_bytes": int(columns["image_bytes"].sum()),
        "samples": samples,
        "pairs": decided,
        "ties": ties,
        "broken": samples - len(label),
        "image_0_preferred": int((label == 1).sum()) / decided if decided else None,
        "images": _sizes(columns),
        "prompts": _prompts(pairs, prompts_of),
        "duplicates": _duplicates(looks, pairs),
        "index": {
            "indexed_shards": sum(look.indexed for look in looks),
            "differing_shards": sum(bool(look.differences) for look in looks),
        },
        "faults": {
            "shards": [{"shard": look.shard, "reason": look.fault} for look in looks if look.fault is not None],
            "samples": [fault for look in looks for fault in _broken_samples(look)],
            "index": [{"shard": look.shard, "difference": text} for look in looks for text in look.differences],
        },
    }


def _broken_samples(look: Look) -> list[dict[str, str]]:
    broken = look.rows.filter(look.rows["fault"].is_valid())
    keys, reasons = broken["key"].to_pylist(), broken["fault"].to_pylist()
    return [{"shard": look.shard, "key": key, "reason": reason} for key, reason in zip(keys, reasons, strict=True)]


def _sizes(columns: dict[str, Column]) -> dict[str, Any] | None:
    heights = np.concatenate([columns["height_0"], columns["height_1"]]).astype(np.int64)
    widths = np.concatenate([columns["width_0"], columns["width_1"]]).astype(np.int64)
    if not len(heights):
        return None
    kinds, counts = np.unique((widths << 32) + heights, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
    unequal = (columns["height_0"] != columns["height_1"]) | (columns["width_0"] != columns["width_1"])
    return {
        "width": _spread(widths),
        "height": _spread(heights),
        "short_side": _spread(np.minimum(widths, heights)),
        "aspect_ratio": _spread(widths / heights),
        "different_sizes": len(kinds),
        "frequent_sizes": [
            {"width": int(kinds[i] >> 32), "height": int(kinds[i] & 0xFFFFFFFF), "images": int(counts[i])}
            for i in frequent
        ],
        "pairs_of_unequal_size": int(unequal.sum()),
    }


def _spread(values: Column) -> dict[str, float]:
    return {"least": values.min().item(), "median": float(np.median(values)), "greatest": values.max().item()}


def _prompts(pairs: Pairs, prompts_of: Callable[[list[tuple[int, int]]], list[str]]) -> dict[str, Any]:
    digests = pairs.columns["prompt"]
    _, first, counts = np.unique(digests, return_index=True, return_counts=True)
    frequent = np.lexsort((first, -counts))[:FREQUENT]
    frequent = frequent[counts[frequent] > 1]
    texts = prompts_of(pairs.places(first[frequent]))
    repeated = [{"prompt": text, "pairs": n} for text, n in zip(texts, counts[frequent].tolist(), strict=True)]
    return {
        "unique": len(counts),
        "empty": int((digests == np.uint64(digest(b""))).sum()),
        "used_more_than_once": int((counts > 1).sum()),
        "most_repeated": repeated,
    }


def _duplicates(looks: Sequence[Look], pairs: Pairs) -> dict[str, Any]:
    first, second = pairs.columns["image_0"], pairs.columns["image_1"]
    same = first == second
    # An image that is in a pair twice counts once there: this is about other pairs.
    images, counts = np.unique(np.concatenate([first, second[~same]]), return_counts=True)
    shared = images[counts > 1]
    return {
        "unique_images": len(images),
        "within_a_pair": {"pairs": int(same.sum()), "examples": _named(looks, pairs, np.flatnonzero(same)[:EXAMPLES])},
        "across_pairs": {
            "images": len(shared),
            "pairs": int((np.isin(first, shared) | np.isin(second, shared)).sum()),
            "most_pairs_of_one_image": int(counts.max(initial=0)),
        },
        "repeated_pairs": _repeated_pairs(looks, pairs),
    }


def _repeated_pairs(looks: Sequence[Look], pairs: Pairs) -> dict[str, Any]:
    """Pairs of the same two images, in either order, and the same prompt."""
    first, second, prompt = (pairs.columns[name] for name in ("image_0", "image_1", "prompt"))
    low, high = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((prompt, high, low))  # stable: within a group in the order of the shards
    new = np.ones(len(order), dtype=bool)
    for column in (low, high, prompt):
        new[1:] &= column[order][1:] == column[order][:-1]
    new[1:] = ~new[1:]
    begins = np.flatnonzero(new)
    sizes = np.diff(np.append(begins, len(order)))
    exchanged = first > second
    label = pairs.columns["label_0"]
    winner = np.where(exchanged, 1 - label, label)  # 1: the low one, 0: the high one, whatever the order
    winner = np.where(first == second, 0.5, winner)
    groups = sizes > 1
    flags = {"with_exchanged_images": _both(exchanged, ~exchanged, order, begins) & groups}
    flags["with_contradictory_labels"] = _both(winner == 1, winner == 0, order, begins) & groups
    examples = []
    for group in np.flatnonzero(groups)[np.argsort(order[begins[groups]], kind="stable")][:EXAMPLES]:
        members = order[begins[group] : begins[group] + sizes[group]][:EXAMPLES]
        about = {name: bool(flag[group]) for name, flag in flags.items()}
        examples.append({"times": int(sizes[group]), **about, "pairs": _named(looks, pairs, members)})
    return {
        "groups": int(groups.sum()),
        "superfluous_pairs": int((sizes[groups] - 1).sum()),
        **{name: int(flag.sum()) for name, flag in flags.items()},
        "examples": examples,
    }


def _both(this: Column, that: Column, order: Column, begins: Column) -> Column:
    """Per group, whether one of its pairs is this and another one is that."""
    if not len(begins):
        return np.zeros(0, dtype=bool)
    return np.logical_and(*(np.logical_or.reduceat(flag[order], begins) for flag in (this, that)))


def _named(looks: Sequence[Look], pairs: Pairs, chosen: Column) -> list[dict[str, str]]:
    return [
        {"shard": looks[shard].shard, "key": looks[shard].rows["key"][row].as_py()}
        for shard, row in pairs.places(chosen)
    ]
