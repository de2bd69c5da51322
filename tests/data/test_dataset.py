"""What a pair is checked against when it is read."""

import pytest

from lit_align.data import PreferenceDataModule, SampleError
from lit_align.data.shards.index import index_shard
from tests.support.paths import PAIRS
from tests.support.shards import read_dicts, write_dicts


@pytest.mark.parametrize("indexed", [False, True])
def test_labels_exchanged_after_the_set_up_are_found(tmp_path, indexed):
    """Both labels stay consistent, and neither the place nor the images of the sample change."""
    samples = read_dicts(PAIRS / "train/00000.tar")
    shard = write_dicts(tmp_path / "a.tar", samples)
    if indexed:
        index_shard(shard)
    data = PreferenceDataModule(shard, resolution=32, batch_size=2, num_workers=0)
    data.setup("fit")
    one = samples[5]
    one["label_0.txt"], one["label_1.txt"] = one["label_1.txt"], one["label_0.txt"]
    write_dicts(shard, samples)
    with pytest.raises(SampleError, match=rf"key {one['__key__']}: the shard has changed: .*another label"):
        list(data.train_dataloader())
