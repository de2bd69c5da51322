"""Shards that are not in the layout: what is wrong is said in one line, and no image is read for it."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from lit_align.data.labels.stored import HumanLabels
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.layout import SampleError, read_samples
from lit_align.data.shards.listing import ShardFile
from lit_align.data.shards.scan import scan_shards
from tests.support.paths import PAIRS
from tests.support.shards import read_dicts, write_dicts


def look(shard):
    return scan_shards([ShardFile(str(shard), None)], HumanLabels(), ReadOptions())


@pytest.fixture
def samples():
    """The first three bundled pairs."""
    return read_dicts(PAIRS / "train/00000.tar")[:3]


def test_a_dot_in_a_key_is_said_in_one_line(samples, tmp_path):
    """The names run together into one sample, whose images are not read for its labels."""
    shard = write_dicts(tmp_path / "a.tar", [{**one, "__key__": f"sd1.5_{i:04d}"} for i, one in enumerate(samples)])
    (one,) = read_samples(shard, image_bytes=0)
    assert sum(len(data) for name, data in one.fields.items() if "jpg" in name) == 0
    with pytest.raises(SampleError, match=r"a\.tar: sd1\.5_0000\.\S+ has a dot in its key") as refused:
        look(shard)
    assert len(str(refused.value)) < 400 + len(shard)


def test_members_that_do_not_stand_together_are_said_in_one_line(samples, tmp_path):
    shard = str(tmp_path / "a.tar")
    rows = [(f"{i}.{name}", data) for i, one in enumerate(samples) for name, data in one.items() if name != "__key__"]
    with tarfile.open(shard, "w") as tar:
        for name, data in sorted(rows, key=lambda row: row[0].split(".", 1)[1]):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(SampleError, match=r"a\.tar, key 0: its members do not stand together\. .*--sort=name"):
        look(shard)


def test_a_compressed_shard_is_named_so(samples, tmp_path):
    shard = write_dicts(tmp_path / "a.tar", samples)
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(Path(shard).read_bytes()))
    with pytest.raises(SampleError, match=r"a\.tar\.gz is compressed, .*Unpack it"):
        look(str(packed))


def test_a_long_list_of_members_is_cut(samples, tmp_path):
    one = samples[0] | {"label_0.txt": None} | {f"more{i}.txt": b"x" for i in range(30)}
    with pytest.raises(SampleError, match=r"label_0\.txt is missing; .* and \d+ more\.$"):
        look(write_dicts(tmp_path / "a.tar", [one]))
