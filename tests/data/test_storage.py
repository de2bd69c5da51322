"""Reading from web servers with and without range requests, from fsspec and from pipes; reads that hang."""

import os
import shutil
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import fsspec
import pytest
import torch

from lit_align.common import passing_faults
from lit_align.data import PreferenceDataModule, SampleError
from lit_align.data.labels.stored import HumanLabels
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards import kept_scans, spooled
from lit_align.data.shards.index import index_shard, read_entry, write_index
from lit_align.data.shards.layout import read_samples
from lit_align.data.shards.listing import find_shards
from lit_align.data.shards.patterns import expand
from lit_align.data.shards.scan import scan_shards
from lit_align.data.shards.storage import _has_ranges, open_binary, read_range, size
from lit_align.data.shards.timeouts import within
from tests.support.paths import PAIRS

TRAIN = PAIRS / "train"
NAMES = ["00000.tar", "00001.tar"]


class Ranges(SimpleHTTPRequestHandler):
    """A web server that answers range requests."""

    requests: list[tuple[str, str | None]] = []  # noqa: RUF012  # shared by all handlers of a test

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().do_GET()
        first, last = wanted.removeprefix("bytes=").split("-")
        data = path.read_bytes()
        part = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_):
        pass


class Whole(SimpleHTTPRequestHandler):
    """A web server that ignores range requests."""

    whole: list[str] = []  # noqa: RUF012  # files that were requested to be read to their end

    def do_GET(self):
        if self.headers.get("Range") is None and self.path.endswith(".tar"):
            self.whole.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


class Flaky(Ranges):
    """A web server whose first answers for each file are faults that pass, or one that lasts."""

    faults: dict[str, list[int]] = {}  # noqa: RUF012  # statuses still to be answered, by path; 0 cuts the connection
    lasting: dict[str, int] = {}  # noqa: RUF012

    def fails(self):
        left = self.faults.setdefault(self.path, [503, 0, 429])
        status = self.lasting.get(self.path) or (left.pop(0) if left else None)
        if status == 0:
            self.close_connection = True
        elif status is not None:
            self.send_response(status)
            self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            self.end_headers()
        return status is not None

    def do_GET(self):
        return None if self.fails() else super().do_GET()

    def do_HEAD(self):
        return None if self.fails() else super().do_HEAD()


@pytest.fixture(autouse=True)
def scans(monkeypatch, tmp_path):
    """Folder of scans that are kept."""
    monkeypatch.setattr(kept_scans, "kept_folder", lambda: tmp_path / "scans")
    return tmp_path / "scans"


@pytest.fixture
def slept(monkeypatch):
    """Pauses between attempts, which are not made."""
    pauses = []
    monkeypatch.setattr(passing_faults.time, "sleep", pauses.append)
    monkeypatch.setattr(Flaky, "faults", {})
    monkeypatch.setattr(Flaky, "lasting", {})
    _has_ranges.cache_clear()
    return pauses


