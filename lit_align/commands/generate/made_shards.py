"""Shards of generated pairs: each process makes its share, and the last one writes the index."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_align.commands.generate.pair_maker import Item, PairMaker
from lit_align.commands.shared.process_group import ALONE, ProcessGroup
from lit_align.common.paths import as_argument
from lit_align.common.progress import Progress, show_progress
from lit_align.data.shards.index import INDEX, index_shard, read_entry, write_index
from lit_align.data.shards.writer import NewPair, write_shard


def write_shards(
    folder: Path, parts: Sequence[Sequence[Item]], maker: PairMaker, batch_size: int, group: ProcessGroup
) -> None:
    """Write the missing shards of this process's share, and the index once all shards exist."""
    shards = [folder / f"{number:05d}.tar" for number in range(len(parts))]
    mine = range(group.rank, len(parts), group.world_size)
    todo = [number for number in mine if not _is_done(shards[number])]
    total = sum(len(parts[number]) for number in todo)
    with show_progress(total, "drawing", "pair", hidden=group.rank > 0) as bar:  # of the first process's share
        for number in todo:
            _write_shard(shards[number], parts[number], maker, batch_size, bar)
    entries = [read_entry(str(shard)) for shard in shards]
    ties = sum(entry.ties for number in mine if (entry := entries[number]) is not None)
    print(f"{group}: drew {len(todo)} shards, {len(mine) - len(todo)} were done before; {ties} pairs are ties")
    missing = entries.count(None)
    if missing:
        print(f"{group}: {missing} shards of other processes are still to come; the last one writes {INDEX}. {ALONE}")
    else:
        # Processes that end together each write the index, with equal contents.
        known = [entry for entry in entries if entry is not None]
        index = write_index(str(folder), known, {"made_by": "lit-align generate"})
        print(f"{folder}: {index['totals']['samples']} pairs in {len(shards)} shards")
        print(f"To train on it: --data.train_shards {as_argument(folder / INDEX)}")


def _is_done(shard: Path) -> bool:
    entry = read_entry(str(shard))
    return entry is not None and shard.is_file() and shard.stat().st_size == entry.bytes


def _write_shard(shard: Path, items: Sequence[Item], maker: PairMaker, batch_size: int, bar: Progress) -> None:
    """Write a shard, then its rows. A shard without rows is complete: the process was killed between the two."""
    for left_over in shard.parent.glob(f".{shard.stem}.*.part"):  # by a killed run
        left_over.unlink()
    if shard.is_file() and read_entry(str(shard)) is None:
        bar.update(len(items))
    else:
        write_shard(shard, _counted(maker.make(items, batch_size), bar))
    index_shard(str(shard))


def _counted(pairs: Iterator[NewPair], bar: Progress) -> Iterator[NewPair]:
    for pair in pairs:
        yield pair
        bar.update()
