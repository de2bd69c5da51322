"""Summary of a run, printed once before it begins."""

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_align.backbones.nf4 import count_weights
from lit_align.callbacks.reference_update import ReferenceUpdate
from lit_align.internals import ddp_options
from lit_align.memory import Shares, measure_optimizer, weigh
from lit_align.training.lr_schedulers import rate_lines
from lit_align.training.module import AlignmentModule
from lit_align.training.rounding import rounding_line
from lit_align.training.steps import accumulated, accumulation, total_steps


class StartBanner(L.Callback):
    """Prints parameters, effective batch, steps, the reference and the objective's formula with its numbers.

    It acts before all other callbacks, and before the first validation. After the first backward pass it names trained
    weights that got no gradient.
    """

    def __init__(self) -> None:
        self.printed = False
        self.looked = False  # for weights without gradients

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]  # those of a config come before our defaults
        self.printed = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print(trainer, pl_module)  # a resumed run has no sanity check

    def _print(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        if self.printed:
            return
        self.printed = True
        if not trainer.datamodule.encoded:  # type: ignore[attr-defined]  # set by Trainer.fit
            pl_module.backbone.load_encoders()  # so that they are counted here, and not timed with the first step
        rank_zero_info(self.text(trainer, pl_module))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.looked:
            self.looked = True
            idle = [name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
            if idle:
                rank_zero_warn(
                    f"{len(idle):,} of the trained weights got no gradient in the first step and stay as they are, "
                    f"such as {idle[0]}: the model has a part that training does not use."
                )

    def text(self, trainer: L.Trainer, module: AlignmentModule) -> str:
        """Write the banner."""
        batch = trainer.datamodule.batch_size  # type: ignore[attr-defined]  # set by Trainer.fit
        steps = total_steps(trainer)
        until = _until(trainer, steps)
        lines = [
            f"lit-align: {type(module.backbone).__name__} from {module.backbone.repo}",
            *model_lines(module, trainer.callbacks),  # type: ignore[attr-defined]
            batch_line(batch, accumulated(trainer), trainer.world_size, _by_epoch(trainer)),
            f"  until       {until}, from step {trainer.global_step:,}; precision {trainer.precision}",
            *_rounding(trainer),
            *rate_lines(module.optimizer, module.lr_scheduler, steps),
            *self._memory(trainer, module),
        ]
        return "\n".join(lines)

    def _memory(self, trainer: L.Trainer, module: AlignmentModule) -> list[str]:
        """Describe the memory of a GPU that holds the full model; other devices get no line."""
        device, strategy = trainer.strategy.root_device, trainer.strategy
        if device.type != "cuda" or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            return []
        bucket_view = bool(ddp_options(strategy).get("gradient_as_bucket_view"))
        shares = Shares.of("ddp", trainer.world_size, bucket_view)
        return [memory_line(module, shares, torch.cuda.get_device_properties(device).total_memory)]


def _rounding(trainer: L.Trainer) -> list[str]:
    """Describe which weights can change where they are in half precision; each group's weights count."""
    lines = [rounding_line(optimizer, str(trainer.precision)) for optimizer in trainer.optimizers]
    return [f"  rounding    {line}" for line in lines if line is not None]


def _until(trainer: L.Trainer, steps: int | None) -> str:
    """Describe what ends a run: steps, epochs, whichever comes first, or neither."""
    if steps is None:
        return "trainer.max_time or a signal ends it"
    if steps == trainer.max_steps:
        return f"{steps:,} optimizer steps"
    return f"{trainer.max_epochs} epochs, {steps:,} optimizer steps"


def memory_line(module: AlignmentModule, shares: Shares, available: int) -> str:
    """Count the bytes held between steps; activations, which take `lit-align doctor` seconds, are left out.

    Args:
        module: with the encoders that training uses.
        shares: of the strategy.
        available: bytes of the device.
    """
    weights = weigh(module.backbone)
    trained = list(module.backbone.trainable_parameters().values())
    optimizer = measure_optimizer(module.optimizer, trained, foreach=True)
    parts = {"parameters": weights.parameters, "gradients": weights.gradients, "buckets": shares.buckets(weights)}
    parts |= {} if optimizer is None else {"optimizer": optimizer.state}
    counted = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    rest = "and activations" if optimizer is not None else "an optimizer of unknown size, and activations"
    return f"  memory      {sum(parts.values()) / 1e9:.2f} of {available / 1e9:.1f} GB a device: {counted}, {rest}"


def model_lines(module: AlignmentModule, callbacks: Sequence[L.Callback]) -> list[str]:
    """Describe the objective, the reference if there is one, and the trained share of the model."""
    trainable = sum(p.numel() for p in module.backbone.trainable_parameters().values())
    total = count_weights(module.backbone)
    return [
        f"  objective   {module.objective.formula()}",
        *_reference(module, callbacks),
        f"  trainable   {trainable:,} of {total:,} parameters",
        *_lora(module),
    ]


def _lora(module: AlignmentModule) -> list[str]:
    lora, layers = module.backbone.lora, module.backbone.lora_layers
    if lora is None:
        return []
    named = ", ".join(f"{target} in {count:,}" for target, count in layers.items())
    base = "; base in NF4" if lora.base == "nf4" else ""
    return [f"  lora        rank {lora.rank}, alpha {lora.alpha}, scale {lora.scale:g}; layers: {named}{base}"]


def _reference(module: AlignmentModule, callbacks: Sequence[L.Callback]) -> list[str]:
    if not module.objective.needs_reference:
        return []
    if module.backbone.reference is None:
        return [f"  reference   {module.reference}"]
    size = sum(weight.numel() for weight in module.backbone.reference_weights().values())
    kind = "a frozen copy" if module.backbone.lora is None else "a second, frozen adapter"
    moves = [str(callback) for callback in callbacks if isinstance(callback, ReferenceUpdate)]
    return [f"  reference   {kind}, {size:,} parameters; {moves[0] if moves else 'static'}"]


def batch_line(batch: int, accumulated: int, devices: int, by_epoch: dict[int, int] | None = None) -> str:
    """Describe the pairs of an optimizer step; accumulations that change are given by their first epochs."""
    if by_epoch:
        accumulated = by_epoch[0]
    later = [f"{count} from epoch {epoch} on" for epoch, count in sorted((by_epoch or {}).items()) if epoch]
    return (
        f"  batch       {batch * accumulated * devices:,} pairs a step = {batch} a device x {accumulated} "
        f"accumulated{''.join(f' ({change})' for change in later)} x {devices} devices"
    )


def _by_epoch(trainer: L.Trainer) -> dict[int, int]:
    """Accumulations by their first epochs, where a callback sets them."""
    changing = accumulation(trainer)
    return {} if changing is None else dict(changing.scheduling)
