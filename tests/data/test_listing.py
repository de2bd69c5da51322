"""All that names shards: tar files, patterns, folders and an index, for every command alike."""

import shutil

import fsspec
import pytest

from lit_align.commands.inspect.inspection import shards_to_inspect
from lit_align.data import PreferenceDataModule
from lit_align.data.importers.webdataset import index_shards
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.index import rows_path
from lit_align.data.shards.listing import find_shards, name_shards
from lit_align.evaluation.prompts import read_prompts
from tests.support.paths import PAIRS


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Folder of two shards; their index lies in the folder `index` beside it."""
    folder = tmp_path_factory.mktemp("pairs") / "tars"
    folder.mkdir()
    for name in ("00000.tar", "00001.tar"):
        shutil.copy(PAIRS / "train" / name, folder)
    index_shards(f"{folder}/*.tar", str(folder.parent / "index"), 1)
    return folder


@pytest.fixture(
    params=[
        "{}/00000.tar {}/00001.tar",
        "{}/0000{{0,1}}.tar",
        "{}/*.tar",
        "{}",
        "{}/",
        "{}/../index",
        "{}/../index/index.json",
    ],
    ids=["files", "braces", "wildcard", "folder", "folder with slash", "folder of an index", "index"],
)
def words(request, tars):
    return request.param.format(tars, tars).split()


def test_all_that_names_shards_names_the_same(words, tars):
    wanted = [str(tars / "00000.tar"), str(tars / "00001.tar")]
    assert [file.path for file in name_shards(words)] == wanted
    found = find_shards(words, ReadOptions())
    assert [file.path for file in found] == wanted
    elsewhere = str(tars.parent / "index")
    of_index = "index" in words[0]
    assert all((file.rows is not None) == of_index for file in found)
    if of_index:
        assert [file.rows.replace("/tars/..", "") for file in found] == [rows_path(one, elsewhere) for one in wanted]
    assert [one.shard for one in shards_to_inspect(words)] == wanted
    assert all((one.entry is not None) == of_index for one in shards_to_inspect(words))
    data = PreferenceDataModule(words, resolution=32, batch_size=8, num_workers=0)
    data.setup("fit")
    assert [shard.path for shard in data.train.shards] == wanted


def test_prompts_of_shards(words, tars):
    if len(words) == 1:
        found = read_prompts(words[0])
        assert len(found.unique) + found.repeated == 52
        assert found == read_prompts(f"{tars}/*.tar")


def test_an_index_of_shards_elsewhere_is_imported_again(tars, tmp_path):
    again = index_shards(str(tars.parent / "index/index.json"), str(tmp_path / "again"), 1)
    assert (again.shards, again.pairs) == (2, 52)


def test_tars_that_the_index_of_their_folder_does_not_name(tars, tmp_path, caplog):
    """They are counted in the log, and `import webdataset` takes them in."""
    folder = tmp_path / "tars"
    shutil.copytree(tars, folder)
    index_shards(f"{folder}/00000.tar", None, 1)
    assert [file.path for file in name_shards(str(folder))] == [f"{folder}/00000.tar"]
    assert f"1 other tar files of its folder are left out, first {folder}/00001.tar" in caplog.text
    assert index_shards(str(folder), None, 1).shards == 2
    assert len(name_shards(str(folder))) == 2
    (folder / "more.tar.gz").write_bytes(b"")
    assert len(name_shards(str(folder))) == 2
    assert f"{folder}: 1 compressed tar files are left out, first more.tar.gz" in caplog.text


def test_folders_without_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tar file and no index\.json"):
        name_shards(str(tmp_path))
    (tmp_path / "import.json").write_text("{}")
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"holds import\.json and no index\.json: what writes its shards has not ended"
    ):
        name_shards(str(tmp_path))


def test_a_folder_in_a_bucket(tars):
    """With a slash at its end, as buckets know no folders."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{tars}/*.tar", "/listed/")
    try:
        assert [file.path for file in name_shards("memory://listed/")] == [
            f"memory:///listed/0000{i}.tar" for i in (0, 1)
        ]
    finally:
        filesystem.rm("/listed", recursive=True)
