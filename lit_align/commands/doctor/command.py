"""`lit-align doctor`: check, without training, whether a run would start, what it needs and what to change."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_align.backbones import Backbone
from lit_align.callbacks import ReferenceUpdate
from lit_align.callbacks.start_banner import batch_line, model_lines
from lit_align.commands.doctor.advice import advice_on_data, advice_on_precision, advice_on_trainer
from lit_align.commands.doctor.data_check import DataCheck, reading_line
from lit_align.commands.doctor.diagnosis import Diagnosis
from lit_align.commands.doctor.machine import devices, machine_elsewhere, machine_of, versions
from lit_align.commands.doctor.memory_report import MemoryReport
from lit_align.commands.doctor.refused_options import refused_options
from lit_align.commands.doctor.run_length import accumulations, count_steps, length_line, schedule_lines
from lit_align.commands.doctor.run_parts import RunParts
from lit_align.commands.doctor.weights_check import download_command, weight_lines
from lit_align.commands.shared.announced_checkpoint import checkpoint_lines
from lit_align.common.sizes import format_bytes
from lit_align.memory import UnknownPrecision
from lit_align.training.checkpoints.last_checkpoint import checkpoint_folders, checkpoint_to_resume
from lit_align.training.strategy_checks import check_strategy, name_of
from lit_align.training.trainer_checks import check_callbacks, check_options
from lit_align.user_errors import UserFileNotFoundError, UserValueError

CKPT_WORDS = ("best", "last", "hpc")  # accepted by the Trainer in place of a path


def doctor(parts: RunParts, memory: float | None = None) -> Diagnosis:
    """Check everything that a run needs.

    Args:
        parts: parts of the run.
        memory: GB (10^9 bytes) of each GPU of another machine; None checks this machine's devices.
    """
    with _quiet():
        return Doctor(parts, memory).examine()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence logs and warnings of the parts: the report says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Doctor:
    """Checks a run's parts one after the other; later checks use what earlier ones found.

    A check yields lines of the report. An exception in it becomes an error of its section and hides no other error.

    Args:
        parts: parts of the run.
        memory: GB of each GPU of another machine, or None.
    """

    def __init__(self, parts: RunParts, memory: float | None) -> None:
        self.parts, self.config, self.memory = parts, parts.config, memory
        self.found = Diagnosis()
        self.trainer: L.Trainer | None = None
        self.machine = machine_elsewhere(self.config.trainer, 0 if memory is None else memory)
        self.backbone: Backbone | None = None
        self.data: DataCheck | None = None
        self.steps = -1  # of the run; -1 where unknown
        self.fetch: str | None = None  # command that downloads the pipeline's configs, if they are missing

    def examine(self) -> Diagnosis:
        """Run all checks."""
        self.found.check("versions", lambda: versions(self.config))
        for first in (devices, self._trainer, self._checkpoint):
            self.found.check("devices", first)
        self._weights()
        self._data()
        for check in (self._objective, self._length, self._schedule, self._vote, self._refusals):
            self.found.check("run", check)
        self.found.check("memory", self._memory)
        self.found.advice += self._advice()
        return self.found

    def _trainer(self) -> Iterator[str]:
        wanted = self.config.trainer
        check_strategy(name_of(wanted.strategy))
        check_options(wanted)
        options = f"trainer.accelerator {wanted.accelerator}, devices {wanted.devices}"
        try:
            self.trainer = self.parts.trainer(on_one_cpu=self.memory is not None)
        except MisconfigurationException as error:
            raise UserValueError(
                f"{options}: {error} Override trainer.accelerator and trainer.devices, or give --memory to check for "
                "GPUs of another machine."
            ) from error
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.memory is None:
            self.machine = machine_of(self.trainer, wanted.strategy)
        machine, where = self.machine, "" if self.memory is None else " (elsewhere)"
        yield (
            f"{options}: {machine.devices} x {machine.device}{where} with {format_bytes(machine.memory)} each, "
            f"strategy {machine.strategy}, precision {machine.precision}"
        )
        for name in self.parts.judges():
            yield f"{name}: left out here and not checked, because its scorers would load their weights"

    def _checkpoint(self) -> Iterator[str]:
        path = self.config.get("ckpt_path")
        if path == "last" and self.trainer is not None:
            found = checkpoint_to_resume(checkpoint_folders(self.trainer))
            path = None if found is None else str(found.path)
        if path is None or path in CKPT_WORDS or ":" in path:
            return
        if not Path(path).exists():
            raise UserFileNotFoundError(
                f"ckpt_path {path!r} does not exist. Name a checkpoint, or leave ckpt_path out to start a new run."
            )
        lines, warnings = checkpoint_lines(Path(path))
        yield from (*lines, *warnings)

    def _weights(self) -> None:
        self.found.check("weights", self._backbone)
        if self.backbone is not None:
            for name, (location, stem) in self.backbone.model_locations().items():
                self.found.check("weights", partial(weight_lines, name, location, stem))
            self.found.check("weights", self._tokenizers)

    def _backbone(self) -> Iterator[str]:
        options = self.config.model.backbone.init_args
        self.fetch = download_command(options.repo, options.revision)
        if self.fetch is not None:
            yield f"{options.repo} is not in the local cache; fit would download it"
        else:
            self.backbone = self.parts.backbone()
            yield f"{type(self.backbone).__name__} from {options.repo}"

    def _tokenizers(self) -> list[str]:
        assert self.backbone is not None
        return [f"{len(self.backbone.tokenizers)} tokenizers"]

    def _data(self) -> None:
        if self.config.data.scorers is not None:
            self.found.check("training pairs", self._live_vote)
        for scorers in (True, False):  # also without scorers, so that errors about them hide no others
            if self.data is None:
                self.found.check("training pairs", partial(self._open_data, scorers))
        self.found.check("training pairs", self._train_split)
        if self.data is not None:
            self.found.check("held-out pairs", self.data.val)
            self._caches(self.data)

    def _live_vote(self) -> Iterator[str]:
        yield "data.scorers: the pairs are scored while training; the scorers' weights are not checked"
        self.parts.live_vote()  # checked first: the data module would stop at the first of its own errors

    def _open_data(self, scorers: bool) -> None:
        self.data = DataCheck(self.parts.data(scorers), self.machine.devices)

    def _train_split(self) -> Iterator[str]:
        if self.data is not None:
            yield from self.data.train()
        yield reading_line(self.config.data)

    def _caches(self, data: DataCheck) -> None:
        for split in data.cached():
            self.found.check("caches", partial(data.cache_lines, split, self.backbone))
        if not data.cached():
            self.found.check("caches", lambda: ["none: images are encoded in every step"])

    def _objective(self) -> Iterator[str]:
        callbacks = list(self.trainer.callbacks) if self.trainer is not None else []  # type: ignore[attr-defined]
        objective = self.parts.objective()
        if self.backbone is None:
            yield f"objective   {objective.formula()}"
            return
        module = self.parts.module()
        module.reference.check_folder()
        yield from (line.strip() for line in model_lines(module, callbacks))
        for update in (callback for callback in callbacks if isinstance(callback, ReferenceUpdate)):
            assert self.trainer is not None
            update.setup(self.trainer, module, "fit")  # refuses an objective without a reference

    def _length(self) -> Iterator[str]:
        """Describe a step's pairs, and the run's length in steps, pairs and epochs."""
        wanted, batch_size = self.config.trainer, self.config.data.batch_size
        by_epoch, batches = accumulations(self.trainer), 0 if self.data is None else self.data.batches
        accumulated = by_epoch.get(0, wanted.accumulate_grad_batches)
        yield batch_line(batch_size, accumulated, self.machine.devices, by_epoch).strip()
        self.steps = count_steps(wanted, accumulated, batches)
        pairs = batch_size * accumulated * self.machine.devices if len(by_epoch) < 2 else 0
        yield length_line(wanted, self.steps, pairs, -(-batches // accumulated))

    def _schedule(self) -> Iterator[str]:
        if self.backbone is not None:
            validates = self.config.data.val_shards is not None and self.config.trainer.limit_val_batches != 0
            yield from schedule_lines(self.parts.module(), self.steps, validates)

    def _vote(self) -> None:
        objective = self.parts.objective()
        if objective.needs_vote and self.config.data.vote is None and self.config.data.scorers is None:
            raise UserValueError(
                f"{objective.name()} learns from votes, but data.vote is not set. Set it, or choose DiffusionDPO."
            )

    def _refusals(self) -> None:
        device = None if self.trainer is None or self.memory is not None else self.trainer.strategy.root_device
        for refusal in refused_options(self.parts, self.machine, self.backbone, device):
            self.found.fail("run", refusal)

    def _memory(self) -> Iterator[str]:
        if self.backbone is None:
            to_do = "correct model.backbone" if self.fetch is None else self.fetch
            yield f"cannot be estimated until the pipeline's configs are on this machine: {to_do}"
            return
        report = MemoryReport(self.parts, self.machine)
        try:
            yield from report.lines()
        except UnknownPrecision as error:  # not an error of the run: fit would start
            yield f"cannot be estimated: {error}"
            return
        yield "estimated from shapes, not measured on a GPU; the device's context and workspaces come on top"
        if report.verdict() in ("close", "does not fit"):
            self.found.advice += report.remedies()
        if report.verdict() == "does not fit":
            needed, available = format_bytes(report.estimate.total), format_bytes(self.machine.memory)
            raise MemoryError(f"a device needs about {needed} and has {available}; see what to change")

    def _advice(self) -> Iterable[str]:
        advice = self._concerns()
        if self.data is not None:
            advice += advice_on_data(self.data, self.machine)
        if self.backbone is not None:
            advice += advice_on_precision(self.backbone, self.machine, self.config.model.compensate_rounding)
        return [*advice, *advice_on_trainer(self.config.trainer, self.data, self.machine)]

    def _concerns(self) -> list[str]:
        """Return the objective's remarks on its own numbers."""
        try:
            return self.parts.objective().concerns()
        except Exception:  # reported in section `run`
            return []
