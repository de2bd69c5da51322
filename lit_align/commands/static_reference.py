"""`lit-align reference-errors`: computes the errors of a reference that never moves, once for any number of runs."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.backbones.loading.meta import load_frozen_in
from lit_align.commands.fit import ConfigCLI, make_cli
from lit_align.commands.shared.config_parts import arguments_of
from lit_align.commands.shared.process_group import ProcessGroup, join_process_group
from lit_align.common.lock import locked_folder
from lit_align.common.manifest import check_manifest
from lit_align.common.paths import as_argument
from lit_align.common.progress import Progress, show_progress
from lit_align.data import PreferenceDataModule
from lit_align.data.loader import BatchLoader
from lit_align.data.order import Batch, Order
from lit_align.data.pair_identity import describe_pairs
from lit_align.data.split import Split
from lit_align.training.kernels import choose_kernels
from lit_align.training.module import AlignmentModule
from lit_align.training.precisions import compute_dtype, full_spelling
from lit_align.training.reference_errors import identity
from lit_align.training.reference_files import ABSENT, FINGERPRINT, Part, part_file
from lit_align.training.reference_source import VALIDATION
from lit_align.types import EncodedBatch, PreferenceBatch
from lit_align.user_errors import UserValueError

PAIRS = 4096  # of a file, or as many as whole batches hold: what a killed run loses at most


@dataclass(kw_only=True)
class Options:
    """Options beside those of `fit`.

    Args:
        output: folder of the errors, for model.reference_errors.
        epochs: of the training, each with noise of its own; more can be added later.
        batch_size: pairs per batch; none: data.batch_size.
        accelerator: `auto`, `cpu` or `gpu`.
        devices: number on this machine, or `auto` for all; torchrun and SLURM set it themselves.
    """

    output: Path
    epochs: int
    batch_size: int | None = None
    accelerator: str = "auto"
    devices: int | str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise UserValueError(f"{name} is {value}; it must be at least 1.")


class ReferenceErrorsCLI(ConfigCLI):
    """Parses the options of `fit` and `Options`."""

    description = (
        "Compute the errors of the reference before a run, for the noise that each pair will have in each epoch. Runs "
        "with model.reference_errors then need neither the reference's memory nor its time. A killed run resumes."
    )
    example = "--config configs/diffusion_dpo_sdxl.yaml --output reference/sdxl --epochs 2"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        self.options = parser.add_class_arguments(Options, as_positional=False)

    def before_instantiate_classes(self) -> None:
        """Skip the checks of a training run."""

    def run(self) -> None:
        """Compute with the config's model and data."""
        options = Options(**{name: self.config[name] for name in self.options})
        _refuse_moving(self.config.trainer.callbacks)
        group = join_process_group(options.accelerator, options.devices)
        precision = full_spelling(self.config.trainer.precision)
        module, data = self._module(options.output, precision), self._data(options.batch_size)
        with locked_folder(options.output, "reference-errors", group.run):
            work = Work(module, data, options.output, precision, group)
            work.begin()
            work.compute(options.epochs)
            group.wait()
            work.say_whole(options.epochs)

    def _module(self, output: Path, precision: str) -> AlignmentModule:
        """Build the module without its reference, whose errors are those of the untrained model."""
        config = self.config.model.clone()
        config.reference_errors = str(output)
        with load_frozen_in(compute_dtype(precision)):
            return AlignmentModule(**arguments_of(self.parser, "model", config))

    def _data(self, batch_size: int | None) -> PreferenceDataModule:
        config: Namespace = self.config.data.clone()
        config.batch_size = batch_size or config.batch_size
        data = PreferenceDataModule(**arguments_of(self.parser, "data", config))
        data.setup("fit")
        return data


def _refuse_moving(callbacks: Any) -> None:
    named = callbacks if isinstance(callbacks, list) else [callbacks]
    if any("class_path" in one and one.class_path.endswith("ReferenceUpdate") for one in named if one is not None):
        raise UserValueError(
            "trainer.callbacks: ReferenceUpdate moves the reference, whose errors then depend on the run. Only those "
            "of a static reference can be computed before."
        )


class Seen(NamedTuple):
    """A set of pairs, as one epoch sees them."""

    split: Split
    order: Order
    epoch: int | None  # `VALIDATION` for held-out pairs


