"""`lit-align score`: the scores of all pairs of all shards, once, in side files beside them."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.commands.score.agreement import report_agreement, require_matplotlib
from lit_align.commands.shared.process_group import join_process_group
from lit_align.common.decode_ahead import decode_ahead
from lit_align.common.lock import folder_turn
from lit_align.common.progress import BRIEF, Progress, show_progress, track
from lit_align.data.images import ImageError, decode_pixels
from lit_align.data.labels.score_files import Identity, Scores, read_scores, side_file, side_files, write_scores
from lit_align.data.read_options import OnError, ReadOptions
from lit_align.data.shards.index import content_digest
from lit_align.data.shards.layout import RawPair, Sample, SampleError, parse_sample, read_samples
from lit_align.data.shards.storage import expand
from lit_align.scoring.base import Scorer
from lit_align.scoring.presets import load_scorers, scorer_names
from lit_align.user_errors import UserValueError


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
) -> None:
    """Score both images of every pair, and write one side file per shard; a killed run goes on where it stopped.

    Under torchrun or SLURM, or with more than one device, the processes share the shards. Several commands may
    add scores of different scorers at a time.

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
        devices: of one machine, a number, or `auto` for all; torchrun and SLURM say it themselves.

    Raises:
        SampleError: on a broken sample, if it is not to be skipped.
        ValueError: if a side file holds scores by other weights and is not to be overwritten.
        ModuleNotFoundError: if a report is wanted and matplotlib is missing.
    """
    names = scorer_names(scorers)
    paths = expand(shards)
    side_files(paths, output)  # refuses shards that would share one
    if report:
        require_matplotlib()
    group = join_process_group(accelerator, devices)
    loaded = load_scorers(names, presets)
    known = {name: Identity(scorer.version, scorer.fingerprint()) for name, scorer in loaded.items()}
    mine = paths[group.rank :: group.world_size]
    todo = list(_unfinished(mine, output, known, overwrite))
    prepared = {name: LoadedScorer(loaded[name].prepare(group.device), known[name]) for name in names}
    skipped, options = 0, ReadOptions(on_error)
    with show_progress(sum(task.pairs for task in todo), "scoring", "pair", hidden=group.rank > 0) as bar:
        for task in todo:  # the bar shows the first process's share
            skipped += _score_shard(task, prepared, output, batch_size, options, bar)
    print(f"{group}: scored {len(todo)} shards, {len(mine) - len(todo)} were done before, skipped {skipped} samples")
    group.wait()
    if report and group.rank == 0:
        if group.world_size > 1:
            _wait_for_others(paths, output, names)
        report_agreement(paths, output, names, options)


def _wait_for_others(shards: Sequence[str], output: str | None, names: Sequence[str], minutes: float = 30.0) -> None:
    """Until all shards are scored, or no side file has been written for `minutes`."""
    left = [shard for shard in shards if any(read_samples(shard, image_bytes=0))]
    since = time.monotonic()
    while left and time.monotonic() - since < 60 * minutes:
        still = [shard for shard in left if not set(names) <= set(read_scores(side_file(shard, output)))]
        if len(still) == len(left) and still:
            time.sleep(2)
        else:
            left, since = still, time.monotonic()
    if left:
        print(f"{len(left)} shards have no scores yet, first {left[0]}; the report leaves them out.")


class Task(NamedTuple):
    """A shard and the scorers that it lacks."""

    shard: str
    pairs: int
    missing: list[str]


def _unfinished(
    shards: Sequence[str], output: str | None, known: dict[str, Identity], overwrite: bool
) -> Iterator[Task]:
    """What is left to do. Keys are compared, and the images too where scores may be overwritten."""
    for shard in track(shards, len(shards), "looking for scores", "shard", delay=BRIEF):
        found = read_scores(side_file(shard, output))
        for name, identity in known.items():
            if name in found and found[name].identity != identity and not overwrite:
                raise UserValueError(
                    f"{side_file(shard, output)} has scores by {name!r}, {found[name].identity}, and now it is "
                    f"{identity}. Give it another name in the presets, or replace them with --overwrite true."
                )
        keys = [sample.key for sample in read_samples(shard, image_bytes=0)]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise SampleError(f"shard {shard} has the key {twice} twice. Give its samples keys of their own.")
        contents = _contents(shard) if overwrite and found else None
        missing = [name for name in known if not _complete(found.get(name), known[name], keys, contents)]
        if missing and keys:
            yield Task(shard, len(keys), missing)


def _contents(shard: str) -> list[str]:
    """Digests of a shard's samples; of broken ones nothing."""
    contents = []
    for sample in read_samples(shard):
        try:
            contents.append(content_digest(parse_sample(sample)))
        except SampleError:
            contents.append("")
    return contents


def _complete(scores: Scores | None, identity: Identity, keys: list[str], contents: list[str] | None) -> bool:
    if scores is None or scores.identity != identity or scores.keys != keys:
        return False
    return contents is None or scores.contents == contents


def _score_shard(
    task: Task,
    scorers: dict[str, LoadedScorer],
    output: str | None,
    batch_size: int,
    options: ReadOptions,
    bar: Progress,
) -> int:
    """Score a shard and write its side file; returns how many samples were skipped."""
    keys: list[str] = []
    contents: list[str] = []
    values: dict[str, list[Tensor]] = {name: [] for name in task.missing}  # of (2, batch)
    skipped = 0
    for batch in decode_ahead(lambda sample: _decode(sample, options), read_samples(task.shard), batch_size):
        readable = [row for row, sample in enumerate(batch) if sample.images is not None]
        images = [pixels for sample in batch for pixels in sample.images or ()]
        prompts = [batch[row].prompt for row in readable for _ in (0, 1)]
        for name in task.missing:
            scores = torch.full((2, len(batch)), torch.nan)  # of skipped samples, so that their shard is complete too
            if readable:
                scores[:, readable] = scorers[name].scorer.score(images, prompts).view(-1, 2).T
            values[name].append(scores)
        keys += [sample.key for sample in batch]
        contents += [sample.content for sample in batch]
        skipped += len(batch) - len(readable)
        bar.update(len(batch))
    new = {name: Scores(scorers[name].identity, keys, contents, *torch.cat(parts, 1)) for name, parts in values.items()}
    path = side_file(task.shard, output)
    with folder_turn(path.parent, "score"):  # another command may add the scores of other scorers
        write_scores(path, read_scores(path) | new)
    return skipped


class Decoded(NamedTuple):
    """A sample ready to be scored."""

    key: str
    content: str  # its digest; empty where it is no pair
    prompt: str
    images: tuple[Tensor, Tensor] | None  # (3, height, width) uint8, each of its own size; None where it is skipped


def _decode(sample: Sample, options: ReadOptions) -> Decoded:
    content = ""
    try:
        pair = parse_sample(sample)
        content = content_digest(pair)
        return Decoded(pair.key, content, pair.prompt, _pixels(pair))
    except SampleError as error:
        options.skip_or_raise(error)
        return Decoded(sample.key, content, "", None)


def _pixels(pair: RawPair) -> tuple[Tensor, Tensor]:
    try:
        first, second = (decode_pixels(data) for data in (pair.image_0, pair.image_1))
    except ImageError as error:
        raise SampleError(f"{pair.location}: an image cannot be decoded: {error}") from error
    return torch.from_numpy(first).permute(2, 0, 1), torch.from_numpy(second).permute(2, 0, 1)
