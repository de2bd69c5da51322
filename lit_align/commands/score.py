"""`lit-align score`: the scores of all pairs of all shards, once, in side files beside them."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from lit_align.commands.agreement import report_agreement
from lit_align.data.images import decode
from lit_align.data.samples import RawPair, SampleError, parse_sample, read_samples
from lit_align.data.scores import Identity, Scores, content_digest, read_scores, side_file, side_files, write_scores
from lit_align.data.shards import OnError, expand
from lit_align.scoring.base import Scorer
from lit_align.scoring.presets import load_scorers

log = logging.getLogger(__name__)


class LoadedScorer(NamedTuple):
    """A scorer and who it is."""

    scorer: Scorer
    identity: Identity


def score(
    shards: str | list[str],
    scorers: str,
    presets: Path | None = None,
    output: str | None = None,
    batch_size: int = 16,
    on_error: OnError = "raise",
    overwrite: bool = False,
    report: bool = False,
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
) -> None:
    """Score both images of every pair, and write one side file per shard; a killed run goes on where it stopped.

    Under torchrun or SLURM, or with more than one device, the processes share the shards.

    Args:
        shards: tar files; braces `{000..127}` and wildcards `*` are expanded.
        scorers: names, separated by commas.
        presets: YAML file that says what the names are; none: the one of lit-align.
        output: folder of the side files; none: beside the shards.
        batch_size: pairs that are scored at a time.
        on_error: `raise` on a broken sample, or `skip` it: it is named, counted and gets no score.
        overwrite: replace scores by other weights, or of other images, instead of refusing to.
        report: print and save how far the scorers agree with the human label and with each other.
        accelerator: `auto`, `cpu` or `gpu`.
        devices: per node: a number, or `auto` for all.
        num_nodes: of the SLURM job or of torchrun.

    Raises:
        SampleError: on a broken sample, if it is not to be skipped.
        ValueError: if a side file holds scores by other weights and is not to be overwritten.
    """
    paths, names = expand(shards), [name.strip() for name in scorers.split(",") if name.strip()]
    side_files(paths, output)  # refuses shards that would share one
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes)
    fabric.launch()
    loaded = load_scorers(names, presets)
    known = {name: Identity(scorer.version, scorer.fingerprint()) for name, scorer in loaded.items()}
    mine = paths[fabric.global_rank :: fabric.world_size]
    todo = list(_unfinished(mine, output, known, overwrite))
    prepared = {name: LoadedScorer(loaded[name].prepare(fabric.device), known[name]) for name in names}
    pairs = sum(task.pairs for task in todo)
    who = f"process {fabric.global_rank + 1} of {fabric.world_size}, {fabric.device}: "
    skipped = 0
    with tqdm(total=pairs, desc="scoring", unit="pair", disable=fabric.global_rank > 0) as bar:  # the first's share
        for task in todo:
            skipped += _score_shard(task, prepared, output, batch_size, on_error, bar)
    print(f"{who}scored {len(todo)} shards, {len(mine) - len(todo)} were done before, skipped {skipped} samples")
    fabric.barrier()
    if report and fabric.is_global_zero:
        report_agreement(paths, output, names, on_error)


class Task(NamedTuple):
    """A shard and the scorers that it lacks."""

    shard: str
    pairs: int
    missing: list[str]


def _unfinished(
    shards: Sequence[str], output: str | None, known: dict[str, Identity], overwrite: bool
) -> Iterator[Task]:
    """What is left to do. Keys are compared, and the images too where scores may be overwritten."""
    for shard in tqdm(shards, desc="looking for scores", unit="shard", disable=len(shards) < 20 or None):
        found = read_scores(side_file(shard, output))
        for name, identity in known.items():
            if name in found and found[name].identity != identity and not overwrite:
                raise ValueError(
                    f"{side_file(shard, output)} has scores by {name!r}, {found[name].identity}, and now it is "
                    f"{identity}. Give it another name in the presets, or replace them with --overwrite true."
                )
        keys = [sample["__key__"] for sample in read_samples(shard, with_images=False)]
        contents = _contents(shard) if overwrite and found else None
        missing = [name for name in known if not _complete(found.get(name), known[name], keys, contents)]
        if missing:
            yield Task(shard, len(keys), missing)


def _contents(shard: str) -> dict[str, str]:
    """Digests of a shard's pairs by key; broken ones have none."""
    contents = {}
    for sample in read_samples(shard):
        with suppress(SampleError):
            contents[sample["__key__"]] = content_digest(parse_sample(sample))
    return contents


