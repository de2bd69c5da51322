"""Find the shards that lack scores, score their pairs and write side files."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.common.decode_ahead import decode_ahead
from lit_align.common.lock import folder_turn
from lit_align.common.progress import BRIEF, Progress, show_progress, track
from lit_align.data.decoder import ImageError, decode_pixels
from lit_align.data.labels.score_files import Identity, Scores, read_scores, side_file, write_scores
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.index import content_digest
from lit_align.data.shards.layout import RawPair, Sample, SampleError, parse_sample, read_samples
from lit_align.scoring.base import Scorer
from lit_align.user_errors import UserValueError


class LoadedScorer(NamedTuple):
    """A scorer with its identity."""

    scorer: Scorer
    identity: Identity


def wait_for_others(shards: Sequence[str], output: str | None, names: Sequence[str], minutes: float = 30.0) -> None:
    """Wait until all shards are scored, or until no side file was written for `minutes`."""
    left = without_scores(shards, output, names)
    since = time.monotonic()
    while left and time.monotonic() - since < 60 * minutes:
        still = without_scores(left, output, names)
        if len(still) == len(left) and still:
            time.sleep(2)
        else:
            left, since = still, time.monotonic()
    if left:
        print(f"{len(left)} shards have no scores yet, first {left[0]}; the report leaves them out.")


def without_scores(shards: Sequence[str], output: str | None, names: Sequence[str]) -> list[str]:
    """The shards that lack scores by one of the scorers; a shard without samples needs none."""
    left = [shard for shard in shards if not set(names) <= set(read_scores(side_file(shard, output)))]
    return [shard for shard in left if any(read_samples(shard, image_bytes=0))]


class ShardToScore(NamedTuple):
    """A shard and the scorers that it lacks."""

    shard: str
    pairs: int
    missing: list[str]


def unfinished(
    shards: Sequence[str], output: str | None, known: dict[str, Identity], overwrite: bool
) -> Iterator[ShardToScore]:
    """Yield shards that lack scores. Compares keys, and with `overwrite` also the images."""
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
            yield ShardToScore(shard, len(keys), missing)


def _contents(shard: str) -> list[str]:
    """Digests of a shard's samples; empty for broken ones."""
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


def score_shards(
    todo: Sequence[ShardToScore],
    scorers: dict[str, LoadedScorer],
    output: str | None,
    batch_size: int,
    options: ReadOptions,
    hidden: bool,
) -> int:
    """Score shards behind a progress bar, which may be hidden; returns how many samples were skipped."""
    with show_progress(sum(task.pairs for task in todo), "scoring", "pair", hidden=hidden) as bar:
        return sum(score_shard(task, scorers, output, batch_size, options, bar) for task in todo)


def score_shard(
    todo: ShardToScore,
    scorers: dict[str, LoadedScorer],
    output: str | None,
    batch_size: int,
    options: ReadOptions,
    bar: Progress,
) -> int:
    """Score a shard and write its side file; returns how many samples were skipped."""
    keys: list[str] = []
    contents: list[str] = []
    values: dict[str, list[Tensor]] = {name: [] for name in todo.missing}  # of (2, batch)
    skipped = 0
    for batch in decode_ahead(lambda sample: _decode(sample, options), read_samples(todo.shard), batch_size):
        readable = [row for row, sample in enumerate(batch) if sample.images is not None]
        images = [pixels for sample in batch for pixels in sample.images or ()]
        prompts = [batch[row].prompt for row in readable for _ in (0, 1)]
        for name in todo.missing:
            scores = torch.full((2, len(batch)), torch.nan)  # stays for skipped samples, which count as scored
            if readable:
                scores[:, readable] = scorers[name].scorer.score(images, prompts).view(-1, 2).T
            values[name].append(scores)
        keys += [sample.key for sample in batch]
        contents += [sample.content for sample in batch]
        skipped += len(batch) - len(readable)
        bar.update(len(batch))
    new = {name: Scores(scorers[name].identity, keys, contents, *torch.cat(parts, 1)) for name, parts in values.items()}
    path = side_file(todo.shard, output)
    with folder_turn(path.parent, "score"):  # another command may add the scores of other scorers
        write_scores(path, read_scores(path) | new)
    return skipped


class Decoded(NamedTuple):
    """A sample ready to be scored."""

    key: str
    content: str  # digest; empty for a broken sample
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
