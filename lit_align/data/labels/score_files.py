"""Side files: stored scores of a shard's pairs, so that voting needs no scorer.

`00000.tar` has `00000.scores.parquet` beside it or in another folder, with one row per pair and scorer.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, tensor

from lit_align.common.files import atomic_path
from lit_align.data.shards.filesystems import is_url
from lit_align.user_errors import UserValueError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # of the sample
        ("scorer", pa.string()),  # name
        ("version", pa.int32()),  # of the scorer's code
        ("fingerprint", pa.string()),  # of the scorer's weights and settings
        ("content", pa.string()),  # `content_digest` of what was scored
        ("score_0", pa.float32()),
        ("score_1", pa.float32()),
    ]
)
IDENTITY = ("version", "fingerprint")
SIDES = ("score_0", "score_1")


class Identity(NamedTuple):
    """Version of a scorer's code and fingerprint of its weights."""

    version: int
    fingerprint: str

    def __str__(self) -> str:
        return f"version {self.version}, weights {self.fingerprint}"


class Scores(NamedTuple):
    """Scores of a shard by one scorer, in the shard's order; NaN for skipped samples."""

    identity: Identity
    keys: list[str]
    contents: list[str]
    score_0: Tensor  # (pairs,) float32
    score_1: Tensor  # (pairs,)

    @property
    def finite(self) -> Tensor:
        """(pairs,) whether both images have a score."""
        return self.score_0.isfinite() & self.score_1.isfinite()

    def rows(self) -> dict[str, int]:
        """Positions of the scored pairs, by key."""
        scored = self.finite.tolist()
        return {key: row for row, (key, finite) in enumerate(zip(self.keys, scored, strict=True)) if finite}


def side_file(shard: str, folder: str | None = None) -> Path:
    """Path of a shard's scores, in `folder` or beside the shard.

    Raises:
        ValueError: if the shard is not a local file, and no folder is given.
    """
    if folder is None and is_url(shard):
        raise UserValueError(f"Scores of {shard} cannot lie beside it. Name a local folder for them.")
    path = Path(shard)
    return (path.parent if folder is None else Path(folder)) / f"{path.stem}.scores.parquet"


def side_files(shards: Sequence[str], folder: str | None) -> list[Path]:
    """Paths of the shards' scores.

    Raises:
        ValueError: if two shards would share a side file.
    """
    paths = [side_file(shard, folder) for shard in shards]
    first: dict[Path, str] = {}
    for shard, path in zip(shards, paths, strict=True):
        if first.setdefault(path, shard) != shard:
            raise UserValueError(
                f"{first[path]} and {shard} would share the scores in {path}. Keep scores beside the shards, or give "
                "shards of equal names a folder each."
            )
    return paths


def read_scores(path: Path) -> dict[str, Scores]:
    """Read a side file's scores, by scorer; empty if there is no file.

    Raises:
        ValueError: if the file cannot be read, or has a pair twice.
    """
    if not path.is_file():
        return {}
    table = _read_table(path)
    scores: dict[str, Scores] = {}
    for scorer in table["scorer"].unique().to_pylist():
        rows = table.filter(pa.compute.equal(table["scorer"], scorer))
        identities, keys = _identities(rows), rows["key"].to_pylist()
        if len(identities) != 1 or len(set(keys)) != len(keys):
            raise UserValueError(f"{path} has scores by {scorer!r} twice. Delete it and score the shard again.")
        score_0, score_1 = (tensor(rows[side].to_numpy()) for side in SIDES)
        scores[scorer] = Scores(identities.pop(), keys, rows["content"].to_pylist(), score_0, score_1)
    return scores


def _identities(rows: pa.Table) -> set[Identity]:
    values = [rows[name].unique().to_pylist() for name in IDENTITY]
    if all(len(value) == 1 for value in values):
        return {Identity(*(value[0] for value in values))}
    return {Identity(*both) for both in zip(*(rows[name].to_pylist() for name in IDENTITY), strict=True)}


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserValueError(
            f"{path} cannot be read as Parquet: {error}. Delete it and score the shard again."
        ) from error
    if not table.schema.equals(SCHEMA):
        raise UserValueError(f"{path} has other columns than scores have: {table.schema.names}. Move it away.")
    return table


def write_scores(path: Path, scores: dict[str, Scores]) -> None:
    """Write a side file, atomically."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for scorer, values in scores.items():
        count = len(values.keys)
        columns["key"] += values.keys
        columns["scorer"] += [scorer] * count
        columns["version"] += [values.identity.version] * count
        columns["fingerprint"] += [values.identity.fingerprint] * count
        columns["content"] += values.contents
        columns["score_0"] += values.score_0.tolist()
        columns["score_1"] += values.score_1.tolist()
    with atomic_path(path) as part:
        pq.write_table(pa.table(columns, SCHEMA), part, compression="zstd")


class Survey(NamedTuple):
    """Summary of one scorer's scores in all side files of a dataset."""

    identity: Identity
    scale: float  # standard deviation of all its scores
    missing: frozenset[str]  # shards without its scores


class _Sums(NamedTuple):
    """Sums of one scorer's scores in one side file."""

    identities: set[Identity]
    finite: int  # number of finite scores
    total: float
    squares: float


def survey(shards: Sequence[str], folder: str | None, scorers: Iterable[str]) -> dict[str, Survey]:
    """Read the side files of all shards, and return a summary for each scorer.

    Raises:
        ValueError: if a scorer has no scores at all, shards were scored by different weights, or two shards would share
            a side file.
    """
    names = list(scorers)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda path: _sums(path, names), side_files(shards, folder)))
    return {name: _survey(name, dict(zip(shards, (file.get(name) for file in files), strict=True))) for name in names}


def _sums(path: Path, names: Sequence[str]) -> dict[str, _Sums]:
    if not path.is_file():
        return {}
    table = _read_table(path)
    found = {}
    for name in names:
        rows = table.filter(pa.compute.equal(table["scorer"], name))
        if len(rows):
            values = tensor(np.stack([rows[side].to_numpy() for side in SIDES])).double()
            values = values[values.isfinite()]
            found[name] = _Sums(_identities(rows), len(values), values.sum().item(), values.square().sum().item())
    return found


def _survey(name: str, by_shard: dict[str, _Sums | None]) -> Survey:
    found = {shard: sums for shard, sums in by_shard.items() if sums is not None}
    if not found:
        raise UserValueError(
            f"There are no scores by {name!r} for {next(iter(by_shard))} and {len(by_shard) - 1} other shards. "
            f"Run: lit-align score --shards ... --scorers {name}, or set data.scorers to score while training."
        )
    first = next(iter(found))
    for other, sums in found.items():
        if sums.identities != found[first].identities or len(sums.identities) > 1:
            here, there = (" and ".join(map(str, found[shard].identities)) for shard in (first, other))
            raise UserValueError(
                f"Scores by {name!r} are stale: {first} has {here}, {other} has {there}. "
                "Run lit-align score on these shards, with the same options and --overwrite."
            )
    count = max(sum(sums.finite for sums in found.values()), 1)
    mean = sum(sums.total for sums in found.values()) / count
    variance = sum(sums.squares for sums in found.values()) / count - mean * mean
    missing = frozenset(shard for shard, sums in by_shard.items() if sums is None)
    return Survey(next(iter(found[first].identities)), max(variance, 1e-24) ** 0.5, missing)