def _complete(scores: Scores | None, identity: Identity, keys: list[str], contents: dict[str, str] | None) -> bool:
    if scores is None or scores.identity != identity or scores.keys != keys:
        return False
    return contents is None or dict(zip(scores.keys, scores.contents, strict=True)) == contents


def _score_shard(
    task: Task,
    scorers: dict[str, LoadedScorer],
    output: str | None,
    batch_size: int,
    on_error: OnError,
    bar: "tqdm[NoReturn]",
) -> int:
    """Score a shard and write its side file; returns how many samples were skipped."""
    keys: list[str] = []
    contents: list[str] = []
    values: dict[str, list[Tensor]] = {name: [] for name in task.missing}  # of (2, batch)
    for batch in _batches(task.shard, batch_size, on_error):
        images = [pixels for _, both in batch for pixels in both]
        prompts = [pair.prompt for pair, _ in batch for _ in (0, 1)]
        for name in task.missing:
            values[name].append(scorers[name].scorer.score(images, prompts).view(-1, 2).T)
        keys += [pair.key for pair, _ in batch]
        contents += [content_digest(pair) for pair, _ in batch]
        bar.update(len(batch))
    new = {}
    for name, parts in values.items():
        score_0, score_1 = torch.cat([torch.zeros(2, 0), *parts], 1)
        new[name] = Scores(scorers[name].identity, keys, contents, score_0, score_1)
    path = side_file(task.shard, output)
    write_scores(path, read_scores(path) | new)
    bar.update(task.pairs - len(keys))
    return task.pairs - len(keys)


DecodedPair = tuple[RawPair, tuple[Tensor, Tensor]]  # with its images (3, height, width) uint8, each of its own size


def _batches(shard: str, batch_size: int, on_error: OnError) -> Iterator[list[DecodedPair]]:
    """A shard's readable pairs, decoded by threads one batch ahead of the scorers."""
    with ThreadPoolExecutor() as pool:
        ahead: list[tuple[RawPair, Future[tuple[Tensor, Tensor]]]] = []
        pairs = _pairs(shard, on_error)
        while True:
            now, ahead = ahead, [(pair, pool.submit(_pixels, pair)) for pair in itertools.islice(pairs, batch_size)]
            batch = [(pair, images) for pair, future in now if (images := _result(future, on_error)) is not None]
            if batch:
                yield batch
            if not ahead:
                return


def _pairs(shard: str, on_error: OnError) -> Iterator[RawPair]:
    for sample in read_samples(shard):
        try:
            yield parse_sample(sample)
        except SampleError as error:
            _skip(error, on_error)


def _pixels(pair: RawPair) -> tuple[Tensor, Tensor]:
    try:
        first, second = (np.array(decode(data)) for data in (pair.image_0, pair.image_1))
    except (OSError, ValueError, SyntaxError) as error:
        raise SampleError(f"{pair.place}: an image cannot be decoded: {error}") from error
    return torch.from_numpy(first).permute(2, 0, 1), torch.from_numpy(second).permute(2, 0, 1)


def _result(future: "Future[tuple[Tensor, Tensor]]", on_error: OnError) -> tuple[Tensor, Tensor] | None:
    try:
        return future.result()
    except SampleError as error:
        _skip(error, on_error)
        return None


def _skip(error: SampleError, on_error: OnError) -> None:
    if on_error == "raise":
        raise error
    log.warning("Skipped: %s", error)
