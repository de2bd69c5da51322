"""Shards to batches: labels, order, workers, faults."""

import io
import itertools
import logging
import random
import struct
import tarfile

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from lit_align.data import PreferenceDataModule, SampleError, images
from lit_align.data.dataset import PairDataset, ShardPairReader
from lit_align.data.decoder import decode
from lit_align.data.images import PairTransform, resize, transform
from lit_align.data.labels.stored import HumanLabels
from lit_align.data.loader import PairLoader
from lit_align.data.order import Order
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.layout import parse_sample, read_samples
from lit_align.data.shards.patterns import expand
from lit_align.data.shards.scan import ShardFile, scan_shards
from lit_align.data.shards.storage import read_range
from tests.support.paths import PAIRS


def png(color, size=(8, 8), kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


def sample(number, label_0="1", **changes):
    """Image 0 is as red as its number, image 1 as blue: a batch tells which pair and which image it holds."""
    label_1 = {"1": "0", "0": "1", "0.5": "0.5"}.get(label_0, "0")
    fields = {
        "__key__": f"{number:04d}",
        "jpg_0.png": png((number % 256, 0, 0)),
        "jpg_1.png": png((0, 0, number % 256)),
        "label_0.txt": label_0,
        "label_1.txt": label_1,
        "caption.txt": f"pair {number}",
    }
    fields |= changes
    return {name: value for name, value in fields.items() if value is not None}


def write(path, samples):
    with wds.TarWriter(str(path)) as writer:
        for one in samples:
            writer.write(one)
    return str(path)


def make_shards(folder, sizes):
    numbers = itertools.count()
    return [
        write(folder / f"{i:03d}.tar", [sample(next(numbers)) for _ in range(size)]) for i, size in enumerate(sizes)
    ]


def numbers_of(stream):
    return [batch.pairs.numbers for batch in stream]


def look(*shards, on_error="raise", **options):
    return scan_shards([ShardFile(shard, None) for shard in shards], HumanLabels(), ReadOptions(on_error), **options)


def stream(shards, epoch=0, skip=0, on_error="raise", workers=0, flip=0.0, **order):
    settings = {"batch_size": 2, "shuffle_window": 4, "shapes": ((8, 8),), **order}
    reader = ShardPairReader(PairTransform("center", flip))
    dataset = PairDataset(Order(tuple(shards), **settings), reader, ReadOptions(on_error))
    return PairLoader(dataset, workers, lambda: (epoch, skip))


# -- labels and layout


def test_bundled_pairs_are_ordered_by_their_labels():
    """High contrast is preferred and drawn without colour; which file holds it differs from pair to pair."""
    data = PreferenceDataModule(str(PAIRS / "train/*.tar"), resolution=32, batch_size=16, num_workers=0)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 13
    seen = [number for batch in batches for number in batch.pairs.numbers]
    assert sorted(seen) == list(range(208))
    chosen = torch.cat([batch.chosen for batch in batches]).float()
    rejected = torch.cat([batch.rejected for batch in batches]).float()
    colour = [images.std(1).flatten(1).mean(1) for images in (chosen, rejected)]
    assert (colour[0] < 0.01).all()
    assert (colour[1] > 5).all()
    labels = [parse_sample(s).label_0 for path in data.train.shards for s in read_samples(path.path)]
    assert 80 < sum(labels) < 128


def test_no_emoji_is_in_train_and_held_out():
    for preference in ("high_contrast-over-color", "flat-over-color"):
        keys = {
            split: {s.key for path in expand(str(PAIRS.parent / preference / split / "*.tar"))
                    for s in read_samples(path, image_bytes=0)}
            for split in ("train", "held_out")
        }  # fmt: skip
        assert len(keys["train"]) == 208
        assert len(keys["held_out"]) == 72
        assert not keys["train"] & keys["held_out"]


@pytest.mark.parametrize(("label_0", "chosen_is_red"), [("1", True), ("0", False), ("1.0", True)])
def test_label_decides(tmp_path, label_0, chosen_is_red):
    label_1 = "1" if label_0 == "0" else "0.0"
    shard = write(tmp_path / "a.tar", [sample(200, label_0=label_0, **{"label_1.txt": label_1})])
    batch = next(iter(stream(look(shard), batch_size=1)))
    assert (batch.chosen[0, 0].float().mean() == 200) == chosen_is_red
    assert (batch.rejected[0, 2].float().mean() == 200) == chosen_is_red
    assert batch.prompts == ["pair 200"]
    assert batch.pairs.weight.tolist() == [1]


def test_ties_are_left_out_and_counted(tmp_path, caplog):
    shard = write(tmp_path / "a.tar", [sample(i, label_0="0.5" if i % 3 == 0 else "1") for i in range(9)])
    (found,) = look(shard)
    assert (len(found), found.ties, found.broken) == (6, 3, ())
    prompts = [prompt for batch in stream([found]) for prompt in batch.prompts]
    assert sorted(prompts) == [f"pair {i}" for i in (1, 2, 4, 5, 7, 8)]
    with caplog.at_level(logging.INFO):
        PreferenceDataModule(shard, resolution=8, batch_size=2).setup("fit")
    assert "6 pairs in 1 shards; left out: 3 ties" in caplog.text


def test_layout_variants(tmp_path):
    """WebP under a jpg_ name, original_prompt, a folder in the key, upper-case endings."""
    one = sample(1, **{"caption.txt": None, "original_prompt.txt": "  a prompt\n", "jpg_0.png": None})
    one |= {"jpg_0.webp": png("red", kind="WEBP"), "__key__": "part/0001"}
    shard = write(tmp_path / "a.tar", [one])
    pair = parse_sample(next(read_samples(shard)))
    assert (pair.key, pair.prompt) == ("part/0001", "a prompt")
    assert decode(pair.image_0).getpixel((0, 0))[0] > 250


# -- faults


BROKEN = {
    "no label": ({"label_1.txt": None}, r"key 0003: field label_1.txt is missing; the sample has caption.txt"),
    "label of text": ({"label_0.txt": "b'1'"}, r"key 0003: label_0.txt is \"b'1'\"; it must be 0, 0.5 or 1"),
    "label 2": ({"label_0.txt": "2"}, r"key 0003: label_0.txt is '2'"),
    "both win": ({"label_1.txt": "1"}, r"key 0003: label_0 is 1 and label_1 is 1; they must add up to 1"),
    "no image": ({"jpg_1.png": None}, r"key 0003: image jpg_1.\* is missing"),
    "two images": ({"jpg_1.jpg": b"x"}, r"key 0003: image jpg_1.\* is there 2 times"),
    "no prompt": ({"caption.txt": None}, r"key 0003: no prompt"),
    "prompt not UTF-8": ({"caption.txt": b"\xff\xfe"}, r"key 0003: caption.txt is not UTF-8"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_sample_is_named_or_counted(tmp_path, caplog, fault):
    changes, message = BROKEN[fault]
    shard = write(tmp_path / "a.tar", [sample(i, **(changes if i == 3 else {})) for i in range(6)])
    data = PreferenceDataModule(shard, resolution=8, batch_size=2, num_workers=0)
    if fault != "prompt not UTF-8":
        with pytest.raises(SampleError, match=f"shard {shard}, {message}"):
            data.setup("fit")  # before the first step
    (skipped,) = look(shard, on_error="skip")
    assert (len(skipped), skipped.ties, len(skipped.broken)) == (5, 0, 1)
    assert "key 0003" in caplog.text
    prompts = [prompt for batch in stream([skipped], on_error="skip", batch_size=1) for prompt in batch.prompts]
    assert sorted(prompts) == [f"pair {i}" for i in (0, 1, 2, 4, 5)]


@pytest.mark.parametrize("bad", [b"", b"no image", png("red")[:45]], ids=["empty", "text", "cut"])
def test_unreadable_image_is_named_or_weighs_nothing(tmp_path, caplog, bad):
    shard = write(tmp_path / "a.tar", [sample(i, **({"jpg_1.png": bad} if i == 3 else {})) for i in range(6)])
    shards = look(shard)
    with pytest.raises(SampleError, match=f"shard {shard}, key 0003: an image cannot be decoded"):
        list(stream(shards))
    with pytest.raises(SampleError) as error:
        list(stream(shards, workers=2))
    assert str(error.value).startswith(f"shard {shard}, key 0003: an image cannot be decoded")  # no worker's traceback
    batches = list(stream(shards, on_error="skip"))
    weight = {n: w for b in batches for n, w in zip(b.pairs.numbers, b.pairs.weight.tolist(), strict=True)}
    assert weight == {0: 1, 1: 1, 2: 1, 3: 0, 4: 1, 5: 1}
    (fault,) = [fault for b in batches for fault in b.pairs.faults]
    assert "key 0003" in fault


def test_missing_cut_and_changed_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing-\{0..3\}.tar.*there is no file"):
        expand(str(tmp_path / "nothing-{0..3}.tar"))
    (whole,) = make_shards(tmp_path, [6])
    shards = look(whole)
    data = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "000.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(SampleError, match=r"000\.tar"):
        list(stream(shards))
    (tmp_path / "text.tar").write_text("not a tar file" * 100)
    with pytest.raises(SampleError, match=r"text.tar cannot be read"):
        look(str(tmp_path / "text.tar"))
    write(tmp_path / "000.tar", [sample(i) for i in range(4)])
    with pytest.raises(SampleError, match=r"000\.tar has changed"):
        list(stream(shards))


def test_labels_that_have_changed_since_the_scan_are_named(tmp_path):
    """Only the labels: names, sizes, images and prompts are those of before."""
    (shard,) = make_shards(tmp_path, [6])
    shards = look(shard)
    write(shard, [sample(i, label_0="0") for i in range(6)])
    with pytest.raises(SampleError, match=r"key 000\d: the shard has changed: there was another .*, or another label"):
        list(stream(shards))


def test_a_field_twice_is_an_error(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("0001.caption.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(SampleError, match=r"a\.tar, key 0001: field caption\.txt is there more than once"):
        look(str(path))


# -- order


def test_order_is_a_function_of_seed_and_epoch(tmp_path):
    shards = look(*make_shards(tmp_path, [5, 9, 3, 7]))
    first = numbers_of(stream(shards))
    assert first == numbers_of(stream(shards))
    assert len(first) == 12
    assert sorted(itertools.chain(*first)) == sorted(set(itertools.chain(*first)))
    others = [numbers_of(stream(shards, epoch=1)), numbers_of(stream(shards, seed=1))]
    assert first not in others
    assert others[0] != others[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 5])
def test_no_pair_is_lost_or_repeated_over_ranks_and_workers(tmp_path, world_size, workers):
    """Fewer shards than readers works, every rank has the same number of batches, and workers change nothing."""
    shards = look(*make_shards(tmp_path, [13, 20]))
    seen = []
    for rank in range(world_size):
        mine = stream(shards, rank=rank, world_size=world_size, workers=workers if rank == 0 else 0)
        assert len(mine) == 33 // (2 * world_size)
        numbers = numbers_of(mine)
        assert numbers == [batch.numbers for batch in mine.order.epoch(0)]
        assert [len(batch) for batch in numbers] == [2] * len(mine)
        seen += itertools.chain(*numbers)
    assert len(seen) == len(set(seen)) == 33 // (2 * world_size) * 2 * world_size


def test_which_pairs_sit_an_epoch_out_changes(tmp_path):
    shards = look(*make_shards(tmp_path, [5, 4, 6]))
    orders = [stream(shards, batch_size=4, shuffle_window=8).order.epoch(epoch) for epoch in range(8)]
    out = [set(range(15)) - {number for batch in order for number in batch.numbers} for order in orders]
    assert [len(one) for one in out] == [3] * 8
    assert len(set().union(*out)) > 6


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_every_pair_once_in_file_order(tmp_path, world_size):
    shards = look(*make_shards(tmp_path, [5, 6]))
    streams = [stream(shards, shuffle_window=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [n for one in streams for batch in one for n in batch.pairs.numbers] == list(range(11))
    assert sum(len(one) for one in streams) == 6


def test_shuffling_stays_in_its_window(tmp_path):
    """Shards change places, and pairs move within windows of the sequence alone."""
    shards = look(*make_shards(tmp_path, [10, 10, 10]))
    numbers = list(itertools.chain(*numbers_of(stream(shards, shuffle_window=10, batch_size=5))))
    windows = [numbers[i : i + 10] for i in (0, 10, 20)]
    assert sorted(sorted(window) for window in windows) == [list(range(i, i + 10)) for i in (0, 10, 20)]
    assert all(window != sorted(window) for window in windows)
    firsts = {stream(shards, shuffle_window=10).order.epoch(epoch)[0].numbers[0] // 10 for epoch in range(9)}
    assert firsts == {0, 1, 2}


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_stream_can_start_at_any_batch(tmp_path, workers):
    shards = look(*make_shards(tmp_path, [5, 9, 3, 12]))
    whole = list(stream(shards, epoch=3, shuffle_window=5, flip=0.5))
    assert len(whole) == 14
    for skip in (1, 2, 7, 13, 14):
        rest = list(stream(shards, epoch=3, skip=skip, shuffle_window=5, flip=0.5, workers=workers))
        assert [batch.pairs.numbers for batch in rest] == [batch.pairs.numbers for batch in whole[skip:]]
        assert all(torch.equal(a.chosen, b.chosen) for a, b in zip(rest, whole[skip:], strict=True))


def test_skipped_shards_are_not_opened(tmp_path, monkeypatch):
    shards = look(*make_shards(tmp_path, [10, 10, 10]))
    read = []
    monkeypatch.setattr(
        "lit_align.data.dataset.read_range", lambda path, *where: read.append(path) or read_range(path, *where)
    )
    assert len(numbers_of(stream(shards, skip=11, shuffle_window=10))) == 4
    assert len(read) == 8
    assert len(set(read)) == 1


def test_too_few_pairs_for_a_batch_on_every_device(tmp_path):
    (shard,) = make_shards(tmp_path, [3])
    data = PreferenceDataModule(shard, resolution=8, batch_size=4, num_workers=0)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"hold 3 pairs, fewer than one batch of data.batch_size 4 on each of 1"):
        data.train_dataloader()


def test_resume_in_another_order_is_refused(tmp_path):
    shards = make_shards(tmp_path, [6, 6])
    before = PreferenceDataModule(shards, resolution=8, batch_size=2, num_workers=0)
    before.setup("fit")
    after = PreferenceDataModule(shards, resolution=8, batch_size=3, num_workers=0)
    after.setup("fit")
    after.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="batch_size was 2, is 3"):
        after.train_dataloader()


def test_flips_are_drawn_anew_for_every_pair_and_epoch(tmp_path):
    shards, drawn = look(*make_shards(tmp_path, [20, 20])), []
    for epoch in range(4):
        batches = list(stream(shards, epoch=epoch, flip=0.5))
        numbers = torch.tensor([number for batch in batches for number in batch.pairs.numbers])
        flips = torch.cat([batch.pairs.flipped for batch in batches])
        drawn.append(flips[numbers.argsort()])
        assert 10 < flips.sum() < 30
    table = torch.stack(drawn)  # (epochs, pairs)
    assert len({tuple(row) for row in table.tolist()}) == 4
    assert 0.3 < (table[1:] == table[:-1]).float().mean() < 0.7
    assert len({tuple(column) for column in table.T.tolist()}) > 8  # of 16


# -- images


def coordinates(width, height):
    """A picture whose pixels hold their own coordinates shows what was cropped and flipped."""
    image, buffer = Image.new("RGB", (width, height)), io.BytesIO()
    image.putdata([(x * 4, y * 4, 0) for y in range(height) for x in range(width)])
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_pair_shares_crop_and_flip_and_its_sizes_are_true():
    """Two images of unequal sizes: one relative position and one flip, and each its own sizes."""
    transform = PairTransform("random", 0.5)
    flips, lefts = set(), set()
    for seed in range(20):
        result = transform((coordinates(40, 20), coordinates(60, 20)), random.Random(seed), (20, 20))
        seen = []
        for image, time_ids, original in zip(result.images, result.time_ids, (40, 60), strict=True):
            height, width, top, left, *target = time_ids.tolist()
            assert (height, width, top, target) == (20, original, 0, [20, 20])
            row = (image[0, 0] / 4).round().int().tolist()
            flipped = row[0] > row[-1]
            assert row == ([width - 1 - left - i for i in range(20)] if flipped else [left + i for i in range(20)])
            seen.append((flipped, left))
        (flipped, left), (flipped_too, left_too) = seen
        assert flipped == flipped_too == result.flipped
        assert abs(left / 20 - left_too / 40) <= 0.5 / 20 + 0.5 / 40  # each rounded to a pixel
        flips.add(flipped)
        lefts.add(left)
    assert flips == {True, False}
    assert len(lefts) > 10


@pytest.mark.parametrize(("height", "width"), [(20, 40), (40, 20)])
def test_a_crop_is_where_its_draws_say(height, width):
    """One draw decides the flip, from left to right alone; the next the row of the crop, and the last its column."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    buffer = io.BytesIO()
    Image.fromarray(torch.stack([x * 5, y * 5, x * 0], 2).byte().numpy()).save(buffer, "PNG")
    for seed in range(6):
        draws = random.Random(seed)
        flip, down, right = (draws.random() for _ in range(3))
        result = PairTransform("random", 0.5)((buffer.getvalue(),) * 2, random.Random(seed), (20, 20))
        top, left = round(down * (height - 20)), round(right * (width - 20))
        assert result.flipped == (flip < 0.5)
        assert result.time_ids[1].tolist() == [height, width, top, left, 20, 20]
        across = x.flip(1) if result.flipped else x
        expected = [5 * plane[top : top + 20, left : left + 20] for plane in (across, y)]
        assert torch.equal(result.images[1][:2], torch.stack(expected).byte())


def test_sizes_of_unequal_images_go_with_their_images_into_the_batch(tmp_path):
    """One step with images of four sizes: chosen and rejected keep their own, whatever the label."""
    sizes = {"0000": ((40, 20), (20, 30)), "0001": ((24, 36), (50, 25))}
    made = [
        sample(int(key), label, **{"jpg_0.png": coordinates(*first), "jpg_1.png": coordinates(*second)})
        for (key, (first, second)), label in zip(sizes.items(), "10", strict=True)
    ]
    (batch,) = stream(look(write(tmp_path / "a.tar", made)), shapes=((16, 16),))
    for number, row in zip(batch.pairs.numbers, batch.time_ids.tolist(), strict=True):
        first, second = sizes[f"{number:04d}"]
        chosen, rejected = (first, second) if number == 0 else (second, first)
        assert [tuple(one[1::-1]) for one in row] == [chosen, rejected]


@pytest.mark.parametrize("flip", [False, True])
def test_only_the_crop_of_a_long_image_is_resized(flip):
    """Within a rounding it is the crop of the whole; the memory is that of the crop."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 400, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize((400, 7), Image.Resampling.BICUBIC))
    for shape, turned in (((20, 24), pixels), ((24, 20), pixels.transpose(1, 0, 2)), ((4, 4), pixels)):
        down, right = 0.3, 0.8
        found, time_ids = transform(turned, shape, flip, down, right)
        scale = max(shape[0] / turned.shape[0], shape[1] / turned.shape[1])
        whole = resize(np.ascontiguousarray(turned), *(round(side * scale) for side in turned.shape[:2]))
        whole = whole[:, ::-1] if flip else whole
        top, left = time_ids[2:4].tolist()
        assert (top, left) == (round(down * (whole.shape[0] - shape[0])), round(right * (whole.shape[1] - shape[1])))
        wanted = whole[top : top + shape[0], left : left + shape[1]]
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1
    assert transform(np.zeros((1, 60000, 3), np.uint8), (1024, 1024), flip, 0.5, 0.5)[0].shape == (3, 1024, 1024)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), struct.error("argument")])
def test_any_failure_of_a_decode_is_its_samples(tmp_path, monkeypatch, error):
    shard = write(tmp_path / "a.tar", [sample(i) for i in range(4)])
    shards = look(shard)
    decoded = images.decode_pixels

    def fail(data):
        if data == png((2, 0, 0)):
            raise error
        return decoded(data)

    monkeypatch.setattr(images, "decode_pixels", fail)
    with pytest.raises(
        SampleError, match=f"shard {shard}, key 0002: an image cannot be decoded: {type(error).__name__}"
    ):
        list(stream(shards))
    weight = {n: w for b in stream(shards, on_error="skip") for n, w in zip(*map(list, b.pairs[:2]), strict=True)}
    assert {int(n): float(w) for n, w in weight.items()} == {0: 1, 1: 1, 2: 0, 3: 1}


@pytest.mark.parametrize(("height", "width"), [(9, 12), (40, 50), (90, 120)])
def test_images_are_resized_as_pillow_does(height, width):
    """Every pixel of a smaller image is a mean of those that it covers; else fine patterns become others."""
    pixels = torch.randint(256, (40, 50, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    expected = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    assert np.abs(resize(pixels, height, width).astype(int) - expected.astype(int)).max() <= 1


def test_centre_crop_and_resize_keep_each_images_own_size():
    transform = PairTransform("center", 0.0)
    result = transform((png("red", (64, 32)), png("blue", (24, 40))), random.Random(0), (16, 16))
    assert [image.shape for image in result.images] == [(3, 16, 16)] * 2
    assert result.time_ids[0].tolist() == [32, 64, 0, 8, 16, 16]
    assert result.time_ids[1].tolist() == [40, 24, 6, 0, 16, 16]  # 24 x 40 becomes 16 x 27; round(5.5) is 6


def test_transparent_parts_become_white():
    assert decode(png((0, 0, 0, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"flip_probability": 1.5}, "data.flip_probability is 1.5"),
    ],
)
def test_senseless_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        PreferenceDataModule("x.tar", **changes)