class Work:
    """Computes errors part by part.

    Args:
        module: without a reference.
        data: after its set-up.
        output: folder of the errors.
        precision: of the Trainer, in full spelling.
        group: processes that share the parts.
    """

    def __init__(
        self, module: AlignmentModule, data: PreferenceDataModule, output: Path, precision: str, group: ProcessGroup
    ) -> None:
        self.module, self.data, self.output, self.precision, self.group = module, data, output, precision, group
        self.batches = max(1, PAIRS // data.batch_size)  # of a part

    def _splits(self) -> dict[str, Split]:
        return {split.name: split for split in (self.data.train, self.data.val) if split is not None}

    def _orders(self) -> dict[str, Order]:
        """Return all pairs in the order of their numbers."""
        return {name: self.data.order(split, 0, 0, 1) for name, split in self._splits().items()}

    def _parts(self, order: Order) -> int:
        return -(-order.whole_batches // self.batches)

    def begin(self) -> None:
        """Write what the errors are computed with.

        Raises:
            UserValueError: if the folder was begun with other values.
        """
        manifest = {
            "model": identity(self.module, self.precision),
            "pairs": describe_pairs(self.data),
            "batch_size": self.data.batch_size,
            "parts": {name: self._parts(order) for name, order in self._orders().items()},
        }
        check_manifest(self.output / FINGERPRINT, manifest, made=["*/part-*.safetensors"])

    def _seen(self, epochs: int) -> Iterator[Seen]:
        orders = self._orders()
        for name, split in self._splits().items():
            for epoch in range(epochs) if name == "train" else [VALIDATION]:
                yield Seen(split, orders[name], epoch)

    def _missing(self, seen: Seen) -> list[int]:
        """List the parts that this process has to compute."""
        mine = range(self.group.rank, self._parts(seen.order), self.group.world_size)
        return [part for part in mine if not (self.output / part_file(seen.epoch, part)).is_file()]

    def compute(self, epochs: int) -> None:
        """Compute all parts of this process's share that are not there."""
        module, todo = self.module, [(seen, self._missing(seen)) for seen in self._seen(epochs)]
        module.to(self.group.device)
        module.backbone.eval()
        module.backbone.cast_frozen(compute_dtype(self.precision))
        choose_kernels(module.backbone, module.float32_matmul, module.attention, compute_dtype(self.precision))
        ends = ((seen.order.whole_batches, part) for seen, parts in todo for part in parts)
        total = sum(min(self.batches, whole - part * self.batches) for whole, part in ends)
        with show_progress(total, "reference errors", "batch", hidden=self.group.rank > 0) as bar:
            for seen, parts in todo:
                self._compute(seen, set(parts), bar)

    def _compute(self, seen: Seen, parts: set[int], bar: Progress) -> None:
        if not parts:
            return
        places = deque[int]()  # of the batches that are being read

        def batches() -> Iterator[Batch]:
            for number, batch in enumerate(seen.order.rest(seen.epoch or 0, 0)):
                if number // self.batches in parts:
                    places.append(number // self.batches)
                    yield batch

        loader = BatchLoader(self.data.dataset(seen.split, seen.order), batches(), self.data.num_workers)
        try:
            measured = ((places.popleft(), self._measure(batch, seen.epoch)) for batch in loader)
            for part, group in groupby(measured, key=lambda one: one[0]):
                found = []
                for _, one in group:
                    found.append(one)
                    bar.update()
                self._save(Part(*(torch.cat(column) for column in zip(*found, strict=True))), seen.epoch, part)
        finally:
            loader.release()

    def _save(self, part: Part, epoch: int | None, number: int) -> None:
        path = self.output / part_file(epoch, number)
        part.save(path)
        if unreadable := int((part.checksums[:, 0] == ABSENT).sum()):
            print(
                f"{path}: {unreadable} pairs could not be read. A run that can read them refuses them: then delete "
                "this file, and run this command again."
            )

    @torch.no_grad()
    def _measure(self, batch: PreferenceBatch | EncodedBatch, epoch: int | None) -> Part:
        """Compute the errors of a batch for the draws that training or validation will make."""
        module = self.module
        batch = move_data_to_device(self.data.on_before_batch_transfer(batch, 0), self.group.device)
        checksums = torch.where(batch.pairs.weight[:, None] > 0, batch.checksums(), ABSENT)
        dtype = compute_dtype(self.precision)
        with torch.autocast(self.group.device.type, dtype) if self.precision.endswith("-mixed") else nullcontext():
            encoded = module.backbone.encode(batch)
            if epoch is VALIDATION:
                draws = [module.validation_draw(encoded, repeat) for repeat in range(module.validation_draws)]
            else:
                draw, dropped = module.draw_by_pair(encoded, epoch)
                draws, encoded = [draw], encoded.drop_prompts(dropped)
            errors = [torch.stack(module.backbone.pair_errors(encoded, draw), 1) for draw in draws]
        numbers = torch.tensor(batch.pairs.numbers)
        return Part(numbers, checksums.cpu(), torch.stack(errors, 1).float().cpu())

    def say_whole(self, epochs: int) -> None:
        """Print what the folder holds, and how to train with it."""
        every = [part_file(seen.epoch, part) for seen in self._seen(epochs) for part in range(self._parts(seen.order))]
        missing = sum(not (self.output / name).is_file() for name in every)
        pairs = " and ".join(f"{order.pairs:,} pairs ({name})" for name, order in self._orders().items())
        self.group.say_whole(
            missing, len(every), "files",
            f"{self.output}: errors of {pairs}, of {epochs} epochs. To train with them: --model.reference_errors "
            f"{as_argument(self.output)}",
        )  # fmt: skip


def run_reference_errors(words: list[str]) -> None:
    """Compute errors as the words after `reference-errors` say."""
    make_cli(ReferenceErrorsCLI, words, run=False, prog="lit-align reference-errors").run()
