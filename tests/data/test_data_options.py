"""Options of the data module that no other file covers."""

import io
import shutil

import pytest
import torch
from PIL import Image

from lit_align.data import PreferenceDataModule
from lit_align.data.labels.score_files import Identity, Scores, side_file, write_scores
from lit_align.data.shards.index import content_digest
from lit_align.data.shards.layout import parse_sample, read_samples
from lit_align.scoring import Colourfulness
from lit_align.scoring.vote import Vote
from tests.support.paths import PAIRS
from tests.support.shards import write_dicts

VOTE = Vote(["judge"], ties="skip")


def make(train, val=None, **options):
    settings = {"resolution": 32, "batch_size": 26, "num_workers": 0, "flip_probability": 0.0, **options}
    data = PreferenceDataModule(train, val, **settings)
    data.setup("fit")
    return data


def score(shard, folder, direction):
    """Store scores that agree with the human label (direction 1) or contradict it (direction -1)."""
    pairs = [parse_sample(sample) for sample in read_samples(shard)]
    score_0 = torch.tensor([float(direction * pair.human) for pair in pairs])
    keys, contents = [pair.key for pair in pairs], [content_digest(pair) for pair in pairs]
    path = side_file(shard, folder)
    path.parent.mkdir(exist_ok=True)
    write_scores(path, {"judge": Scores(Identity(1, "weights"), keys, contents, score_0, -score_0)})


@pytest.fixture
def shards(tmp_path):
    """A training shard with scores in `train`, and a held-out shard with scores in `agree` and in `against`."""
    train = shutil.copy(PAIRS / "train/00000.tar", tmp_path / "train.tar")
    val = shutil.copy(PAIRS / "train/00001.tar", tmp_path / "val.tar")
    score(str(train), str(tmp_path / "train"), 1)
    score(str(val), str(tmp_path / "agree"), 1)
    score(str(val), str(tmp_path / "against"), -1)
    return str(train), str(val)


def test_val_scores_order_the_held_out_pairs(shards, tmp_path):
    """The folder decides which image is chosen; the training pairs keep their own scores."""
    batches = {}
    for folder, direction in (("agree", 1), ("against", -1)):
        data = make(*shards, vote=VOTE, train_scores=str(tmp_path / "train"), val_scores=str(tmp_path / folder))
        pairs = data.val.shards[0].pairs
        assert len(pairs.sign) == 26
        assert (pairs.sign == direction * pairs.human).all()
        assert (data.train.shards[0].pairs.sign == data.train.shards[0].pairs.human).all()
        (batches[folder],) = data.val_dataloader()
    assert torch.equal(batches["agree"].chosen, batches["against"].rejected)
    assert torch.equal(batches["agree"].rejected, batches["against"].chosen)
    assert not torch.equal(batches["agree"].chosen, batches["agree"].rejected)


def test_without_val_scores_they_lie_beside_the_held_out_shards(shards, tmp_path):
    with pytest.raises(ValueError, match=r"There are no scores by 'judge' for .*val\.tar"):
        make(*shards, vote=VOTE, train_scores=str(tmp_path / "train"))
    score(shards[1], None, -1)
    pairs = make(*shards, vote=VOTE, train_scores=str(tmp_path / "train")).val.shards[0].pairs
    assert (pairs.sign == -pairs.human).all()


def test_random_crops_differ_between_pairs_and_epochs(tmp_path):
    """Each column has its own shade of grey: the first one of a crop tells where the crop is."""
    wide, buffer = Image.new("L", (64, 16)), io.BytesIO()
    wide.putdata([4 * column for _ in range(16) for column in range(64)])
    wide.save(buffer, "PNG")
    fields = {"jpg_0.png": buffer.getvalue(), "jpg_1.png": buffer.getvalue(), "caption.txt": "wide"}
    labels = {"label_0.txt": "1", "label_1.txt": "0"}
    shard = write_dicts(tmp_path / "a.tar", [{"__key__": f"{number}", **fields, **labels} for number in range(12)])

    def positions(epoch, crop, seed=0):
        data = make(shard, batch_size=12, resolution=16, crop=crop, seed=seed)
        data._position = lambda: (epoch, 0)
        (batch,) = data.train_dataloader()
        assert torch.equal(batch.chosen, batch.rejected)  # one draw for both images
        return sorted((batch.chosen[:, 0, 0, 0] // 4).tolist())

    assert positions(0, "center") == [24] * 12
    assert len(set(positions(0, "random"))) > 6
    assert positions(0, "random") == positions(0, "random")
    assert positions(0, "random") not in (positions(1, "random"), positions(0, "random", seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 4}, r"data\.resolution is 4; it must be at least 8"),
        ({"shuffle_window": 0}, r"data\.shuffle_window is 0; it must be at least 1"),
        ({"skip_limit": -1}, r"data\.skip_limit is -1; it must be at least 0"),
        ({"read_timeout": 0.0}, r"data\.read_timeout is 0\.0; it must be greater than 0, or null"),
        ({"crop": "random", "train_cache": "cache"}, r"data\.crop is random; a cache holds the centre"),
        ({"scorers": {"colour": Colourfulness()}, "val_cache": "cache"}, r"data\.scorers look at pixels"),
    ],
)
def test_options_that_cannot_work_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceDataModule("x.tar", **options)
