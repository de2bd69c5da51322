"""Shards to batches: labels, order, workers, faults."""

import io
import itertools
import logging
import random
import tarfile

import pytest
import torch
import webdataset as wds
from PIL import Image

from lit_align.data import PreferenceDataModule, SampleError
from lit_align.data.images import PairTransform, decode
from lit_align.data.labels import HumanLabels
from lit_align.data.samples import parse_sample, read_samples
from lit_align.data.shards import Shard, expand, scan
from lit_align.data.stream import Order, PairStream
from tests.conftest import PAIRS


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
    return [batch.number.tolist() for batch in stream]


def stream(shards, epoch=0, skip=0, on_error="raise", **order):
    settings = {"batch_size": 2, "shuffle_window": 4, **order}
    return PairStream(Order(tuple(shards), **settings), PairTransform(8, "center", 0.0), on_error, epoch, skip)


# -- labels and layout


def test_bundled_pairs_are_ordered_by_their_labels():
    """High contrast is preferred and drawn without colour; which file holds it differs from pair to pair."""
    data = PreferenceDataModule(str(PAIRS / "train/*.tar"), resolution=32, batch_size=16, num_workers=0)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 13
    seen = torch.cat([batch.number for batch in batches])
    assert sorted(seen.tolist()) == list(range(208))
    chosen = torch.cat([batch.chosen for batch in batches]).float()
    rejected = torch.cat([batch.rejected for batch in batches]).float()
    colour = [images.std(1).flatten(1).mean(1) for images in (chosen, rejected)]
    assert (colour[0] < 0.01).all()
    assert (colour[1] > 5).all()
    labels = [parse_sample(s).label_0 for path in data.train for s in read_samples(path.path)]
    assert 80 < sum(labels) < 128


def test_no_emoji_is_in_train_and_held_out():
    for preference in ("high_contrast-over-color", "flat-over-color"):
        keys = {
            split: {s["__key__"] for path in expand(str(PAIRS.parent / preference / split / "*.tar"))
                    for s in read_samples(path, with_images=False)}
            for split in ("train", "held_out")
        }  # fmt: skip
        assert len(keys["train"]) == 208
        assert len(keys["held_out"]) == 72
        assert not keys["train"] & keys["held_out"]


@pytest.mark.parametrize(("label_0", "chosen_is_red"), [("1", True), ("0", False), ("1.0", True)])
def test_label_decides(tmp_path, label_0, chosen_is_red):
    label_1 = "1" if label_0 == "0" else "0.0"
    shard = write(tmp_path / "a.tar", [sample(200, label_0=label_0, **{"label_1.txt": label_1})])
    batch = next(iter(stream(scan([shard], HumanLabels(), "raise"), batch_size=1)))
    assert (batch.chosen[0, 0].float().mean() == 200) == chosen_is_red
    assert (batch.rejected[0, 2].float().mean() == 200) == chosen_is_red
    assert batch.prompts == ["pair 200"]
    assert batch.weight.tolist() == [1]


def test_ties_are_left_out_and_counted(tmp_path, caplog):
    shard = write(tmp_path / "a.tar", [sample(i, label_0="0.5" if i % 3 == 0 else "1") for i in range(9)])
    assert scan([shard], HumanLabels(), "raise") == [Shard(shard, pairs=6, ties=3, broken=0)]
    prompts = [prompt for batch in stream(scan([shard], HumanLabels(), "raise")) for prompt in batch.prompts]
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
    skipped = scan([shard], HumanLabels(), "skip")
    assert skipped == [Shard(shard, pairs=5, ties=0, broken=1)]
    assert "key 0003" in caplog.text
    prompts = [prompt for batch in stream(skipped, on_error="skip", batch_size=1) for prompt in batch.prompts]
    assert sorted(prompts) == [f"pair {i}" for i in (0, 1, 2, 4, 5)]


@pytest.mark.parametrize("bad", [b"", b"no image", png("red")[:45]], ids=["empty", "text", "cut"])
def test_unreadable_image_is_named_or_weighs_nothing(tmp_path, caplog, bad):
    shard = write(tmp_path / "a.tar", [sample(i, **({"jpg_1.png": bad} if i == 3 else {})) for i in range(6)])
    shards = scan([shard], HumanLabels(), "raise")
    with pytest.raises(SampleError, match=f"shard {shard}, key 0003: an image cannot be decoded"):
        list(stream(shards))
    batches = list(stream(shards, on_error="skip"))
    weight = {n: w for b in batches for n, w in zip(b.number.tolist(), b.weight.tolist(), strict=True)}
    assert weight == {0: 1, 1: 1, 2: 1, 3: 0, 4: 1, 5: 1}
    assert "key 0003" in caplog.text


