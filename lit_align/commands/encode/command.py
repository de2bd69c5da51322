"""`lit-align encode`: latents of all pairs and conditioning of all prompts, once, in a cache."""

import shutil
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse import Namespace

from lit_align.backbones import Backbone
from lit_align.commands.encode.encode_plan import Plan, PlannedShard, make_plan
from lit_align.commands.encode.encoding import (
    PROMPTS_AT_A_TIME,
    Work,
    encode_pairs,
    encode_prompts,
    encode_shard,
    prepared_batches,
)
from lit_align.commands.shared.process_group import ProcessGroup, join_process_group
from lit_align.common.lock import locked_folder
from lit_align.common.manifest import check_manifest, write_manifest
from lit_align.common.progress import show_progress, track
from lit_align.common.sizes import format_bytes
from lit_align.data.cache.format import (
    FINGERPRINT,
    PROMPTS,
    PROMPTS_PER_FILE,
    Flips,
    Posterior,
    latents_bytes,
    latents_file,
    prompts_files,
    rules,
    save,
    saved_bytes,
    write_latents,
    write_prompts,
)
from lit_align.data.read_options import ReadOptions
from lit_align.user_errors import UserOSError, UserValueError


def encode(
    backbone: Namespace,
    data: Namespace,
    output: Path,
    split: Literal["train", "val"] = "train",
    flips: Flips | None = None,
    posterior: Posterior = "moments",
    batch_size: int = 8,
    accelerator: str = "auto",
    devices: int | str = "auto",
) -> None:
    """Encode all images and prompts of a training config's shards into a cache; a killed run goes on where it stopped.

    Under torchrun or SLURM, or with more than one device, the processes share the shards; each holds the latents of one
    in memory. Two commands on the same output at a time would hinder each other.

    Args:
        backbone: class and arguments; its denoiser is not loaded.
        data: of the data module: shards, resolution, aspect_buckets, crop, flip_probability and on_error count.
        output: folder of the cache.
        split: `train` encodes data.train_shards, `val` data.val_shards.
        flips: `both` encodes each image mirrored too; not given: so for a training split that flips, else `none`.
        posterior: `moments` keeps mean and deviation, of which training samples anew each time; `sample` keeps one
            sample, half the size.
        batch_size: pairs that are encoded at a time; each is two images, four with both flips.
        accelerator: `auto`, `cpu` or `gpu`.
        devices: of one machine, a number, or `auto` for all; torchrun and SLURM say it themselves.

    Raises:
        SampleError: on a broken sample, if data.on_error is `raise`.
        ValueError: if data.crop is random, or the folder holds a cache of something else.
        OSError: if the disk has less space than is needed.
    """
    patterns = _shards(data, split, batch_size)
    group = join_process_group(accelerator, devices)
    module, name = backbone.class_path.rsplit(".", 1)
    kind: type[Backbone] = getattr(import_module(module), name)
    encoders = kind.without_denoiser(**(backbone.init_args.as_dict() if "init_args" in backbone else {}))
    flips = flips or ("both" if split == "train" and data.flip_probability > 0 else "none")
    options = ReadOptions(data.on_error, data.skip_limit, data.read_timeout, data.allow_pipe)
    plan = make_plan(patterns, data.resolution, data.aspect_buckets, options, quiet=group.rank > 0)
    rule = rules(encoders.encoders_identity(), data.resolution, data.aspect_buckets, flips, posterior)
    with locked_folder(output, "encode", group.run):
        _begin(output, rule | plan.describe(), plan, group)
        encoders.load_encoders()
        encoders.to(group.device)
        work = Work(encoders, group.device, plan.prompts, flips, posterior, batch_size, options)
        todo = _todo(output, plan, group)
        if group.rank == 0:
            _announce(output, plan, todo, work)
        skipped = _work(output, todo, work, group)
        before = len(plan.shards[group.rank :: group.world_size]) - len(todo.shards)
        print(f"{group}: encoded {len(todo.shards)} shards, {before} were done before, skipped {skipped} samples")
        group.wait()


def _shards(data: Namespace, split: str, batch_size: int) -> str | list[str]:
    """The patterns of the shards to encode."""
    if batch_size < 1:
        raise UserValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if split == "val":
        if data.val_shards is None:
            raise UserValueError("split is val, but data.val_shards is not set.")
        val: str | list[str] = data.val_shards
        return val
    if data.crop != "center":
        raise UserValueError(
            f"data.crop is {data.crop}, of which a cache would keep one draw. Set data.crop to center, or train "
            "without a cache."
        )
    train: str | list[str] = data.train_shards
    return train