@pytest.fixture
def copies(monkeypatch):
    """Folder in which folders of copies are made; its path is short, for workers make their sockets there."""
    monkeypatch.delenv(spooled.FOLDER, raising=False)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def serve():
    servers = []

    def start(handler, folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def memory():
    """Shards in fsspec's in-memory filesystem, as a stand-in for a bucket."""
    filesystem = fsspec.filesystem("memory")
    for name in NAMES:
        with filesystem.open(f"/pairs/{name}", "wb") as file:
            file.write((TRAIN / name).read_bytes())
    yield "memory://pairs"
    filesystem.rm("/pairs", recursive=True)


def batches(shards, **options):
    settings = {"resolution": 32, "batch_size": 8, "num_workers": 0, "shuffle_window": 16}
    data = PreferenceDataModule(shards, **{**settings, **options})
    data.setup("fit")
    return list(data.train_dataloader())


def assert_same(first, second):
    assert [batch.pairs.numbers for batch in first] == [batch.pairs.numbers for batch in second]
    assert all(torch.equal(a.chosen, b.chosen) for a, b in zip(first, second, strict=True))
    assert all(a.prompts == b.prompts for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def local():
    found = batches([str(TRAIN / name) for name in NAMES])
    assert len(found) == 6
    return found


@pytest.mark.parametrize("handler", [Ranges, Whole])
def test_web_servers(serve, local, handler):
    address = serve(handler, TRAIN)
    assert_same(batches(f"{address}/0000{{0..1}}.tar"), local)
    if handler is Ranges:
        assert_same(batches(f"{address}/0000{{0..1}}.tar", num_workers=2), local)  # fsspec's loop survives the fork


def test_faults_that_pass_cost_time_alone(serve, local, tmp_path, slept):
    """Of the first HEAD too: it decides whether there is an index, against whose digests pairs are checked."""
    for name in NAMES:
        shutil.copy(TRAIN / name, tmp_path)
        index_shard(str(tmp_path / name))
    address = serve(Flaky, tmp_path)
    data = PreferenceDataModule(f"{address}/0000{{0..1}}.tar", resolution=32, batch_size=8, num_workers=0)
    data.shuffle_window = 16
    data.setup("fit")
    assert [shard.content_known_from for shard in data.train.shards] == ["index", "index"]
    assert_same(list(data.train_dataloader()), local)
    assert 7 in slept
    assert len(slept) >= 4
    Flaky.faults = {"/00000.tar": [503] * 20}
    with pytest.raises(SampleError, match=r"HTTP status 503 .* at 7 attempts"):
        batches(f"{address}/00000.tar")


def test_only_what_a_server_calls_missing_is_missing(serve, tmp_path, slept):
    shutil.copy(TRAIN / NAMES[0], tmp_path)
    address = serve(Flaky, tmp_path)
    Flaky.faults = {f"/{name}": [] for name in ("00000.tar", "00000.index.parquet", "other.tar")}
    assert find_shards(f"{address}/00000.tar", ReadOptions())[0].rows is None
    with pytest.raises(FileNotFoundError):
        open_binary(f"{address}/other.tar")
    Flaky.lasting = {f"/{name}": 403 for name in ("00000.index.parquet", "other.tar")}
    with pytest.raises(OSError, match=r"cannot be found out .*HTTP status 403 .*import webdataset --shards"):
        find_shards(f"{address}/00000.tar", ReadOptions())
    with pytest.raises(OSError, match=r"403.*other\.tar") as refused:
        open_binary(f"{address}/other.tar")
    assert not isinstance(refused.value, FileNotFoundError)
    assert slept == []


def test_labels_of_a_remote_shard_are_read_once(serve, tmp_path, scans):
    """The next start, and every other rank, take the scan that was kept, until the shard has changed."""
    shutil.copy(TRAIN / NAMES[0], tmp_path)
    files = find_shards(f"{serve(Ranges, tmp_path)}/00000.tar", ReadOptions())
    found = []
    for changed in (False, False, True):
        if changed:
            shutil.copy(TRAIN / NAMES[1], tmp_path / NAMES[0])
            os.utime(tmp_path / NAMES[0], (10**9, 10**9))
        Ranges.requests.clear()
        (shard,) = scan_shards(files, HumanLabels(), ReadOptions())
        found.append((len(Ranges.requests) > 0, shard.pairs.key.tolist()))
    assert [asked for asked, _ in found] == [True, False, True]
    assert found[0][1] == found[1][1] != found[2][1]
    for kept in scans.glob("*.parquet"):
        kept.write_bytes(b"damaged")
    (again,) = scan_shards(files, HumanLabels(), ReadOptions())
    assert again.pairs.key.tolist() == found[2][1]


@pytest.mark.parametrize("place", ["no folder", "full disk"])
def test_a_scan_that_cannot_be_kept_is_used(serve, scans, monkeypatch, place):
    """As where the quota of a home is used up."""
    if place == "no folder":
        scans.write_text("a file")
    else:
        monkeypatch.setattr(kept_scans, "_write", lambda path, table: (_ for _ in ()).throw(OSError(28, "full")))
    files = find_shards(f"{serve(Ranges, TRAIN)}/{NAMES[0]}", ReadOptions())
    (shard,) = scan_shards([file._replace(rows=None) for file in files], HumanLabels(), ReadOptions())
    assert len(shard) == 26


def test_scans_that_nobody_uses_go(serve, scans):
    scans.mkdir()
    for name, seconds in (("old.parquet", 0), ("new.parquet", time.time())):
        (scans / name).write_bytes(b"")
        os.utime(scans / name, (seconds, seconds))
    kept_scans._forget_old.cache_clear()
    files = find_shards(f"{serve(Ranges, TRAIN)}/{NAMES[0]}", ReadOptions())
    scan_shards([file._replace(rows=None) for file in files], HumanLabels(), ReadOptions())
    names = {path.name for path in scans.iterdir()}
    assert names > {"new.parquet"}
    assert len(names - {"old.parquet"}) == len(names) == 2


@pytest.mark.parametrize("kind", ["web", "pipe"])
def test_a_shard_is_fetched_once_for_all_workers(serve, local, copies, tmp_path, monkeypatch, kind):
    """The window of 52 pairs reads at random from both shards."""
    if kind == "web":
        Whole.whole.clear()
        names = [f"{serve(Whole, TRAIN)}/{name}" for name in NAMES]
    else:
        names = [f"pipe:echo {name} >> {tmp_path}/fetched; cat {TRAIN / name}" for name in NAMES]
    for _ in range(2):
        found = batches(names, num_workers=2, shuffle_window=52, batch_size=2, allow_pipe=True)
        assert sum(len(batch.prompts) for batch in found) == 52
    fetched = Whole.whole if kind == "web" else (tmp_path / "fetched").read_text().split()
    assert sorted(fetched) == [name if kind == "pipe" else f"/{name}" for name in NAMES]


def test_a_copy_may_take_longer_than_a_request(serve, copies, monkeypatch):
    """Of five minutes, which aiohttp allows: a large shard from a slow server would never come."""

    class Slow(Whole):
        def copyfile(self, source, outputfile):
            for _ in range(4):
                outputfile.write(source.read(1000))
                time.sleep(0.1)
            super().copyfile(source, outputfile)

    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.25))
    with spooled.spool(f"{serve(Slow, TRAIN)}/{NAMES[0]}") as file:
        assert file.read() == (TRAIN / NAMES[0]).read_bytes()


