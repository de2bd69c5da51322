"""Decoding one batch ahead of the consumer."""

import threading

import pytest

from lit_align.common.decode_ahead import decode_ahead
from lit_align.common.sizes import format_bytes


@pytest.mark.parametrize(("count", "batches"), [(0, []), (4, [2, 2]), (5, [2, 2, 1])])
def test_results_come_in_order(count, batches):
    found = list(decode_ahead(lambda number: -number, range(count), 2))
    assert [len(batch) for batch in found] == batches
    assert [number for batch in found for number in batch] == [-number for number in range(count)]


def test_one_batch_ahead_and_no_further():
    taken, decoded = [], threading.Event()

    def items():
        for number in range(9):
            taken.append(number)
            yield number

    def decode(number):
        if number == 5:
            decoded.set()
        return number

    batches = decode_ahead(decode, items(), 3)
    assert next(batches) == [0, 1, 2]
    assert decoded.wait(60)  # while the first batch is computed with
    assert taken == list(range(6))


def test_an_error_reaches_the_consumer():
    batches = decode_ahead(lambda number: 1 // number, [2, 1, 0, 5], 2)
    assert next(batches) == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (20_940_000, "20.9 MB"), (1.5e9, "1.50 GB"), (2e12, "2.00 TB")],
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text