def _begin(output: Path, fingerprint: Mapping[str, Any], plan: Plan, group: ProcessGroup) -> None:
    """Say what the folder is a cache of.

    Raises:
        ValueError: if it is one of something else.
    """
    path = output / FINGERPRINT
    if any(output.rglob("*.safetensors")):
        check_manifest(path, fingerprint, made=["**/*.safetensors"])
    if group.rank == 0:
        write_manifest(path, fingerprint)
        write_prompts(output / PROMPTS, plan.prompts)


class Todo(NamedTuple):
    """What a process has to do."""

    shards: list[PlannedShard]
    prompts: dict[str, list[str]]  # by the file that they go to


def _todo(output: Path, plan: Plan, group: ProcessGroup) -> Todo:
    mine = slice(group.rank, None, group.world_size)
    files = {
        name: plan.prompts[number * PROMPTS_PER_FILE : (number + 1) * PROMPTS_PER_FILE]
        for number, name in list(enumerate(prompts_files(len(plan.prompts))))[mine]
    }
    return Todo(
        [shard for shard in plan.shards[mine] if not (output / latents_file(shard.name)).is_file()],
        {name: prompts for name, prompts in files.items() if not (output / name).is_file()},
    )


def _announce(output: Path, plan: Plan, todo: Todo, work: Work) -> None:
    """Say how large the cache will be and how long it will take.

    Raises:
        OSError: if there is not so much space.
    """
    sizes = file_sizes(plan, work)
    needed = sum(size for name, size in sizes.items() if not (output / name).is_file())
    total, free = sum(sizes.values()) + (output / PROMPTS).stat().st_size, shutil.disk_usage(output).free
    pairs = sum(shard.pairs for shard in plan.shards)
    print(
        f"{pairs:,} pairs in {len(plan.shards)} shards as {pairs * work.images_per_pair:,} images, "
        f"{len(plan.prompts):,} prompts\n"
        f"{output}: {format_bytes(total)}, of which {format_bytes(needed)} are to be written; "
        f"{format_bytes(free)} are free"
    )
    if needed > free:
        raise UserOSError(
            f"output: {output} needs {format_bytes(needed)} more, and its disk has {format_bytes(free)} free. Choose "
            "another disk, or --flips none or --posterior sample, each of which halves the latents."
        )
    if todo.shards or todo.prompts:
        seconds = _seconds(todo, work)
        print(f"about {f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.0f} min'}, by the first batch")


def file_sizes(plan: Plan, work: Work) -> dict[str, int]:
    """Bytes of the cache's files of tensors, by name."""
    shapes = {key: value.shape[1:] for key, value in encode_prompts([""], work).items()}
    sizes = {}
    for number, name in enumerate(prompts_files(len(plan.prompts))):
        count = min(PROMPTS_PER_FILE, len(plan.prompts) - number * PROMPTS_PER_FILE)
        sizes[name] = saved_bytes(
            {key: torch.empty(count, *shape, dtype=torch.float16, device="meta") for key, shape in shapes.items()}
        )
    for shard in plan.shards:
        rows = {row: work.latents_shape(s.shape) for row, s in enumerate(shard.samples) if s.prompt >= 0}
        sizes[latents_file(shard.name)] = latents_bytes(len(shard.samples), rows)
    return sizes


def _seconds(todo: Todo, work: Work) -> float:
    """How long it takes, from the first batch of images and of prompts; images are decoded while others are encoded."""
    seconds = 0.0
    if shard := next((shard for shard in todo.shards if shard.pairs), None):
        begin = time.perf_counter()
        batch = next(prepared_batches(shard, work), [])
        decoding, encoding = time.perf_counter() - begin, 0.0
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            encode_pairs(batch, work)
            encoding = time.perf_counter() - begin
        pairs = sum(shard.pairs for shard in todo.shards)
        seconds += max(decoding, encoding) / max(len(batch), 1) * pairs
    if prompts := [prompt for part in todo.prompts.values() for prompt in part]:
        begin = time.perf_counter()
        some = prompts[:PROMPTS_AT_A_TIME]
        encode_prompts(some, work)
        seconds += (time.perf_counter() - begin) / len(some) * len(prompts)
    return seconds


def _work(output: Path, todo: Todo, work: Work, group: ProcessGroup) -> int:
    """Encode what is to be done; returns how many samples were skipped."""
    hidden, skipped = group.rank > 0, 0  # the bars show the first process's share
    for name, prompts in track(todo.prompts.items(), len(todo.prompts), "prompts", "file", hidden=hidden):
        save(output / name, encode_prompts(prompts, work))
    images = sum(shard.pairs for shard in todo.shards) * work.images_per_pair
    with show_progress(images, "encoding", "image", hidden=hidden) as bar:
        for shard in todo.shards:
            cached = encode_shard(shard, work, bar.update)
            write_latents(output / latents_file(shard.name), cached)
            skipped += len(shard.samples) - len(cached.latents)
    return skipped
