"""`lit-align inspect`: report what shards contain, what is wrong with them, and what their pairs look like."""

from pathlib import Path


def inspect(
    shards: str | list[str],
    output: Path = Path("inspect"),
    sheet_pairs: int = 24,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Read all shards, decode every image, print a report, and write inspect.json and inspect.png.

    Ends with status 1 if samples or shards are broken, or if a shard differs from its index.

    Args:
        shards: tar files, folders of them, or the index.json of an import; braces `{000..127}` and wildcards `*`, in
            quotes, are expanded.
        output: folder for inspect.json and the contact sheet inspect.png.
        sheet_pairs: number of random pairs on the contact sheet; 0 for no sheet.
        seed: seed for the choice of these pairs.
        workers: threads, each of which reads one shard at a time; none for one per core, up to 16.

    Raises:
        FileNotFoundError: if there is no such shard.
        ValueError: if a number is out of range, or an index.json was not written by lit-align.
    """
    from lit_align.commands.inspect.inspection import inspect_shards  # here, so that --help imports no torch

    inspect_shards(shards, output, sheet_pairs, seed, workers)