def test_copies_are_bounded(copies, monkeypatch):
    """The one that was not used for longest goes, and is fetched again where it is wanted."""
    tars = sorted(TRAIN.glob("*.tar"))[:3]
    urls = [spooled.trust(f"pipe:cat {tar}") for tar in tars]
    monkeypatch.setattr(spooled, "LIMIT", tars[0].stat().st_size + tars[1].stat().st_size + tars[2].stat().st_size - 1)
    for url in (*urls[:2], urls[0], urls[2], urls[1]):  # the last one takes the place of the first
        with spooled.spool(url) as file:
            assert file.read() == tars[urls.index(url)].read_bytes()
        time.sleep(0.01)
    (folder,) = copies.iterdir()
    held = {path.read_bytes() for path in folder.iterdir() if path.name != spooled.HELD}
    assert held == {tars[1].read_bytes(), tars[2].read_bytes()}


def test_copies_of_a_killed_process_are_deleted(copies, monkeypatch):
    killed, alive = copies / f"{spooled.PREFIX}killed", spooled.share_copies()
    killed.mkdir()
    (killed / spooled.HELD).touch()
    monkeypatch.delenv(spooled.FOLDER)
    assert spooled.share_copies() != alive
    assert (killed.exists(), alive.exists()) == (False, True)


@pytest.mark.parametrize("pattern", ["memory://pairs/0000{0..1}.tar", "memory://pairs/*.tar"])
def test_filesystems_behind_fsspec(memory, local, pattern):
    assert_same(batches(pattern), local)


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "{}"])
def test_local_addresses(local, form):
    assert_same(batches(form.format(TRAIN / "0000{0..1}.tar")), local)


def test_pipes_run_only_where_they_are_turned_on(local, tmp_path):
    pipes = [f"pipe:cat {TRAIN / name}" for name in NAMES]
    with pytest.raises(ValueError, match=r"would run a shell command.*data\.allow_pipe"):
        batches(f"pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()
    assert_same(batches(pipes, allow_pipe=True), local)
    with pytest.raises(SampleError, match="ended with status 3"):
        batches("pipe:exit 3", allow_pipe=True)


def test_an_index_cannot_run_a_pipe(tmp_path):
    index_shard(str(TRAIN / NAMES[0]), str(tmp_path))
    entry = read_entry(str(TRAIN / NAMES[0]), str(tmp_path))
    write_index(str(tmp_path), [entry._replace(name=f"pipe:touch {tmp_path}/ran; cat {TRAIN / NAMES[0]}")])
    with pytest.raises(ValueError, match="would run a shell command"):
        batches(f"{tmp_path}/index.json")
    with pytest.raises(SampleError, match="would run a shell command"):
        list(read_samples(f"pipe:touch {tmp_path}/ran"))
    assert not (tmp_path / "ran").exists()


def test_an_index_elsewhere_names_remote_shards(serve, tmp_path, local):
    """At the start only the shards' sizes are requested; training then reads single samples."""
    address = serve(Ranges, TRAIN)
    shards = [f"{address}/{name}" for name in NAMES]
    write_index(str(tmp_path), [index_shard(shard, str(tmp_path)) for shard in shards])
    Ranges.requests.clear()
    data = PreferenceDataModule(f"{tmp_path}/index.json", resolution=32, batch_size=8, num_workers=0, shuffle_window=16)
    data.setup("fit")
    assert [path for path, _ in Ranges.requests] == []  # HEAD alone
    loader = data.train_dataloader()
    assert_same(list(loader), local)
    asked = [wanted for _, wanted in Ranges.requests if wanted != "bytes=0-1"]
    assert len(asked) == 48


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("https://example.org/*.tar", ValueError, "cannot be asked for wildcards"),
        ("memory://nothing/*.tar", FileNotFoundError, "matches no file"),
        ("s3://bucket/a.tar", ModuleNotFoundError, "lit-align's extra s3"),
    ],
)
def test_addresses_that_cannot_work(pattern, error, message):
    with pytest.raises(error, match=message):
        batches(pattern)


