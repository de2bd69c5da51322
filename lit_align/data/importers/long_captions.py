"""Count captions of imported shards that CLIP's text encoders surely cut."""

from concurrent.futures import ThreadPoolExecutor

from lit_align.common.captions import is_surely_cut
from lit_align.data.shards.index import read_index, read_rows


def count_long_captions(index: str) -> int:
    """Count the captions of an `index.json` that are longer than CLIP reads, at least; others may be longer too."""
    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(_count, [rows for _, rows in read_index(index)]))


def _count(rows: str) -> int:
    return sum(map(is_surely_cut, read_rows(rows, ["prompt"])["prompt"].to_pylist()))
