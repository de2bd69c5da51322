"""Which shards there are and how many pairs each one holds."""

import glob
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import braceexpand
from tqdm import tqdm

from lit_align.data.labels import Labels, human_sign
from lit_align.data.samples import SampleError, parse_sample, read_samples

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]


class Shard(NamedTuple):
    """A tar file and what a look at its labels found."""

    path: str
    pairs: int  # that train: they are numbered 0 to pairs - 1 in the tar's order
    ties: int  # left out because nobody decided them
    broken: int  # left out because of a missing field, a wrong label or a missing score
    contested: int = 0  # of `pairs`, those that a tie rule decided
    disputed: int = 0  # of `pairs`, those whose vote contradicts the human label


def expand(shards: str | Sequence[str]) -> list[str]:
    """Paths from paths, braces (`{000..127}.tar`) and wildcards (`*.tar`), each pattern's matches sorted.

    Raises:
        FileNotFoundError: if a pattern matches nothing.
    """
    paths: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for path in braceexpand.braceexpand(pattern):
            found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * os.path.isfile(path)
            if not found:
                raise FileNotFoundError(
                    f"{pattern!r}: there is no file {path!r} (working directory {os.getcwd()}). "
                    "Shards are local tar files; braces {000..127} and wildcards * are expanded."
                )
            paths += found
    return paths


def scan(paths: Sequence[str], labels: Labels, on_error: OnError, threads: int = 8) -> list[Shard]:
    """Count the pairs of all shards by their labels, without reading images.

    Raises:
        SampleError: on the first broken sample, if `on_error` is `raise`.
    """
    with ThreadPoolExecutor(threads) as pool:
        scanned = pool.map(lambda path: _scan_shard(path, labels, on_error), paths)
        few = len(paths) < 20
        return list(tqdm(scanned, total=len(paths), desc="reading labels", unit="shard", disable=few or None))


def _scan_shard(path: str, labels: Labels, on_error: OnError) -> Shard:
    decide = labels.of_shard(path)
    pairs = ties = broken = contested = disputed = 0
    for sample in read_samples(path, with_images=False):
        try:
            pair = parse_sample(sample)
            decision = decide(pair)
        except SampleError as error:
            if on_error == "raise":
                raise
            log.warning("Skipped: %s", error)
            broken += 1
            continue
        if decision.sign == 0 and not labels.keep_undecided:
            ties += 1
            continue
        pairs += 1
        contested += labels.voted and decision.strength == 0
        disputed += decision.sign * human_sign(pair) < 0
    return Shard(path, pairs, ties, broken, contested, disputed)
