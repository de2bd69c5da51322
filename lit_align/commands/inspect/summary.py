"""Summarise all shards: counts, sizes, repeated prompts and images, as plain values for inspect.json."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lit_align.commands.inspect.shard_report import ShardReport, digest

EXAMPLES = 20  # listed of each kind of duplicate
FREQUENT = 10  # listed sizes and prompts
Column = NDArray[Any]


class Pairs(NamedTuple):
    """Valid pairs of all shards, ties included, in the order of the shards."""

    columns: dict[str, Column]  # each (pairs,)
    shard: Column  # (pairs,) shard number
    row: Column  # (pairs,) row number in the shard

    def locations(self, chosen: Column) -> list[tuple[int, int]]:
        """Return shard and row numbers of the chosen pairs."""
        return list(zip(self.shard[chosen].tolist(), self.row[chosen].tolist(), strict=True))


def pairs_of(reports: Sequence[ShardReport]) -> Pairs:
    """Collect the valid rows of all shards into columns of numbers."""
    rows = pa.concat_tables([report.rows for report in reports])
    counts = [report.rows.num_rows for report in reports]
    valid = rows["fault"].is_null().to_numpy()
    shard = np.repeat(np.arange(len(reports), dtype=np.int32), counts)
    row = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    numbers = [name for name in rows.column_names if name not in ("key", "fault")]
    return Pairs({name: rows[name].to_numpy()[valid] for name in numbers}, shard[valid], row[valid])


def sample_pairs(pairs: Pairs, count: int) -> list[tuple[int, int]]:
    """Choose `count` random pairs, independently of the number of workers; return their shard and row numbers."""
    return pairs.locations(np.sort(np.argsort(pairs.columns["draw"], kind="stable")[:count]))


def summarise(
    reports: Sequence[ShardReport], pairs: Pairs, prompts_of: Callable[[list[tuple[int, int]]], list[str]]
) -> dict[str, Any]:
    """Summarise all reports as plain values.

    Args:
        reports: reports of all shards.
        pairs: valid pairs, see `pairs_of`.
        prompts_of: reads the prompts at some locations.
    """
    columns = pairs.columns
    label = columns["label_0"]
    ties = int((label == 0.5).sum())
    decided = len(label) - ties
    samples = sum(report.rows.num_rows for report in reports)
    return {
        "shards": len(reports),
        "broken_shards": sum(report.fault is not None for report in reports),
        "bytes": sum(report.bytes for report in reports),
        "image_bytes": int(columns["image_bytes"].sum()),
        "samples": samples,
        "pairs": decided,
        "ties": ties,
        "broken": samples - len(label),
        "image_0_preferred": int((label == 1).sum()) / decided if decided else None,
        "images": _sizes(columns),
        "prompts": _prompts(pairs, prompts_of),
        "duplicates": _duplicates(reports, pairs),
        "index": {
            "indexed_shards": sum(report.indexed for report in reports),
            "differing_shards": sum(bool(report.differences) for report in reports),
        },
        "faults": _faults(reports),
    }


def _faults(reports: Sequence[ShardReport]) -> dict[str, list[dict[str, str]]]:
    return {
        "shards": [{"shard": report.shard, "reason": report.fault} for report in reports if report.fault],
        "samples": [fault for report in reports for fault in _broken_samples(report)],
        "index": [{"shard": report.shard, "difference": text} for report in reports for text in report.differences],
    }


def _broken_samples(report: ShardReport) -> list[dict[str, str]]:
    broken = report.rows.filter(report.rows["fault"].is_valid())
    keys, reasons = broken["key"].to_pylist(), broken["fault"].to_pylist()
    return [{"shard": report.shard, "key": key, "reason": reason} for key, reason in zip(keys, reasons, strict=True)]


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
    texts = prompts_of(pairs.locations(first[frequent]))
    repeated = [{"prompt": text, "pairs": n} for text, n in zip(texts, counts[frequent].tolist(), strict=True)]
    return {
        "unique": len(counts),
        "empty": int((digests == np.uint64(digest(b""))).sum()),
        "surely_cut": int(pairs.columns["cut"].sum()),
        "used_more_than_once": int((counts > 1).sum()),
        "most_repeated": repeated,
    }


def _duplicates(reports: Sequence[ShardReport], pairs: Pairs) -> dict[str, Any]:
    first, second = pairs.columns["image_0"], pairs.columns["image_1"]
    twice = np.flatnonzero(first == second)  # pairs of one image
    # An image that fills both sides of a pair counts once, so that `shared` only has images of several pairs.
    images, counts = np.unique(np.concatenate([first, np.delete(second, twice)]), return_counts=True)
    shared = images[counts > 1]
    return {
        "unique_images": len(images),
        "within_a_pair": {"pairs": len(twice), "examples": _named(reports, pairs, twice[:EXAMPLES])},
        "across_pairs": {
            "images": len(shared),
            "pairs": int((np.isin(first, shared) | np.isin(second, shared)).sum()),
            "most_pairs_of_one_image": int(counts.max(initial=0)),
        },
        "repeated_pairs": _repeated_pairs(reports, pairs),
    }


def _repeated_pairs(reports: Sequence[ShardReport], pairs: Pairs) -> dict[str, Any]:
    """Find pairs with equal prompts and equal images, in either order."""
    order, begins = _group_equal(pairs)
    sizes = np.diff(np.append(begins, len(order)))
    groups = sizes > 1
    flags = {name: flag & groups for name, flag in _group_flags(pairs, order, begins).items()}
    examples = []
    for group in np.flatnonzero(groups)[np.argsort(order[begins[groups]], kind="stable")][:EXAMPLES]:
        members = order[begins[group] : begins[group] + sizes[group]][:EXAMPLES]
        about = {name: bool(flag[group]) for name, flag in flags.items()}
        examples.append({"times": int(sizes[group]), **about, "pairs": _named(reports, pairs, members)})
    return {
        "groups": int(groups.sum()),
        "superfluous_pairs": int((sizes[groups] - 1).sum()),
        **{name: int(flag.sum()) for name, flag in flags.items()},
        "examples": examples,
    }


def _group_equal(pairs: Pairs) -> tuple[Column, Column]:
    """Sort pairs so that equal ones are neighbours: (pairs,) their order, and (groups,) where each group begins."""
    first, second, prompt = (pairs.columns[name] for name in ("image_0", "image_1", "prompt"))
    low, high = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((prompt, high, low))  # stable: the order of the shards within a group
    new = np.zeros(len(order), dtype=bool)
    new[:1] = True
    for column in (low, high, prompt):
        new[1:] |= column[order][1:] != column[order][:-1]
    return order, np.flatnonzero(new)


def _group_flags(pairs: Pairs, order: Column, begins: Column) -> dict[str, Column]:
    """Whether each group (groups,) has its images in both orders, and whether its labels contradict each other."""
    first, second, label = (pairs.columns[name] for name in ("image_0", "image_1", "label_0"))
    exchanged = first > second
    winner = np.where(exchanged, 1 - label, label)  # 1: the image with the smaller digest, 0: the other one
    winner = np.where(first == second, 0.5, winner)
    return {
        "with_exchanged_images": _both(exchanged, ~exchanged, order, begins),
        "with_contradictory_labels": _both(winner == 1, winner == 0, order, begins),
    }


def _both(this: Column, that: Column, order: Column, begins: Column) -> Column:
    """Whether each group (groups,) has a pair for which `this` is true and one for which `that` is true."""
    if not len(begins):
        return np.zeros(0, dtype=bool)
    return np.logical_and(*(np.logical_or.reduceat(flag[order], begins) for flag in (this, that)))


def _named(reports: Sequence[ShardReport], pairs: Pairs, chosen: Column) -> list[dict[str, str]]:
    return [
        {"shard": reports[shard].shard, "key": reports[shard].rows["key"][row].as_py()}
        for shard, row in pairs.locations(chosen)
    ]