def test_parts_of_a_file(memory):
    path, data = str(TRAIN / NAMES[0]), (TRAIN / NAMES[0]).read_bytes()
    for address in (path, f"{memory}/{NAMES[0]}"):
        assert size(address) == len(data)
        assert read_range(address, 1000, 50) == data[1000:1050]
        assert read_range(address, len(data) - 5, 50) == data[-5:]
        with open_binary(address, timeout=5) as file:
            file.seek(700)
            assert file.read(30) == data[700:730]
            assert file.tell() == 730
    assert expand(f"{TRAIN}/0000{{0..1}}.tar") == [str(TRAIN / name) for name in NAMES]


def test_a_read_that_hangs_is_given_up(tmp_path):
    """Reading a named pipe without a writer hangs, as a dead network drive does."""
    fifo = tmp_path / "hangs.tar"
    os.mkfifo(fifo)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.2 s"):
        open_binary(str(fifo), timeout=0.2)
    good = str(TRAIN / NAMES[0])
    with pytest.raises(SampleError, match=r"hangs\.tar cannot be read: no answer in 0\.2 s"):
        batches([good, str(fifo)], read_timeout=0.2)
    skipped = batches([good, str(fifo)], read_timeout=0.2, on_error="skip")
    assert len(skipped) == 3
    assert time.monotonic() - begin < 10


def test_a_shard_that_hangs_while_training(tmp_path):
    shard = tmp_path / "a.tar"
    shard.write_bytes((TRAIN / NAMES[0]).read_bytes())
    data = PreferenceDataModule(
        str(shard), resolution=32, batch_size=2, num_workers=0, read_timeout=0.1, on_error="skip", skip_limit=3
    )
    data.setup("fit")
    shard.unlink()
    os.mkfifo(shard)
    stream = iter(data.train_dataloader())
    batch = data.on_before_batch_transfer(next(stream), 0)
    assert batch.pairs.weight.tolist() == [0, 0]
    assert all("no answer in 0.1 s" in fault for fault in batch.pairs.faults)
    with pytest.raises(SampleError, match=r"4 broken samples, more than data\.skip_limit 3 allows"):
        data.on_before_batch_transfer(next(stream), 0)


def test_errors_of_other_kinds_become_os_errors():
    with pytest.raises(OSError, match="ZeroDivisionError"):
        within(None, "x", lambda: 1 / 0)
    with pytest.raises(OSError, match="ZeroDivisionError"):
        within(1.0, "x", lambda: 1 / 0)
    assert within(1.0, "x", lambda: 5) == 5


def test_a_missing_shard_stops_or_is_counted(tmp_path, caplog):
    shard = tmp_path / "00000.tar"
    shard.write_bytes((TRAIN / NAMES[0]).read_bytes())
    pattern = f"{tmp_path}/0000{{0..1}}.tar"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*00001\.tar"):
        batches(pattern)
    assert len(batches(pattern, on_error="skip")) == 3
    assert f"Skipped: shard {tmp_path}/00001.tar" in caplog.text
    assert "00001.tar cannot be read" in caplog.text
    with pytest.raises(SampleError, match=r"data\.train_shards: 1 broken samples, more than data\.skip_limit 0"):
        batches(pattern, on_error="skip", skip_limit=0)


def test_a_shard_that_differs_from_its_index_is_refused(tmp_path):
    shard = tmp_path / "00000.tar"
    shard.write_bytes((TRAIN / NAMES[0]).read_bytes())
    index_shard(str(shard))
    assert len(batches(str(shard))) == 3
    shard.write_bytes((TRAIN / NAMES[1]).read_bytes() + bytes(10240))
    with pytest.raises(SampleError, match=r"has \d+ bytes, and its index .* knows \d+: it has changed"):
        batches(str(shard))
    shard.unlink()
    with pytest.raises(ValueError, match="no pair with a preference in 1 shards"):
        batches(str(shard), on_error="skip")


def test_a_shard_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"00000\.tar is named twice"):
        batches([str(TRAIN / NAMES[0]), f"{TRAIN}/*.tar"])
