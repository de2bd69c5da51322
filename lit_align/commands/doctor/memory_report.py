"""Report of the memory that a run needs, and of the settings that would make it fit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

from jsonargparse import Namespace

from lit_align.backbones import LoRA
from lit_align.commands.doctor.machine import Machine
from lit_align.commands.doctor.run_parts import RunParts
from lit_align.common.sizes import format_bytes
from lit_align.data.buckets import bucket_shapes
from lit_align.memory import Estimate, Work, estimate
from lit_align.training.compensated import KNOWN

SHOWN = 100_000  # bytes; smaller items, such as schedules and counters, are not listed
EIGHT_BIT = "bitsandbytes.optim.AdamW8bit"
KEPT_FREE = 0.1  # share of the memory, for the device's context and libraries, which the estimate leaves out


class Plan(NamedTuple):
    """Settings of a run after changes."""

    work: Work
    model: Mapping[str, Any] = {}  # in place of the config's
    backbone: Mapping[str, Any] = {}  # in place of the config's

    def with_work(self, **changes: Any) -> "Plan":
        return self._replace(work=replace(self.work, **changes))

    def with_model(self, **changes: Any) -> "Plan":
        return self._replace(model={**self.model, **changes})

    def with_backbone(self, **changes: Any) -> "Plan":
        return self._replace(backbone={**self.backbone, **changes})


class Change(NamedTuple):
    """A change of settings that saves memory."""

    words: str  # options with their values
    reason: str
    apply: Callable[[Plan], Plan]


class MemoryReport:
    """Estimates the memory that each device of a run needs.

    Args:
        parts: parts of the run.
        machine: machine of the run.
    """

    def __init__(self, parts: RunParts, machine: Machine) -> None:
        self.parts, self.machine = parts, machine
        data = parts.config.data
        shapes = bucket_shapes(data.resolution) if data.aspect_buckets else [(data.resolution, data.resolution)]
        height, width = max(shapes, key=lambda shape: shape[0] * shape[1])
        encoded = data.train_cache is not None and (data.val_shards is None or data.val_cache is not None)
        self.work = Work(
            machine.device, machine.precision, data.batch_size, height, width, encoded, shares=machine.shares
        )

    @cached_property
    def estimate(self) -> Estimate:
        """Estimate of the run with its own settings; takes seconds."""
        return estimate(self.parts.module(), self.work)

    def lines(self) -> list[str]:
        """List the estimate item by item."""
        found, weights, optimizer = self.estimate, self.estimate.weights, self.estimate.optimizer
        items = [(name, getattr(weights, name)) for name in ("trained", "frozen", "reference", "encoders")]
        kept = ", ".join(f"{name} {format_bytes(size)}" for name, size in items if size >= SHOWN)
        stages = ", ".join(f"{name} {format_bytes(size)}" for name, size in found.stages.items())
        lines = [
            f"parameters   {format_bytes(weights.parameters)}: {kept}",
            f"gradients    {format_bytes(weights.gradients)}",
            *([f"buckets      {format_bytes(found.buckets)}: DDP's copy of the gradients"] if found.buckets else []),
            "optimizer    " + ("unknown: not counted" if optimizer is None else format_bytes(optimizer.state)),
            f"activations  {format_bytes(found.activations)}, the largest of: {stages}; saved for the backward pass "
            f"{format_bytes(found.saved)}" + (", which waits in main memory" if found.waiting else ""),
            f"total        {format_bytes(found.total)} of {format_bytes(self.machine.memory)} a device: "
            + self.verdict()
            + (", without the scorers" if self.parts.config.data.scorers is not None else ""),
        ]
        if self.machine.device == "cpu" and self.parts.config.model.backbone.init_args.activation_offload:
            lines.append("model.backbone.activation_offload: without effect on a CPU, whose memory is the main memory")
        if not self.machine.shares.known:
            strategy = self.machine.strategy
            lines.append(f"strategy {strategy}: it is unknown what it shards, so nothing is divided by the devices")
        return lines

    def verdict(self) -> str:
        """Say whether the run fits into the device's memory."""
        if not self.machine.memory:
            return "no device to compare with"
        if self._fits(self.estimate):
            return "fits"
        return "close" if self.estimate.total <= self.machine.memory else "does not fit"

    def _fits(self, found: Estimate) -> bool:
        return found.total <= (1 - KEPT_FREE) * self.machine.memory

    def remedies(self) -> Iterator[str]:
        """List changes, each on top of those before, until the run fits; those that train equally well come first.

        A change that saves nothing by itself, because another part of a step is as large, is listed with the next one
        that does.
        """
        best, plan, held = self.estimate, Plan(self.work), list[Change]()
        for alternatives in self._changes():
            for change in alternatives:
                changed = change.apply(plan)
                now = estimate(self.parts.module(changed.backbone, **changed.model), changed.work)
                if self._fits(now):
                    break
            if now.total > best.total:
                continue
            plan, held = changed, [*held, change]
            if now.total < 0.99 * best.total:
                words, reasons = " and ".join(one.words for one in held), "; ".join(one.reason for one in held)
                above = "" if best is self.estimate else ", with those above"
                moved = f" and {format_bytes(now.waiting)} of main memory" if now.waiting else ""
                yield f"{words}: {reasons}; then {format_bytes(now.total)}{moved}{above}"
                best, held = now, []
            if self._fits(now):
                return

    def _changes(self) -> Iterator[Iterable[Change]]:
        """Yield groups of alternatives that `fit` accepts: the first that fits is used, or else the last."""
        config, work = self.parts.config, self.work
        options = config.model.backbone.init_args
        if options.gradient_checkpointing is not True:
            yield self._changes_of_checkpointing(options)
        if work.precision == "32-true" and work.device == "cuda":
            reason = "activations of half the size; rounds more"
            yield [Change("trainer.precision bf16-mixed", reason, lambda plan: plan.with_work(precision="bf16-mixed"))]
        if work.batch_size > 1:
            smaller = [size for size in range(work.batch_size - 1, 0, -1) if work.batch_size % size == 0]
            yield [self._batch(size) for size in smaller]
        moves = work.device != "cpu" and not self.machine.refusals(offload=True)
        if moves and not options.activation_offload:
            reason = "activations wait in main memory; equal numbers, slower by the time of the copies"
            offload = {"activation_offload": True}
            yield [Change("model.backbone.activation_offload true", reason, lambda plan: plan.with_backbone(**offload))]
        if not work.encoded and config.data.scorers is None:  # scorers need pixels, which a cache does not have
            words, reason = "data.train_cache and data.val_cache", "lit-align encode makes them; no encoder is loaded"
            yield [Change(words, reason, lambda plan: plan.with_work(encoded=True))]
        yield from self._changes_of_optimizer()
        yield from self._changes_of_method()

    def _changes_of_checkpointing(self, options: Namespace) -> Iterator[Change]:
        name, more = "gradient_checkpointing", "recomputed in the backward pass; equal numbers"
        if not (options.gradient_checkpointing or options.compile or options.activation_offload):
            reason = f"activations other than results of convolutions, products and attention are {more}"
            selective = {name: "selective"}
            yield Change(f"model.backbone.{name} selective", reason, lambda plan: plan.with_backbone(**selective))
        reason = f"activations are {more}, about a third slower"
        yield Change(f"model.backbone.{name} true", reason, lambda plan: plan.with_backbone(**{name: True}))

    def _changes_of_optimizer(self) -> Iterator[Iterable[Change]]:
        used, trained = (
            str(self.parts.config.model.optimizer.class_path),
            self.parts.config.model.backbone.init_args.lora,
        )
        eight_bit = find_spec("bitsandbytes") is not None and not self.machine.refusals(optimizer=EIGHT_BIT)
        eight_bit = eight_bit and not self.parts.config.model.backbone.init_args.channels_last
        if eight_bit and not used.endswith("8bit"):
            optimizer = Namespace(class_path=EIGHT_BIT, init_args=Namespace())
            words, reason = f"model.optimizer {EIGHT_BIT}", "a quarter of AdamW's state"
            yield [Change(words, reason, lambda plan: plan.with_model(optimizer=optimizer))]
        half = self.work.precision in ("32-true", "bf16-mixed") and not self.machine.refusals(precision="bf16-true")
        known = str(self.parts.optimizer()).startswith(KNOWN)
        if trained is None and self.work.device == "cuda" and half and known:
            words = "trainer.precision bf16-true with model.compensate_rounding true"
            reason = "weights and gradients of half the size; gradients are summed in bfloat16"
            compensate = {"compensate_rounding": True}
            yield [Change(words, reason, lambda plan: plan.with_work(precision="bf16-true").with_model(**compensate))]

    def _changes_of_method(self) -> Iterator[Iterable[Change]]:
        if self.machine.refusals(lora=True):
            return
        trained = self.parts.config.model.backbone.init_args.lora
        if trained is None:
            reason = "trains an adapter: few gradients, little state; needs a greater learning rate"
            yield [Change("model.backbone.lora.rank 8", reason, lambda plan: plan.with_backbone(lora=LoRA()))]
        if find_spec("bitsandbytes") is not None:
            lora = LoRA(**{**(vars(trained) if trained else {}), "base": "nf4"})
            reason = "the frozen linear layers in 4 bits a weight; rounds them, and takes longer"
            yield [Change("model.backbone.lora.base nf4", reason, lambda plan: plan.with_backbone(lora=lora))]

    def _batch(self, size: int) -> Change:
        accumulate = self.parts.config.trainer.accumulate_grad_batches * self.work.batch_size // size
        words = f"data.batch_size {size} with trainer.accumulate_grad_batches {accumulate}"
        return Change(words, "as many pairs a step", lambda plan: plan.with_work(batch_size=size))
