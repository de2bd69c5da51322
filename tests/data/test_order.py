"""Buckets by aspect ratio, and the order of batches in them."""

import io
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lit_align.data import PreferenceDataModule, SampleError
from lit_align.data.buckets import SDXL_BUCKETS, assign_buckets, bucket_shapes
from lit_align.data.order import RULE, Order
from lit_align.data.shards.index import index_shard
from tests.support.shards import write_dicts


def test_published_buckets():
    assert len(SDXL_BUCKETS) == 40
    assert bucket_shapes(1024) == SDXL_BUCKETS
    assert {height * width for height, width in SDXL_BUCKETS} <= set(range(900_000, 1_060_000))
    assert all(side % 64 == 0 for shape in SDXL_BUCKETS for side in shape)
    assert (1344, 704) not in SDXL_BUCKETS
    assert (704, 1344) in SDXL_BUCKETS


@pytest.mark.parametrize("resolution", [32, 512, 768, 1536])
def test_buckets_scale_with_the_resolution(resolution):
    shapes = bucket_shapes(resolution)
    assert (resolution, resolution) in shapes
    assert all(side % 8 == 0 for shape in shapes for side in shape)
    assert all(0.7 < height * width / resolution**2 < 1.3 for height, width in shapes if resolution > 32)


def test_a_pair_takes_the_bucket_nearest_to_both_images():
    shapes = [(1024, 1024), (512, 2048), (2048, 512), (896, 1152)]
    sizes = [[100, 100, 50, 50], [10, 40, 20, 80], [400, 100, 400, 100], [90, 116, 90, 116], [10, 40, 40, 10]]
    assert assign_buckets(np.array(sizes, np.int32), shapes).tolist() == [0, 1, 2, 3, 0]
    sizes = np.array([[random.Random(n).randrange(20, 90) for _ in range(4)] for n in range(200)], np.int32)
    wanted = np.log(sizes[:, 0::2] / sizes[:, 1::2]).mean(1)
    distances = np.abs(wanted[:, None] - np.log([h / w for h, w in SDXL_BUCKETS])[None])
    assert (distances[np.arange(200), assign_buckets(sizes, SDXL_BUCKETS)] == distances.min(1)).all()


def picture(width, height, shade):
    """Red grows with the column and green with the row, so that distortion shows; blue is the shade."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)[None] * 2
    image[..., 1] = np.arange(height)[:, None] * 2
    image[..., 2] = shade
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


SIZES = [(64, 64), (100, 50), (50, 100), (40, 80), (64, 60)]


@pytest.fixture
def shards(tmp_path):
    """53 pairs of five sizes; image 1 has half the size of image 0."""
    paths, number = [], 0
    for shard, count in enumerate((20, 7, 26)):
        samples = []
        for _ in range(count):
            width, height = SIZES[(number + number // 5) % 5]
            sample = {"__key__": f"{number:03d}", "caption.txt": f"{number}", "label_0.txt": "1", "label_1.txt": "0"}
            sample |= {"jpg_0.png": picture(width, height, number), "jpg_1.png": picture(width // 2, height // 2, 255)}
            samples.append(sample)
            number += 1
        paths.append(write_dicts(tmp_path / f"{shard}.tar", samples))
    return paths


def make(shards, **options):
    settings = {"resolution": 64, "aspect_buckets": True, "batch_size": 4, "num_workers": 0, "shuffle_window": 8}
    data = PreferenceDataModule(shards, shards, **{**settings, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize("indexed", [False, True])
def test_a_batch_has_one_shape_and_no_picture_is_stretched(shards, indexed):
    for shard in shards if indexed else []:
        index_shard(shard)
    data = make(shards, flip_probability=0.0)
    batches = list(data.train_dataloader())
    shapes = Counter(tuple(batch.chosen.shape[-2:]) for batch in batches)
    assert shapes.keys() == {(64, 64), (48, 96), (96, 48)}
    for batch in batches:
        assert len(batch.prompts) == 4
        assert batch.chosen.shape == batch.rejected.shape
        assert batch.time_ids[:, 0, 4:].tolist() == [list(batch.chosen.shape[-2:])] * 4
        for images, geometry in ((batch.chosen, batch.time_ids[:, 0]), (batch.rejected, batch.time_ids[:, 1])):
            for image, (height, width, *_) in zip(images.float(), geometry.tolist(), strict=True):
                scale = max(image.shape[1] / height, image.shape[2] / width)
                across, down = image[0].mean(0), image[1].mean(1)
                steps = ((across[-5] - across[4]) / (len(across) - 9), (down[-5] - down[4]) / (len(down) - 9))
                assert steps == pytest.approx((2 / scale, 2 / scale), rel=0.1)
    numbers = [n for batch in batches for n in batch.pairs.numbers]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_pair_is_repeated_and_the_leftover_is_as_stated(shards, world_size):
    data = make(shards)
    order = data.train_dataloader().order
    by_bucket = np.bincount(order.buckets)
    whole = int((by_bucket // 4).sum()) // world_size * world_size
    seen = []
    for rank in range(world_size):
        settings = {name: getattr(order, name) for name in ("shards", "batch_size", "shapes", "seed", "shuffle_window")}
        mine = type(order)(**settings, rank=rank, world_size=world_size)
        assert len(mine.epoch(0)) == mine.batches == whole // world_size
        assert mine.epoch(1) != mine.epoch(0) == mine.epoch(0)
        seen += [number for batch in mine.epoch(0) for number in batch.numbers]
    assert len(seen) == len(set(seen)) == whole * 4
    held_out = data.val_dataloader()
    assert sorted(n for batch in held_out for n in batch.pairs.numbers) == list(range(53))
    assert len(held_out) == sum(-(-count // 4) for count in by_bucket)


@pytest.mark.parametrize("workers", [0, 2])
def test_buckets_start_at_any_batch(shards, workers):
    whole = list(make(shards).train_dataloader())
    data = make(shards, num_workers=workers)
    for skip in (1, 5, len(whole) - 1):
        data._position = lambda skip=skip: (0, skip)
        rest = list(data.train_dataloader())
        assert [batch.pairs.numbers for batch in rest] == [batch.pairs.numbers for batch in whole[skip:]]
        assert all(torch.equal(a.chosen, b.chosen) for a, b in zip(rest, whole[skip:], strict=True))


def numbers(shards, rank, world_size, shuffle_window, epoch=0):
    """Draw the pairs of a rank's batches of two; only the lengths of the shards count."""
    order = Order(shards, 2, ((64, 64),), rank, world_size, 3, shuffle_window)
    assert order.batches == len(order.epoch(epoch))
    return [batch.numbers for batch in order.epoch(epoch)]


