"""`lit-align encode`: caches the latents of all pairs and the conditioning of all prompts."""

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
from lit_align.common.paths import as_argument
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
    """Encode all images and prompts of a training config's shards into a cache; a killed run resumes.

    Under torchrun or SLURM, or with several devices, processes share the shards. Each holds one shard's latents in
    memory.

    Args:
        backbone: class and arguments; its denoiser is not loaded.
        data: arguments of the data module; uses its shards, resolution, aspect_buckets, crop, flip_probability and the
            options of reading.
        output: folder of the cache.
        split: `train` encodes data.train_shards, `val` data.val_shards.
        flips: `both` adds each image mirrored; by default `both` for a training split that flips, else `none`.
        posterior: `moments` keeps mean and deviation, so that training samples at each step; `sample` keeps one sample
            in half the space.
        batch_size: pairs per batch; each has two images, or four with both flips.
        accelerator: `auto`, `cpu` or `gpu`.
        devices: number on this machine, or `auto` for all; torchrun and SLURM set it themselves.

    Raises:
        SampleError: on a broken sample, if data.on_error is `raise`.
        UserValueError: if data.crop is random, or the folder holds a cache of other data.
        UserOSError: if the disk has too little space.
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
        names = [*(latents_file(shard.name) for shard in plan.shards), *prompts_files(len(plan.prompts))]
        missing = sum(not (output / name).is_file() for name in names)
        words = f"--data.{split}_cache {as_argument(output)}"
        whole = f"{output}: all {len(plan.shards)} shards are encoded. To train on it: {words}"
        group.say_whole(missing, len(names), "files", whole)


def _shards(data: Namespace, split: str, batch_size: int) -> str | list[str]:
    """Return the patterns of the shards to encode."""
    if batch_size < 1:
        raise UserValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if split == "val" and data.val_shards is None:
        raise UserValueError("split is val, but data.val_shards is not set.")
    if split == "train" and data.crop != "center":
        raise UserValueError(
            f"data.crop is {data.crop}, of which a cache would keep one draw. Set data.crop to center, or train "
            "without a cache."
        )
    patterns: str | list[str] = data.val_shards if split == "val" else data.train_shards
    return patterns


def _begin(output: Path, fingerprint: Mapping[str, Any], plan: Plan, group: ProcessGroup) -> None:
    """Write the fingerprint and the prompts of the cache.

    Raises:
        UserValueError: if the folder holds a cache of other data.
    """
    path = output / FINGERPRINT
    if any(output.rglob("*.safetensors")):
        check_manifest(path, fingerprint, made=["**/*.safetensors"])
    write_manifest(path, fingerprint)  # every process writes equal bytes: any of them may be the first to need it
    if group.rank == 0:
        write_prompts(output / PROMPTS, plan.prompts)


class Todo(NamedTuple):
    """Files that a process has to write."""

    shards: list[PlannedShard]
    prompts: dict[str, list[str]]  # by file name


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
    """Print the size of the cache and the expected time.

    Raises:
        UserOSError: if the disk has too little space.
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
    """Return the bytes of the cache's tensor files by name."""
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
    """Estimate the time from the first batches. Decoding and encoding overlap, so the slower one counts."""
    seconds = 0.0
    if shard := next((shard for shard in todo.shards if shard.pairs), None):
        begin = time.perf_counter()
        batch = next(prepared_batches(shard, work), [])
        decoding, encoding = time.perf_counter() - begin, 0.0
        for _ in range(2):  # the first pass warms up
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
    """Encode prompts and shards, and return the number of skipped samples."""
    hidden, skipped = group.rank > 0, 0  # only rank 0 shows bars, of its own share
    for name, prompts in track(todo.prompts.items(), len(todo.prompts), "prompts", "file", hidden=hidden):
        save(output / name, encode_prompts(prompts, work))
    images = sum(shard.pairs for shard in todo.shards) * work.images_per_pair
    with show_progress(images, "encoding", "image", hidden=hidden) as bar:
        for shard in todo.shards:
            cached = encode_shard(shard, work, bar.update)
            write_latents(output / latents_file(shard.name), cached)
            skipped += len(shard.samples) - len(cached.latents)
    return skipped
