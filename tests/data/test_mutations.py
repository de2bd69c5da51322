"""Damaged shards end in a clear error or a counted skip, never in a hang or a wrong label.

`make test_mutations` tries 2,000 mutations.
"""

import io
import os
import random
import shutil
import signal
import tarfile
from collections import Counter

import pytest
import torch

from lit_align.data import PreferenceDataModule, SampleError
from lit_align.data.shards.index import index_shard
from tests.support.paths import PAIRS

SHARD = PAIRS / "train/00003.tar"
PAIR_COUNT = 26
MUTATIONS = int(os.environ.get("LIT_ALIGN_MUTATIONS", "120"))
PARTS = 4
LIMIT = 30  # seconds, after which a mutation counts as a hang


def members(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def pack(listed):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in listed:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def flip(data, draw):
    """Flip a few bits anywhere."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 30])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_a_field(data, draw):
    """Flip a bit of a header, label or caption; most bytes belong to images."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = draw.choice([m for m in tar if ".jpg_" not in m.name])
    changed = bytearray(data)
    changed[draw.randrange(member.offset, member.offset_data + member.size)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def cut_between_samples(data, draw):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: draw.choice([m.offset for m in tar])]


def rename(data, draw):
    """Give a member another key, another field, or the name of another member."""
    listed = members(data)
    at, other = draw.sample(range(len(listed)), 2)
    key, field = listed[at][0].split(".", 1)
    other_key, other_field = listed[other][0].split(".", 1)
    names = [f"{other_key}.{field}", f"{key}.{other_field}", listed[other][0], f"{key}.what", key, f"../{key}.{field}"]
    listed[at] = draw.choice(names), listed[at][1]
    return pack(listed)


def double(data, draw):
    """Repeat a member, adjacent or elsewhere."""
    listed = members(data)
    at = draw.randrange(len(listed))
    listed.insert(draw.choice([at, draw.randrange(len(listed))]), listed[at])
    return pack(listed)


def empty(data, draw):
    listed = members(data)
    at = draw.randrange(len(listed))
    listed[at] = listed[at][0], b""
    return pack(listed)


def zero_a_header(data, draw):
    """Overwrite a header with zeros, which look like the end of the file."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        begin = draw.choice([m.offset for m in tar])
    return data[:begin] + bytes(draw.choice([512, 1024])) + data[begin + 512 :]


KINDS = [flip, flip_a_field, cut, cut_between_samples, rename, double, empty, zero_a_header]


def read(shard, on_error, late=None):
    """Return the batches that train and the number of skipped samples.

    `late` replaces the shard's content after its labels have been read.
    """
    data = PreferenceDataModule(
        str(shard), resolution=32, batch_size=1, num_workers=0, flip_probability=0.0, on_error=on_error, seed=0
    )
    data.setup("fit")
    if late is not None:
        shard.write_bytes(late)
    batches = [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    broken = len(data.train.shards[0].broken)
    return [batch for batch in batches if batch.pairs.weight.item() == 1], broken + len(data.unreadable)


def same(first, second):
    return torch.equal(first.chosen, second.chosen) and torch.equal(first.rejected, second.rejected)


@pytest.fixture(scope="module")
def originals():
    batches, skipped = read(SHARD, "raise")
    assert len(batches) == PAIR_COUNT
    assert skipped == 0
    return batches


@pytest.mark.parametrize("when", ["before", "before, indexed", "while training"])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_mutations_end_in_an_error_or_a_counted_skip(tmp_path, originals, when, part):
    by_chosen = {batch.chosen.numpy().tobytes(): batch for batch in originals}
    by_rejected = {batch.rejected.numpy().tobytes(): batch for batch in originals}
    shard, whole = tmp_path / "shard.tar", SHARD.read_bytes()
    shutil.copy(SHARD, shard)
    if when == "before, indexed":
        index_shard(str(shard))
    outcomes = Counter()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a mutation hangs"))
    for number in range(part, MUTATIONS, PARTS):
        kind = KINDS[number // PARTS % len(KINDS)]
        mutated = kind(whole, random.Random(f"mutation {number}"))
        late = mutated if when == "while training" else None
        shard.write_bytes(mutated if late is None else whole)
        signal.alarm(LIMIT)
        try:
            trained, skipped = read(shard, "skip", late)
        except ValueError as refusal:  # no pair is left
            trained, skipped, error = [], PAIR_COUNT, refusal
            assert "no pair with a preference" in str(error)
        shard.write_bytes(mutated if late is None else whole)
        try:
            all_of_it, error = read(shard, "raise", late)[0], None
        except SampleError as refusal:
            all_of_it, error = [], refusal
        assert len(all_of_it) == PAIR_COUNT or str(shard) in str(error)
        assert error is None or skipped > 0, f"{kind.__name__} {number}: {error}, but nothing was skipped"
        outcomes["found" if error else "harmless"] += 1
        signal.alarm(0)
        assert len(trained) == PAIR_COUNT or skipped > 0, f"{kind.__name__} {number} lost a pair silently"
        for batch in trained:
            chosen, rejected = batch.chosen.numpy().tobytes(), batch.rejected.numpy().tobytes()
            assert chosen not in by_rejected, f"{kind.__name__} {number} inverted a label"
            assert rejected not in by_chosen, f"{kind.__name__} {number} inverted a label"
            original = by_chosen.get(chosen) or by_rejected.get(rejected)
            assert original is not None, f"{kind.__name__} {number} made up a pair"
            if when == "before, indexed":  # without an index, damage that can still be decoded goes unnoticed
                assert same(batch, original)
                assert batch.prompts == original.prompts
    assert outcomes["found"] > outcomes["harmless"]
