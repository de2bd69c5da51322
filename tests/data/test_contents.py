"""A resumed run goes on with the images and prompts that it began with, and reads no whole shard to know it."""

import io
import shutil
from pathlib import Path

import pytest

from lit_align.data import PreferenceDataModule
from lit_align.data.contents import PAIRS, PROMPTS, SAMPLE, SIZES, SMALL_SAMPLE, contents
from lit_align.data.shards.index import index_shard, rows_path
from lit_align.data.shards.layout import read_samples
from tests.support.paths import PAIRS as BUNDLED
from tests.support.shards import write_dicts


def make_data(shard):
    """Set up a data module of one shard."""
    data = PreferenceDataModule(str(shard), resolution=32, batch_size=2, num_workers=0)
    data.setup("fit")
    return data


def begin(shard):
    """Begin a run, and return the state that its checkpoints hold."""
    data = make_data(shard)
    data.train_dataloader()
    return data.state_dict()


def go_on(state, shard):
    data = make_data(shard)
    data.load_state_dict(state)
    data.train_dataloader()


def rewritten(folder, change):
    """Write the first bundled shard with other fields under the same name, keys and labels."""
    folder.mkdir(exist_ok=True)
    samples = list(read_samples(str(BUNDLED / "train/00000.tar")))
    dicts = [{"__key__": one.key, **change(number, dict(one.fields))} for number, one in enumerate(samples)]
    return Path(write_dicts(folder / "00000.tar", dicts))


def other_prompt(number, fields):
    """Give the last pair another prompt of the same length."""
    return fields | ({"caption.txt": fields["caption.txt"][::-1]} if number == 25 else {})


def other_image(number, fields):
    """Give one pair another image of the same size in bytes."""
    name = next(name for name in fields if name.startswith("jpg_1"))
    middle = len(fields[name]) // 2  # what is in front of the pixels stays
    flipped = fields[name][:middle] + bytes(byte ^ 1 for byte in fields[name][middle:])
    return fields | ({name: flipped} if number == 13 else {})


@pytest.fixture
def shard(tmp_path):
    return rewritten(tmp_path / "first", lambda number, fields: fields)


@pytest.mark.parametrize(("change", "named"), [(other_prompt, PROMPTS), (other_image, SAMPLE)])
@pytest.mark.parametrize("indexed", [False, True], ids=["scanned", "indexed"])
def test_shards_of_equal_names_keys_and_labels_are_told_apart(tmp_path, shard, change, named, indexed):
    other = rewritten(tmp_path / "second", change)
    for path in (shard, other):
        if indexed:
            index_shard(str(path))
    state = begin(shard)
    moved = shutil.copytree(shard.parent, tmp_path / "moved") / shard.name
    go_on(state, moved)
    with pytest.raises(ValueError, match=f"hold other .*{PAIRS if indexed else named} was .*under equal names, keys"):
        go_on(state, other)


def test_an_index_made_later_does_not_stop_a_run(shard, tmp_path):
    state = begin(shard)
    index_shard(str(shard))
    assert set(begin(shard)["contents"]) == {PAIRS}
    go_on(state, shard)
    other = rewritten(tmp_path / "second", other_image)
    index_shard(str(other))
    with pytest.raises(ValueError, match=f"hold other .*{SAMPLE}"):
        go_on(state, other)


@pytest.mark.parametrize("back", [False, True])
def test_shards_may_move_to_an_address_and_back(shard, tmp_path, back):
    """Of which fewer bytes are sampled."""
    places = [str(shard), f"file://{shard}"]
    go_on(begin(places[back]), places[not back])
    other = rewritten(tmp_path / "second", lambda number, fields: other_image(number + 13, fields))
    with pytest.raises(ValueError, match=f"hold other {SMALL_SAMPLE}"):
        go_on(begin(places[back]), f"file://{other}" if not back else other)


def test_a_checkpoint_without_a_record_is_resumed_with_a_line(shard, caplog):
    state = begin(shard)
    del state["contents"]
    with caplog.at_level("INFO"):
        go_on(state, shard)
    assert "does not say which images and prompts its run began with" in caplog.text


def test_little_of_a_shard_is_read(shard, monkeypatch):
    (scanned,) = make_data(shard).train.shards
    read = []

    class Counting(io.FileIO):
        def __init__(self, path, timeout):
            super().__init__(path)

        def read(self, count=-1):
            read.append(count)
            return super().read(count)

    monkeypatch.setattr("lit_align.data.contents.open_binary", Counting)
    assert set(contents([scanned], None)) == {PROMPTS, SIZES, SMALL_SAMPLE, SAMPLE}
    assert sum(read) == (26 + 4) * 2 * 64 < shard.stat().st_size / 10
    Path(rows_path(str(shard))).unlink(missing_ok=True)


def test_a_shard_that_cannot_be_sampled_is_not_another_one(shard, monkeypatch):
    """A passing fault, or a disk that is absent because a cache replaces its shards."""
    (scanned,) = make_data(shard).train.shards
    state = begin(shard)
    monkeypatch.setattr("lit_align.data.contents.open_binary", lambda path, timeout: Path("/no/such").read_bytes())
    assert set(contents([scanned], None)) == {PROMPTS, SIZES}
    go_on(state, shard)


def test_other_held_out_pairs_are_said(shard, tmp_path, recwarn):
    other = rewritten(tmp_path / "second", other_image)

    def data(held_out):
        made = PreferenceDataModule(str(shard), str(held_out), resolution=32, batch_size=2, num_workers=0)
        made.setup("fit")
        return made

    first, second = data(shard), data(other)
    first.train_dataloader()
    second.load_state_dict(first.state_dict())
    second.train_dataloader()
    assert any("data.val_shards hold other pairs" in str(warning.message) for warning in recwarn)
