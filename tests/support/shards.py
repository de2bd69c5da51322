"""Read and write shards as dictionaries."""

import webdataset as wds

from lit_align.data.shards.layout import read_samples


def read_dicts(shard) -> list[dict]:
    """Read the samples of a shard as dictionaries that webdataset can write."""
    return [{"__key__": sample.key, **sample.fields} for sample in read_samples(str(shard))]


def write_dicts(shard, samples: list[dict]) -> str:
    """Write a shard; fields that are None are left out."""
    with wds.TarWriter(str(shard)) as writer:
        for sample in samples:
            writer.write({name: value for name, value in sample.items() if value is not None})
    return str(shard)
