"""Format the report of `lit-align inspect` as text for a terminal."""

from typing import Any

from lit_align.common.captions import CLIP_TOKENS
from lit_align.common.sizes import format_bytes

LISTED = 10  # faults and examples of each kind; inspect.json has more
WIDTH = 100  # characters of a prompt


def to_text(found: dict[str, Any]) -> str:
    """Format the summary: tables of the contents, then the faults."""
    parts = [_counts(found)]
    if found["images"] is not None:
        parts += [_images(found), _prompts(found["prompts"]), _duplicates(found)]
    return "\n\n".join([*parts, _faults(found)]) + "\n"


def _counts(found: dict[str, Any]) -> str:
    decided = found["pairs"]
    rows = [
        ["shards", f"{found['shards']:,}", format_bytes(found["bytes"])],
        ["samples", f"{found['samples']:,}", f"{format_bytes(found['image_bytes'])} of images"],
        ["pairs with a preference", f"{decided:,}", _share(decided, found["samples"])],
        ["ties", f"{found['ties']:,}", _share(found["ties"], found["samples"])],
        ["broken samples", f"{found['broken']:,}", _share(found["broken"], found["samples"])],
        ["image 0 preferred", f"{round((found['image_0_preferred'] or 0) * decided):,}", ""],
    ]
    if decided:
        rows[-1][2] = f"{found['image_0_preferred']:.1%} of pairs with a preference"
    return _table("What there is", rows)


def _images(found: dict[str, Any]) -> str:
    images, pairs = found["images"], found["pairs"] + found["ties"]
    spread = ("least", "median", "greatest")
    rows = [["", *spread]]
    for name in ("width", "height", "short_side", "aspect_ratio"):
        form = ".3f" if name == "aspect_ratio" else ",.0f"
        rows.append([name.replace("_", " "), *(format(images[name][at], form) for at in spread)])
    sizes = [
        [f"{size['width']} x {size['height']}", f"{size['images']:,}", _share(size["images"], 2 * pairs)]
        for size in images["frequent_sizes"]
    ]
    left = images["different_sizes"] - len(sizes)
    more = [["other sizes", f"{left:,}", "kinds"]] * (left > 0)
    unequal = images["pairs_of_unequal_size"]
    more.append(["pairs of two sizes", f"{unequal:,}", _share(unequal, pairs)])
    return f"{_table('Images, pixels', rows)}\n\n{_table('Sizes, width x height', [*sizes, *more])}"


def _prompts(prompts: dict[str, Any]) -> str:
    rows = [["unique", f"{prompts['unique']:,}"], ["used more than once", f"{prompts['used_more_than_once']:,}"]]
    rows.append(["empty", f"{prompts['empty']:,}", "pairs"])
    rows.append([f"longer than {CLIP_TOKENS} tokens", f"{prompts['surely_cut']:,}", "pairs, at least, which CLIP cuts"])
    text = _table("Prompts", rows)
    for repeated in prompts["most_repeated"][:5]:
        text += f"\n  {repeated['pairs']:>8,} x {_cut(repeated['prompt']) or '(empty)'}"
    return text


def _duplicates(found: dict[str, Any]) -> str:
    duplicates = found["duplicates"]
    across, again = duplicates["across_pairs"], duplicates["repeated_pairs"]
    pairs = found["pairs"] + found["ties"]
    rows = [
        ["unique images", f"{duplicates['unique_images']:,}", f"of {2 * pairs:,}"],
        ["pairs of one image twice", f"{duplicates['within_a_pair']['pairs']:,}", ""],
        ["images in several pairs", f"{across['images']:,}", f"in {across['pairs']:,} pairs"],
        ["most pairs of one image", f"{across['most_pairs_of_one_image']:,}", ""],
        ["repeated pairs", f"{again['groups']:,}", f"{again['superfluous_pairs']:,} pairs superfluous"],
        ["  with exchanged images", f"{again['with_exchanged_images']:,}", ""],
        ["  with contradictory labels", f"{again['with_contradictory_labels']:,}", ""],
    ]
    text = _table("Duplicates, by their bytes", rows)
    examples = [("one image twice", [pair]) for pair in duplicates["within_a_pair"]["examples"]]
    examples += [(_kind(group), group["pairs"]) for group in again["examples"]]
    for kind, named in examples[:LISTED]:
        shown = " = ".join(f"{pair['shard']} {pair['key']}" for pair in named[:3])
        text += f"\n  {kind}: {shown}" + (" = ..." if len(named) > 3 else "")
    return text


def _kind(group: dict[str, Any]) -> str:
    more = ", exchanged" * group["with_exchanged_images"] + ", contradictory" * group["with_contradictory_labels"]
    return f"pair {group['times']} times{more}"


def _faults(found: dict[str, Any]) -> str:
    faults, index = found["faults"], found["index"]
    lines = ["Faults"]
    for kind, texts in (
        ("broken shards", [fault["reason"] for fault in faults["shards"]]),
        ("broken samples", [fault["reason"] for fault in faults["samples"]]),
        ("differences from the index", [f"{fault['shard']}: {fault['difference']}" for fault in faults["index"]]),
    ):
        if texts:
            lines.append(f"  {len(texts):,} {kind}:")
            lines += [f"    {text}" for text in texts[:LISTED]]
            lines += [f"    and {len(texts) - LISTED:,} more, in inspect.json"] * (len(texts) > LISTED)
    if len(lines) == 1:
        lines.append("  none: every shard is complete, every sample is a pair, every image can be decoded")
    without = found["shards"] - index["indexed_shards"]
    agree = index["indexed_shards"] - index["differing_shards"]
    if index["indexed_shards"]:
        lines.append(f"  {agree:,} of {index['indexed_shards']:,} indexed shards agree with their index")
    lines += [f"  {without:,} shards have no index"] * (without > 0)
    return "\n".join(lines)


def _table(title: str, rows: list[list[str]]) -> str:
    """Format a table: names left-aligned, numbers right-aligned, remarks after them."""
    first = max(len(row[0]) for row in rows)
    numbers = len(rows[0]) if rows[0][0] == "" else 2
    widths = [max(len(row[column]) for row in rows) for column in range(1, numbers)]
    lines = [title]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:numbers], widths, strict=True)]
        lines.append("  " + "  ".join([row[0].ljust(first), *cells, *row[numbers:]]).rstrip())
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