def test_missing_cut_and_changed_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing-\{0..3\}.tar.*there is no file"):
        expand(str(tmp_path / "nothing-{0..3}.tar"))
    (whole,) = make_shards(tmp_path, [6])
    shards = scan([whole], HumanLabels(), "raise")
    data = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "000.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(SampleError, match=r"000\.tar"):
        list(stream(shards))
    (tmp_path / "text.tar").write_text("not a tar file" * 100)
    with pytest.raises(SampleError, match=r"text.tar cannot be read"):
        scan([str(tmp_path / "text.tar")], HumanLabels(), "raise")
    write(tmp_path / "000.tar", [sample(i) for i in range(4)])
    with pytest.raises(SampleError, match="4 pairs left of 6: it changed during the run"):
        list(stream(shards))


def test_a_field_twice_is_an_error(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("0001.caption.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(SampleError, match=r"a\.tar holds a field twice"):
        scan([str(path)], HumanLabels(), "raise")


# -- order


def test_order_is_a_function_of_seed_and_epoch(tmp_path):
    shards = scan(make_shards(tmp_path, [5, 9, 3, 7]), HumanLabels(), "raise")
    first = numbers_of(stream(shards))
    assert first == numbers_of(stream(shards))
    assert len(first) == 12
    assert sorted(itertools.chain(*first)) == sorted(set(itertools.chain(*first)))
    others = [numbers_of(stream(shards, epoch=1)), numbers_of(stream(shards, seed=1))]
    assert first not in others
    assert others[0] != others[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_no_pair_is_lost_or_repeated_over_ranks_and_workers(tmp_path, world_size, workers):
    """Fewer shards than readers works, and every rank has the same number of batches."""
    shards = tuple(scan(make_shards(tmp_path, [13, 20]), HumanLabels(), "raise"))
    seen = []
    for rank in range(world_size):
        order = Order(shards, 2, rank, world_size, seed=0, shuffle_window=4, workers=workers)
        assert order.batches == 33 // (2 * world_size)
        parts = [order.worker_pairs(worker, 0)[0] for worker in range(max(1, workers))]
        positions = [position for part in parts for position in part]
        assert positions == list(order.pairs)
        seen += positions
        assert [len(part) % 2 for part in parts] == [0] * len(parts)
    assert seen == list(range(33 // (2 * world_size) * 2 * world_size))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_every_pair_once_in_file_order(tmp_path, world_size):
    shards = tuple(scan(make_shards(tmp_path, [5, 6]), HumanLabels(), "raise"))
    streams = [stream(shards, shuffle_window=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [n for one in streams for batch in one for n in batch.number.tolist()] == list(range(11))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_stream_can_start_at_any_batch(tmp_path, workers):
    shards = tuple(scan(make_shards(tmp_path, [5, 9, 3, 12]), HumanLabels(), "raise"))
    order = Order(shards, 2, seed=0, shuffle_window=5, workers=workers)
    transform = PairTransform(8, "center", 0.5)

    def read(skip):
        dataset = PairStream(order, transform, "raise", epoch=3, skip_batches=skip)
        return numbers_of(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers))

    whole = read(0)
    assert len(whole) == order.batches == 14
    for skip in (1, 2, 7, 13, 14):
        assert read(skip) == whole[skip:]


def test_skipped_shards_are_not_opened(tmp_path, monkeypatch):
    shards = scan(make_shards(tmp_path, [10, 10, 10]), HumanLabels(), "raise")
    opened = []
    monkeypatch.setattr("lit_align.data.stream.read_samples", lambda path: opened.append(path) or read_samples(path))
    assert len(numbers_of(stream(shards, skip=11, shuffle_window=10))) == 4
    assert len(opened) == 1


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


# -- images


def test_pair_shares_crop_and_flip_and_geometry_is_true():
    """A picture whose pixels hold their own coordinates shows what was cropped and flipped."""
    wide = Image.new("RGB", (40, 20))
    wide.putdata([(x * 5, y * 5, 0) for y in range(20) for x in range(40)])
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    transform = PairTransform(20, "random", 0.5)
    flips, lefts = set(), set()
    for seed in range(20):
        result = transform((buffer.getvalue(), buffer.getvalue()), random.Random(seed))
        assert torch.equal(*result.images)
        assert torch.equal(*result.geometries)
        height, width, top, left, *target = result.geometries[0].tolist()
        assert (height, width, top, target) == (20, 40, 0, [20, 20])
        row = (result.images[0][0, 0] / 5).round().int().tolist()
        flipped = row[0] > row[-1]
        assert row == ([39 - left - i for i in range(20)] if flipped else [left + i for i in range(20)])
        flips.add(flipped)
        lefts.add(left)
    assert flips == {True, False}
    assert len(lefts) > 10


def test_centre_crop_and_resize_keep_each_images_own_size():
    transform = PairTransform(16, "center", 0.0)
    result = transform((png("red", (64, 32)), png("blue", (24, 40))), random.Random(0))
    assert [image.shape for image in result.images] == [(3, 16, 16)] * 2
    assert result.geometries[0].tolist() == [32, 64, 0, 8, 16, 16]
    assert result.geometries[1].tolist() == [40, 24, 6, 0, 16, 16]  # 24 x 40 becomes 16 x 27; round(5.5) is 6


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
