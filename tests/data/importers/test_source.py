"""Images on a web server that fails for a while, or for good."""

import json
from pathlib import Path

import pytest

from lit_align.commands.importing.command import table
from lit_align.common import passing_faults
from lit_align.data.importers.source import load_image
from lit_align.user_errors import UserOSError
from tests.support.imports import BUNDLED, files, read_all, rejects
from tests.support.servers import scripted_server

IMAGES = {f"/{i}{j}.png": data for i in range(4) for j, data in enumerate((BUNDLED[i].image_0, BUNDLED[i].image_1))}


@pytest.fixture
def pauses(monkeypatch):
    slept = []
    load_image.cache_clear()
    monkeypatch.setattr(passing_faults.time, "sleep", slept.append)
    return slept


def pairs_at(address, folder, count=4):
    rows = [
        {"chosen": f"{address}/{i}0.png", "rejected": f"{address}/{i}1.png", "prompt": str(i)} for i in range(count)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"{folder}/pairs.jsonl"


def test_an_overloaded_server_loses_no_row(tmp_path, pauses):
    """Four times 429 or 503 are waited for; what is gone or refused is counted, each under its own reason."""
    passing = [("/00.png", 429, {"Retry-After": "9"}), *(("/00.png", 503, {}) for _ in range(3))]
    lasting = [("/20.png", 410, {}), ("/31.png", 403, {})]
    with scripted_server(IMAGES, [*passing, *lasting]) as (address, asked):
        table(str(tmp_path / "out"), pairs_at(address, tmp_path), workers=1)
    assert [pair.prompt for pair, _ in read_all(tmp_path / "out")] == ["0", "1"]
    assert [why for _, _, why in rejects(tmp_path / "out")] == [
        "image gone",
        "image refused, HTTP status 403",
    ]
    assert sorted(pauses) == [2, 4, 8, 9]
    assert (asked["/00.png"], asked["/11.png"]) == (5, 1)


def test_an_import_that_the_server_stops_is_resumed_by_the_same_command(tmp_path, pauses):
    stops = [("/30.png", 503, {})] * 7
    with scripted_server(IMAGES, stops) as (address, asked):
        words = (str(tmp_path / "out"), pairs_at(address, tmp_path))
        with pytest.raises(UserOSError, match=r"00001\.tar .*30\.png: HTTP status 503 .*Run the same command again"):
            table(*words, pairs_per_shard=2, workers=1)
        assert not (tmp_path / "out/index.json").exists()
        load_image.cache_clear()
        table(*words, pairs_per_shard=2, workers=1)
        assert (asked["/00.png"], asked["/30.png"]) == (1, 8)
        assert [pair.prompt for pair, _ in read_all(tmp_path / "out")] == ["0", "1", "2", "3"]
        table(str(tmp_path / "unbroken"), words[1], pairs_per_shard=2, workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


def test_a_server_that_never_delivers_an_image_need_not_stop_an_import(tmp_path, pauses):
    with scripted_server(IMAGES, [("/30.png", 500, {})] * 99) as (address, _):
        words = (str(tmp_path / "out"), pairs_at(address, tmp_path))
        with pytest.raises(UserOSError, match=r"30\.png: HTTP status 500"):
            table(*words, workers=1)
        load_image.cache_clear()
        table(*words, leave_out_undelivered=True, workers=1)  # goes on with what was begun
    assert rejects(tmp_path / "out") == [(3, "pairs.jsonl, line 4", "image not delivered")]


def test_a_missing_file_is_looked_for_again_and_a_gone_address_is_not(tmp_path, pauses):
    """A drive may be mounted before an unfinished import goes on; a server that has no image is not asked again."""
    left = {path: data for path, data in IMAGES.items() if path != "/20.png"}
    with scripted_server(left, [("/31.png", 503, {})] * 7) as (address, asked):
        source = Path(pairs_at(address, tmp_path))
        source.write_text(source.read_text().replace(f"{address}/10.png", "here.png"))
        with pytest.raises(UserOSError, match=r"00003\.tar"):
            table(str(tmp_path / "out"), str(source), pairs_per_shard=1, workers=1)
        (tmp_path / "here.png").write_bytes(IMAGES["/10.png"])
        load_image.cache_clear()
        table(str(tmp_path / "out"), str(source), pairs_per_shard=1, workers=1)
    assert [pair.prompt for pair, _ in read_all(tmp_path / "out")] == ["0", "1", "3"]
    assert rejects(tmp_path / "out") == [(2, "pairs.jsonl, line 3", "image gone")]
    assert (asked["/00.png"], asked["/20.png"], asked["/31.png"]) == (1, 1, 8)
