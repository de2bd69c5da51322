"""Plan of an encoding: all samples of all shards, and each prompt once."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lit_align.common.progress import BRIEF, track
from lit_align.data.buckets import Shape, assign_buckets, bucket_shapes
from lit_align.data.cache.format import names_of
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.index import SIZES, read_rows
from lit_align.data.shards.kept_scans import labels_of
from lit_align.data.shards.layout import SampleError
from lit_align.data.shards.listing import ShardFile, find_shards


class PlannedSample(NamedTuple):
    """Prompt and shape of a sample, known before its images are read."""

    prompt: int  # id; -1 for a broken sample
    shape: Shape  # of the prepared images


class PlannedShard(NamedTuple):
    """A shard to encode."""

    path: str
    name: str  # in the cache
    samples: list[PlannedSample]

    @property
    def pairs(self) -> int:
        return sum(sample.prompt >= 0 for sample in self.samples)


@dataclass(frozen=True)
class Plan:
    """Shards and prompts to encode, identical on all processes."""

    shards: list[PlannedShard]
    prompts: list[str]  # by id; the empty prompt has id 0

    def describe(self) -> dict[str, Any]:
        """Return counts and a digest for the cache's fingerprint."""
        digest = hashlib.blake2b(json.dumps(self.prompts).encode(), digest_size=12).hexdigest()
        return {
            "prompts": {"count": len(self.prompts), "digest": digest},
            "shards": [
                {"name": shard.name, "samples": len(shard.samples), "pairs": shard.pairs} for shard in self.shards
            ],
        }


def make_plan(
    patterns: str | Sequence[str],
    resolution: int,
    aspect_buckets: bool,
    options: ReadOptions,
    quiet: bool = False,
) -> Plan:
    """Read the labels of all shards from their index, or else from the shards, skipping images.

    Raises:
        SampleError: on a broken sample, if `options.on_error` is `raise`.
    """
    files = find_shards(patterns, options)
    names = names_of([file.path for file in files])
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda file: _rows(file, aspect_buckets, options.timeout), files)
        tables = track(read, len(files), "reading labels", "shard", delay=BRIEF, hidden=quiet)
        ids: dict[str, int] = {"": 0}
        shards = [
            PlannedShard(file.path, name, _samples(rows, target_shapes(rows, resolution, aspect_buckets), ids, options))
            for file, name, rows in zip(files, names, tables, strict=True)
        ]
    return Plan(shards, list(ids))


def _rows(file: ShardFile, sizes: bool, timeout: float | None) -> pa.Table:
    return read_rows(file.rows) if file.rows is not None else labels_of(file.path, sizes, timeout)


def target_shapes(rows: pa.Table, resolution: int, aspect_buckets: bool) -> list[Shape]:
    """Return the shape in which each sample trains; arbitrary for a broken sample."""
    if not aspect_buckets:
        return [(resolution, resolution)] * len(rows)
    sizes = np.stack([rows[name].to_numpy() for name in SIZES], 1)
    shapes = bucket_shapes(resolution)
    return [shapes[bucket] for bucket in assign_buckets(np.maximum(sizes, 1), shapes)]


def _samples(rows: pa.Table, shapes: Sequence[Shape], ids: dict[str, int], options: ReadOptions) -> list[PlannedSample]:
    """Return a shard's samples; a new prompt gets the next id."""
    samples = []
    for fault, prompt, shape in zip(rows["fault"].to_pylist(), rows["prompt"].to_pylist(), shapes, strict=True):
        if fault is None:
            samples.append(PlannedSample(ids.setdefault(prompt, len(ids)), shape))
            continue
        options.skip_or_raise(SampleError(fault))
        samples.append(PlannedSample(-1, shape))
    return samples
