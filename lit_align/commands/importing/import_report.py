"""What an import prints at its end."""

from typing import TYPE_CHECKING

# Imports stand in the function, so that --help imports no torch.

if TYPE_CHECKING:
    from lit_align.data.importers.import_run import Summary


def print_summary(summary: "Summary") -> None:
    """Print counts of pairs, ties, rows left out by reason and long captions, and the option that trains on them."""
    from lit_align.common.captions import CLIP_TOKENS
    from lit_align.common.paths import as_argument
    from lit_align.data.importers.long_captions import count_long_captions
    from lit_align.data.importers.rejects import REJECTS
    from lit_align.data.importers.shard_records import MAY_RETURN
    from lit_align.data.shards.index import INDEX

    rows = summary.pairs + summary.ties + sum(summary.rejects.values())
    print(f"{summary.folder}: {summary.shards} shards ({summary.done_before} done before) of {rows:,} rows")
    print(f"{summary.pairs:>12,} pairs")
    print(f"{summary.ties:>12,} ties, which do not train")
    print(f"{sum(summary.rejects.values()):>12,} left out" + f", listed in {REJECTS}" * bool(summary.rejects))
    reasons = list(summary.rejects.items())
    for reason, count in reasons[:10]:
        print(f"{count:>16,} {reason}")
    if reasons[10:]:
        print(f"{sum(count for _, count in reasons[10:]):>16,} for {len(reasons) - 10} more reasons")
    if long := count_long_captions(str(summary.folder / INDEX)):
        print(
            f"{long:>12,} captions, at least, are longer than the {CLIP_TOKENS} tokens that CLIP reads; the rest is cut"
        )
    if any(reason in summary.rejects for reason in MAY_RETURN):
        print(f"If what is missing comes back, delete {summary.folder} and import again.")
    print(f"To train on it: --data.train_shards {as_argument(summary.folder / INDEX)}")
