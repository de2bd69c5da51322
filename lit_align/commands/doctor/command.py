"""`lit-align doctor`: whether a training run would start, what it would need, and what to change, without training."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_align.backbones import Backbone
from lit_align.callbacks import ReferenceUpdate
from lit_align.callbacks.start_banner import batch_line, model_lines
from lit_align.commands.doctor.advice import advice_on_data, advice_on_precision, advice_on_trainer
from lit_align.commands.doctor.data_check import DataCheck, cache_line
from lit_align.commands.doctor.diagnosis import Diagnosis, gigabytes
from lit_align.commands.doctor.machine import devices, machine_elsewhere, machine_of, versions
from lit_align.commands.doctor.memory_report import MemoryReport
from lit_align.commands.doctor.run_parts import RunParts
from lit_align.commands.doctor.weights_check import download_command, weight_line
from lit_align.memory import UnknownPrecision
from lit_align.objectives import Objective
from lit_align.training.strategies import check_strategy, name_of
from lit_align.user_errors import UserFileNotFoundError, UserValueError

CKPT_WORDS = ("best", "last", "hpc")  # that the Trainer understands in place of a path


def doctor(parts: RunParts, memory: float | None = None) -> Diagnosis:
    """Look at everything that a run would need.

    Args:
        parts: of the run.
        memory: GB of each GPU of another machine; none: this machine.
    """
    with _quiet():
        return Doctor(parts, memory).look()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the parts say of themselves, which the report says in its own words."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Doctor:
    """One visit.

    Args:
        parts: of the run.
        memory: GB of each GPU of another machine, or None.
    """

    def __init__(self, parts: RunParts, memory: float | None) -> None:
        self.parts, self.config, self.memory = parts, parts.config, memory
        self.found = Diagnosis()
        self.trainer: L.Trainer | None = None
        self.machine = machine_elsewhere(self.config.trainer, 0 if memory is None else memory)
        self.backbone: Backbone | None = None
        self.data: DataCheck | None = None
        self.fetch: str | None = None  # command that gets the configs of a pipeline that is not here

    def look(self) -> Diagnosis:
        """All sections, in an order in which each knows what those before have found."""
        with self.found.section("versions") as lines:
            lines += versions(self.config)
        with self.found.section("devices") as lines:
            lines += devices()
            self._trainer(lines)
        with self.found.section("devices"):
            self._checkpoint()
        self._weights()
        self._data()
        self._run()
        with self.found.section("memory") as lines:
            self._memory(lines)
        self._advise()
        return self.found

    def _trainer(self, lines: list[str]) -> None:
        wanted = self.config.trainer
        check_strategy(name_of(wanted.strategy))
        asked = f"trainer.accelerator {wanted.accelerator}, devices {wanted.devices}"
        try:
            self.trainer = self.parts.trainer(on_one_cpu=self.memory is not None)
        except MisconfigurationException as error:
            raise UserValueError(
                f"{asked}: {error} Override trainer.accelerator and trainer.devices, or give --memory for GPUs "
                "elsewhere."
            ) from error
        if self.memory is None:
            self.machine = machine_of(self.trainer, wanted.strategy)
        machine = self.machine
        where = "" if self.memory is None else " (elsewhere)"
        lines.append(
            f"{asked}: {machine.devices} x {machine.device}{where} with {gigabytes(machine.memory)} each, strategy "
            f"{machine.strategy}, precision {machine.precision}"
        )
        lines += [
            f"{name}: left out here, for its scorers read their weights; not looked at" for name in self.parts.judges()
        ]

    def _checkpoint(self) -> None:
        path = self.config.get("ckpt_path")
        if path is not None and path not in CKPT_WORDS and ":" not in path and not Path(path).exists():
            raise UserFileNotFoundError(
                f"ckpt_path {path!r} is not there. Name a checkpoint, or begin anew without it."
            )

    def _weights(self) -> None:
        about = self.config.model.backbone.init_args
        with self.found.section("weights") as lines:
            self.fetch = download_command(about.repo, about.revision)
            if self.fetch is not None:
                lines.append(f"{about.repo} is not in the local cache; fit would download it")
                return
            self.backbone = self.parts.backbone()
            lines.append(f"{type(self.backbone).__name__} from {about.repo}")
        if self.backbone is None:
            return
        for name, source in self.backbone.sources().items():
            with self.found.section("weights") as lines:
                lines.append(f"{name}: {weight_line(*source)}")
        with self.found.section("weights") as lines:
            lines.append(f"{len(self.backbone.tokenizers)} tokenizers")

    def _data(self) -> None:
        about = self.config.data
        if about.scorers is not None:
            with self.found.section("training pairs") as lines:
                lines.append("data.scorers: the pairs are scored while training; their weights are not looked at")
                self.parts.live_vote()  # refuses on its own, where the data module has other refusals before
        for scorers in (True, False):  # once more without, so that what is wrong with them hides nothing
            if self.data is None:
                with self.found.section("training pairs"):
                    self.data = DataCheck(self.parts.data(scorers), self.machine.devices)
        with self.found.section("training pairs") as lines:
            if self.data is not None:
                lines += self.data.train()
            readers = f"{about.num_workers} workers a device" if about.num_workers else "the training process"
            lines.append(f"read by {readers}; batches of {about.batch_size} pairs at {about.resolution} px")
        if self.data is None:
            return
        with self.found.section("held-out pairs") as lines:
            lines += self.data.val()
        self._caches(self.data)

    def _caches(self, data: DataCheck) -> None:
        cached, expected = data.cached(), None
        with self.found.section("caches") as lines:
            lines += [] if cached else ["none: images are encoded anew"]
            expected = data.expected(self.backbone if cached else None)  # reads weights, once
        for split in cached if expected is not None else []:
            with self.found.section("caches") as lines:
                lines.append(cache_line(split, expected))

    def _run(self) -> None:
        with self.found.section("run") as lines:
            self._objective(lines)
        with self.found.section("run") as lines:
            wanted, devices = self.config.trainer, self.machine.devices
            lines.append(batch_line(self.config.data.batch_size, wanted.accumulate_grad_batches, devices).strip())
            lines.append(self._length())
        with self.found.section("run"):
            self._vote(self.parts.objective())
        with self.found.section("run"):
            lora, optimizer = self.config.model.backbone.init_args.lora is not None, self.parts.optimizer()
            for refusal in self.machine.refusals(precision=self.machine.precision, optimizer=optimizer, lora=lora):
                self.found.fail("run", ValueError(refusal))

    def _objective(self, lines: list[str]) -> None:
        callbacks = list(self.trainer.callbacks) if self.trainer is not None else []  # type: ignore[attr-defined]
        objective = self.parts.objective()
        if self.backbone is None:
            lines.append(f"objective   {objective.formula()}")
        else:
            module = self.parts.module()
            lines += [line.strip() for line in model_lines(module, callbacks)]
            for update in (callback for callback in callbacks if isinstance(callback, ReferenceUpdate)):
                assert self.trainer is not None
                update.setup(self.trainer, module, "fit")  # refuses an objective without a reference

    def _vote(self, objective: Objective) -> None:
        if objective.needs_vote and self.config.data.vote is None and self.config.data.scorers is None:
            raise UserValueError(
                f"{type(objective).__name__} learns from votes, but data.vote is not set. Set it, or choose "
                "DiffusionDPO."
            )

    def _length(self) -> str:
        """Optimizer steps, pairs, epochs."""
        wanted, check = self.config.trainer, self.data
        a_step = self.config.data.batch_size * wanted.accumulate_grad_batches * self.machine.devices
        an_epoch = -(-check.batches // wanted.accumulate_grad_batches) if check is not None else 0
        steps = wanted.max_steps
        if steps < 0 and an_epoch and wanted.max_epochs not in (None, -1):
            steps = wanted.max_epochs * an_epoch
        if steps < 0:
            return f"until       {wanted.max_epochs} epochs"
        text = f"until       {steps:,} optimizer steps, {steps * a_step:,} pairs"
        return text + (f", {steps / an_epoch:,.1f} epochs" if an_epoch else "")

    def _memory(self, lines: list[str]) -> None:
        if self.backbone is None:
            to_do = self.fetch if self.fetch is not None else "correct model.backbone"
            lines.append(f"cannot be estimated until the pipeline's configs are here: {to_do}")
            return
        report = MemoryReport(self.parts, self.machine)
        try:
            lines += report.lines()
        except UnknownPrecision as error:  # fit would start all the same
            lines.append(f"cannot be estimated: {error}")
            return
        lines.append("an estimate from shapes, not measured on a GPU; the device's context and workspaces come on top")
        if report.verdict() in ("close", "does not fit"):
            self.found.advice += report.remedies()
        if report.verdict() == "does not fit":
            assert report.found is not None
            raise MemoryError(
                f"a device needs about {gigabytes(report.found.total)} and has {gigabytes(self.machine.memory)}; "
                "see what to change"
            )

    def _advise(self) -> None:
        advice = self.found.advice
        advice += self.parts_concerns()
        if self.data is not None:
            advice += advice_on_data(self.data, self.machine)
        if self.backbone is not None:
            advice += advice_on_precision(self.backbone, self.machine)
        advice += advice_on_trainer(self.config.trainer, self.data, self.machine)

    def parts_concerns(self) -> list[str]:
        """What the objective has to say about its own numbers."""
        try:
            return self.parts.objective().concerns()
        except Exception:  # an error that section `run` has
            return []
