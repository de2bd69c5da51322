"""Measure what start, order, memory and resume cost as the number of pairs grows.

python benchmarks/scale.py --out DIR [--shards 10 100 1000 10000] [--pairs 1000] [--modes labels buckets vote]

Synthetic shards have an index as an import writes it, and scores as `lit-align score` does; the tar files themselves
are sparse, for no image is read. A fresh process starts the data module on them, and another one resumes it at the
middle of its first epoch. Times are CPU seconds, which other programs disturb little. Linux only.
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.accelerator_record import Facts, Record
from lit_align.data import PreferenceDataModule
from lit_align.data.labels.score_files import SCHEMA, side_file
from lit_align.data.shards.index import FORMAT, INDEX, ROWS, SIZES, read_entry, rows_path, write_index
from lit_align.scoring.vote import Vote

SAMPLE_BYTES = 200 * 1024  # of a pair in its shard
SIDES = (512, 768, 1024)  # of the images, pixels
VOTERS = ("clip", "pickscore")
ADDRESSED = 1_000_000  # pairs at most whose addresses are asked for
MODES: dict[str, dict[str, Any]] = {
    "labels": {},
    "buckets": {"aspect_buckets": True},
    "vote": {"vote": Vote(list(VOTERS), ties="human")},
}


def write_shards(folder: Path, shards: int, pairs: int) -> None:
    """Write shards of `pairs` pairs each, 1 % of them ties: index, scores, and tar files that hold nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.tar" for number in range(shards)]
    for number, path in enumerate(tqdm(paths, desc="writing", unit="shard", leave=False, disable=None)):
        rng = np.random.default_rng(number)
        rows = _rows(number, pairs, rng)
        with path.open("wb") as file:
            file.truncate(SAMPLE_BYTES * pairs)
        about = {"format": str(FORMAT), "bytes": str(SAMPLE_BYTES * pairs), "sha256": "0" * 64}
        pq.write_table(rows.replace_schema_metadata(about), rows_path(str(path)), compression="zstd")
        pq.write_table(_scores(rows, rng), side_file(str(path)), compression="zstd")
    write_index(str(folder), [entry for path in paths if (entry := read_entry(str(path))) is not None])


def _rows(shard: int, pairs: int, rng: np.random.Generator) -> pa.Table:
    """The index rows of a shard (pairs, columns)."""
    keys = [f"{shard * pairs + row:09d}" for row in range(pairs)]
    labels = rng.choice([0.0, 0.5, 1.0], pairs, p=[0.495, 0.01, 0.495])
    columns: dict[str, Any] = {"key": keys, "offset": np.arange(pairs) * SAMPLE_BYTES, "label_0": labels}
    columns |= {"size": np.full(pairs, SAMPLE_BYTES), **{name: rng.choice(SIDES, pairs) for name in SIZES}}
    columns["prompt"] = [f"a photograph of number {key}, with soft light and much detail, 35 mm" for key in keys]
    columns |= {"content": [f"{digest:016x}" for digest in rng.integers(1, 2**63, pairs).tolist()]}
    columns["fault"] = [None] * pairs
    return pa.table([pa.array(columns[field.name], field.type) for field in ROWS], ROWS)


def _scores(rows: pa.Table, rng: np.random.Generator) -> pa.Table:
    """Scores of a shard's pairs by all voters (voters * pairs, columns)."""
    count = len(rows) * len(VOTERS)
    columns: dict[str, Any] = {"key": rows["key"].to_pylist() * len(VOTERS), "version": np.full(count, 1)}
    columns |= {"scorer": [name for name in VOTERS for _ in range(len(rows))], "fingerprint": ["f" * 16] * count}
    columns |= {"content": rows["content"].to_pylist() * len(VOTERS)}
    columns |= {name: rng.normal(20, 2, count) for name in ("score_0", "score_1")}
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], SCHEMA)


class Meter:
    """CPU seconds, seconds and main memory of this process.

    Args:
        facts: receives what is measured.
    """

    def __init__(self, facts: Facts) -> None:
        gc.collect()
        self.facts, self.before = facts, _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's peak back to what is in use now

    @contextmanager
    def time(self, name: str, wall: bool = False) -> Iterator[None]:
        """Record what the block takes."""
        began, wall_began = time.process_time(), time.monotonic()
        yield
        self.facts[f"{name}, CPU s"] = time.process_time() - began
        self.facts |= {f"{name}, s": time.monotonic() - wall_began} if wall else {}

    def memory(self, pairs: int) -> None:
        """Record the memory since the beginning, at its peak and now."""
        gc.collect()
        peak, kept = (_status(name) - self.before for name in ("VmHWM", "VmRSS"))
        self.facts |= {"peak MB": peak / 1e6, "kept MB": kept / 1e6, "peak bytes a pair": peak / pairs}


def _status(name: str) -> int:
    """A number of bytes from the kernel's status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(folder: Path, mode: str, resumes: bool) -> Facts:
    """Start the data module in this process, or resume it at the middle of an epoch, and read no pair.

    Args:
        folder: of the shards; the state of a start is kept there for the resume.
        mode: a name of `MODES`.
        resumes: whether the data module resumes.
    """
    facts: Facts = {}
    kept, meter = folder / f"state-{mode}.json", Meter(facts)
    with meter.time("set-up", wall=True):
        data = PreferenceDataModule(str(folder / INDEX), batch_size=8, num_workers=0, **MODES[mode])
        data.setup("fit")
    if resumes:
        data.load_state_dict(json.loads(kept.read_text()))
    with meter.time("digests"):
        loader = data.train_dataloader()
    order = loader.order
    sampler: Any = loader.loader.sampler
    if resumes:
        sampler.position = lambda: (0, order.batches // 2)  # where the Trainer's counters would be
    with meter.time("first address"):
        batches = iter(sampler)
        first = next(batches)
        order.where(first.numbers[0])
    addresses = (order.where(n) for batch in chain([first], batches) for n in batch.numbers)
    with meter.time("addresses"):
        asked = sum(1 for _ in islice(addresses, ADDRESSED))
    facts["addresses, CPU us a pair"] = facts.pop("addresses, CPU s") / asked * 1e6
    with meter.time("state"):
        state = json.dumps(data.state_dict())
    meter.memory(order.pairs)
    kept.write_text(state)
    return {"pairs": order.pairs, **facts, "state bytes": len(state)}


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `work` from a process of its own, which has nothing but the imports of this one."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    """Measure all sizes, and write `results.json` and `results.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100, 1000, 10000], help="numbers of shards")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of a shard (default: 1000)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="what decides and groups pairs")
    parser.add_argument("--minutes", type=float, default=120, help="what no time is left for is skipped (default: 120)")
    parser.add_argument("--work", type=Path, help="folder where shards are kept, and used again; else a temporary one")
    arguments = parser.parse_args()
    command = f"python benchmarks/scale.py {' '.join(sys.argv[1:])}"
    about = {"command": command, "python": platform.python_version(), "pairs a shard": arguments.pairs}
    record = Record(arguments.out, about, 60 * arguments.minutes)
    with tempfile.TemporaryDirectory(prefix="lit-align-scale-") as temporary:
        for shards in arguments.shards:
            folder = (arguments.work or Path(temporary)) / f"{shards}x{arguments.pairs}"
            if not (folder / INDEX).is_file():
                in_fresh_process(write_shards, folder, shards, arguments.pairs)
            for mode in arguments.modes:
                for how in ("start", "resume"):
                    run = partial(in_fresh_process, measure, folder, mode, how == "resume")
                    record.measure(f"{mode}: {how}", f"{shards:,} shards", run)


if __name__ == "__main__":
    main()
