"""An epoch's batches, made from any of them on, are those of the whole epoch."""

import random
import tracemalloc
from itertools import islice

import numpy as np
import pytest

from lit_align.data import epoch as epochs
from lit_align.data.epoch import Epoch
from lit_align.data.order import Order


def all_at_once(lengths, buckets, count, batch_size, window, seed, number):
    """The rule of the order in its plainest form: lists of all pairs."""
    shards, firsts = list(range(len(lengths))), np.cumsum([0, *lengths]).tolist()
    if window:
        random.Random(f"{seed}/{number}").shuffle(shards)
    pairs = [pair for shard in shards for pair in range(firsts[shard], firsts[shard + 1])]
    for start in range(0, len(pairs) if window else 0, window or 1):
        part = pairs[start : start + window]
        random.Random(f"{seed}/{number}/{start}").shuffle(part)
        pairs[start : start + window] = part
    cut, waiting = [], [[] for _ in range(count)]
    for pair in pairs:
        waiting[buckets[pair]].append(pair)
        if len(waiting[buckets[pair]]) == batch_size:
            cut.append((waiting[buckets[pair]], int(buckets[pair])))
            waiting[buckets[pair]] = []
    return cut + ([] if window else [(rest, bucket) for bucket, rest in enumerate(waiting) if rest])


@pytest.mark.parametrize("window", [0, 1, 4, 30, 1000])
@pytest.mark.parametrize("block", [1, 7, 64, 4096])
@pytest.mark.parametrize("count", [1, 5])
def test_an_epoch_begins_at_any_batch(window, block, count, monkeypatch):
    monkeypatch.setattr(epochs, "BLOCK", block)
    draw = np.random.default_rng([window, block, count])
    for batch_size in (1, 3, 8, 50):
        lengths = draw.choice([0, 1, 9, 40], 12).tolist()
        buckets = draw.choice(count, sum(lengths), p=np.arange(1, count + 1) / sum(range(count + 1))).astype(np.uint8)
        firsts = np.cumsum([0, *lengths])
        whole = all_at_once(lengths, buckets, count, batch_size, window, 3, 2)
        for begin in range(0, len(whole) + 3):
            found = list(Epoch(firsts, buckets, count, batch_size, window, 3, 2).batches(begin))
            assert found == whole[begin:]
            assert all(type(number) is int for numbers, _ in found for number in numbers)


def test_ranks_read_their_slices_from_any_batch_on():
    shards = (range(5), range(40), range(16))
    for world_size in (1, 2, 3):
        for window in (0, 7):
            orders = [Order(shards, 2, ((64, 64),), rank, world_size, 3, window) for rank in range(world_size)]
            for order in orders:
                assert [list(order.rest(1, n)) for n in range(40)] == [order.epoch(1)[n:] for n in range(40)]


def test_ten_million_pairs_are_not_held():
    """A start in the middle holds a number for each shard and for each block, and none for a pair."""
    order = Order(tuple(range(1000) for _ in range(10_000)), 8, ((64, 64),), seed=1, shuffle_window=1000)
    tracemalloc.start()
    first = list(islice(order.rest(0, order.batches // 2), 500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({number for batch in first for number in batch.numbers}) == 4000
    assert peak < 12e6  # bytes: a list of all pairs would take 400 MB
