"""What a run is about to do, said once before it begins."""

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lit_align.callbacks.reference_update import ReferenceUpdate
from lit_align.module import AlignmentModule


class StartBanner(L.Callback):
    """Prints parameters, effective batch, steps, the reference and the objective's formula with its numbers."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        rank_zero_info(self.text(trainer, pl_module))

    def text(self, trainer: L.Trainer, module: AlignmentModule) -> str:
        """The banner's lines."""
        trainable = sum(p.numel() for p in module.backbone.trainable_parameters().values())
        total = sum(p.numel() for p in module.backbone.parameters())
        batch = trainer.datamodule.batch_size  # type: ignore[attr-defined]  # set by Trainer.fit
        accumulated, devices = trainer.accumulate_grad_batches, trainer.world_size
        steps, epochs = trainer.max_steps, trainer.max_epochs
        until = f"{steps:,} optimizer steps" if steps > 0 else f"{epochs} epochs"
        return "\n".join(
            [
                f"lit-align: {type(module.backbone).__name__} from {module.backbone.repo}",
                f"  objective   {module.objective.formula()}",
                *self._reference(trainer, module),
                f"  trainable   {trainable:,} of {total:,} parameters",
                f"  batch       {batch * accumulated * devices:,} pairs a step = {batch} a device x {accumulated} "
                f"accumulated x {devices} devices",
                f"  until       {until}, from step {trainer.global_step:,}; precision {trainer.precision}",
            ]
        )

    def _reference(self, trainer: L.Trainer, module: AlignmentModule) -> list[str]:
        """The reference's line, if there is one."""
        if module.backbone.reference is None:
            return []
        size = sum(weight.numel() for weight in module.backbone.reference_weights().values())
        kind = "a frozen copy" if module.backbone.lora is None else "a second, frozen adapter"
        moves = [str(c) for c in trainer.callbacks if isinstance(c, ReferenceUpdate)]  # type: ignore[attr-defined]
        return [f"  reference   {kind}, {size:,} parameters; {moves[0] if moves else 'static'}"]