def test_the_order_only_changes_with_its_rule():
    """Windows of four over three shards; these numbers were drawn when the rule was made."""
    assert RULE == 2
    shards = (range(5), range(4), range(6))
    assert numbers(shards, 0, 2, 4) == [[3, 1], [0, 2], [6, 7]]
    assert numbers(shards, 1, 2, 4) == [[4, 5], [10, 8], [9, 11]]
    assert numbers(shards, 0, 2, 4, epoch=1) == [[1, 3], [0, 2], [6, 5]]
    assert numbers(shards, 1, 2, 4, epoch=1) == [[4, 7], [9, 11], [8, 10]]
    held_out = [numbers((range(5), range(4)), rank, 3, 0) for rank in range(3)]
    assert held_out == [[[0, 1]], [[2, 3], [4, 5]], [[6, 7], [8]]]
    order = Order((range(5), range(4)), 2, ((64, 64),))
    assert [order.where(number)[1] for number in (0, 4, 5, 8)] == [0, 4, 0, 3]
    assert [len(order.where(number)[0]) for number in (0, 4, 5, 8)] == [5, 5, 4, 4]


def test_the_fingerprint_names_all_that_decides_the_order(shards):
    order = make(shards).train_dataloader().order
    pairs = order.shards[0].pairs
    turned = [
        replace(order.shards[0], pairs=pairs._replace(**{name: -getattr(pairs, name)})) for name in ("sign", "human")
    ]
    changes = [{"seed": 1}, {"batch_size": 3}, {"world_size": 2}, {"shuffle_window": 9}, {"labels": "a vote"}]
    changes += [{"shapes": order.shapes[:1]}, {"shards": order.shards[1:]}]
    changes += [{"shards": (shard, *order.shards[1:])} for shard in turned]
    for change in changes:
        before, after = order.fingerprint(), replace(order, **change).fingerprint()
        assert [name for name in before if before[name] != after[name]] == list(change), change


def test_an_image_without_a_size_has_no_bucket(tmp_path):
    sample = {"__key__": "a", "caption.txt": "x", "label_0.txt": "1", "label_1.txt": "0", "jpg_0.png": b"no image"}
    samples = [sample | {"jpg_1.png": picture(8, 8, 0)}, sample | {"__key__": "b", "jpg_0.png": picture(8, 8, 0)}]
    samples[1] |= {"jpg_1.png": picture(8, 8, 0)}
    shard = write_dicts(tmp_path / "a.tar", samples)
    with pytest.raises(SampleError, match=r"a\.tar, key a: the size of an image cannot be read"):
        make(shard)
    data = make(shard, on_error="skip", batch_size=1)
    assert len(data.train.shards[0]) == 1
    assert len(data.train.shards[0].broken) == 1
