"""Stops a run that diverges, before its images are ruined."""

import time
from collections import deque
from math import hypot
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import get_total_norm

from lit_align.backbones.sharding import copy_full_, to_full, to_local
from lit_align.callbacks.chosen_error_rise import ChosenErrorRise
from lit_align.callbacks.first_pairs import first_sums
from lit_align.callbacks.mean_errors import Mean, chosen_sums, mean_of
from lit_align.common.files import atomic_path
from lit_align.training.checkpoints.run_folder import run_folder
from lit_align.training.module import AlignmentModule
from lit_align.training.steps import at_step
from lit_align.types import EncodedBatch, PreferenceBatch
from lit_align.user_errors import UserValueError

Action = Literal["stop", "restore"]
START_PAIRS = 32  # of the first step, on all devices together, on which the start is measured
START_DRAWS = 8  # noises and timesteps of each of these pairs
SURE = 3.0  # standard errors
WEIGHTS, RESTORED = "best-weights.safetensors", "restored.ckpt"


class DivergenceGuard(L.Callback):
    """Stops a run whose chosen errors rise too far above their start, or whose numbers are not finite.

    It watches two errors against their start. At each validation, the error of the held-out chosen images
    (`val/chosen_error_rise`, see `ChosenErrorRise`). After each step, the mean error of chosen training images over the
    last `window` steps, against the untrained model's error on the first step's pairs (32 of them, or one a device, if
    it has more), measured before it. These are other pairs at other timesteps, so their rise must exceed `max_rise` by
    three standard errors. Healthy runs raise chosen errors too (and rejected ones more): the quickstart by a quarter;
    at 10 times its learning rate tenfold within 5 steps. It also acts if `AlignmentModule` ends the run because
    gradients are not finite.

    `restore` also loads the best weights: those with the lowest `val/loss`, including the validation before the first
    step. A safetensors file in the log folder holds them, and is written only when a validation is better than all
    before: 10 GB for full SDXL. The optimizer's moments belong to the diverged run and are dropped;
    `checkpoints/restored.ckpt`, for `lit-align export`, holds only weights.

    Args:
        max_rise: fraction of the start by which an error may rise.
        action: `stop`, or `restore` the best weights and stop; that needs held-out pairs.
        window: optimizer steps in a mean of training errors; no mean is judged before the first `window` steps.
    """

    def __init__(self, max_rise: float = 1.0, action: Action = "stop", window: int = 10) -> None:
        if not max_rise > 0:
            raise UserValueError(f"DivergenceGuard.max_rise is {max_rise}; it must be greater than 0.")
        if action not in ("stop", "restore"):
            raise UserValueError(f"DivergenceGuard.action is {action!r}; it must be stop or restore.")
        if window < 1:
            raise UserValueError(f"DivergenceGuard.window is {window}; it must be at least 1.")
        self.max_rise, self.action, self.window = max_rise, action, window
        self.start: Mean | None = None  # chosen error of training pairs
        self.recent: deque[list[float]] = deque(maxlen=window)  # `chosen_sums` of the last steps
        self.best: dict[str, Any] | None = None  # file, step and loss
        self.seen: str | None = None  # the fault that stopped the run
        self._sums: Tensor | None = None  # `chosen_sums` of the current step on this rank
        self._left_out = 0  # steps that the module has skipped

    @property
    def exit_code(self) -> int:
        """Exit code of a process whose run it has watched: 1 if it has stopped the run."""
        return 0 if self.seen is None else 1

    def _measure_start(self, trainer: L.Trainer, module: AlignmentModule) -> None:
        """Measure the start on the first pairs of all ranks, and say how long it took."""
        began = time.monotonic()
        sums = first_sums(trainer, module, -(-START_PAIRS // trainer.world_size), START_DRAWS)
        summed = self._reduced(trainer, sums)
        self.start = mean_of([summed])
        rank_zero_info(
            f"DivergenceGuard: the start of the training errors, of {summed[2]:.0f} pairs with {START_DRAWS} draws "
            f"each, took {time.monotonic() - began:.1f} s."
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PreferenceBatch | EncodedBatch,
        batch_idx: int,
    ) -> None:
        sums = chosen_sums(batch.pairs, outputs["chosen_error"])
        self._sums = sums if self._sums is None else self._sums + sums
        if not at_step(trainer):
            return
        assert isinstance(pl_module, AlignmentModule)
        *step, broken = self._reduced(trainer, torch.cat([self._sums, self._not_finite(pl_module)]))
        if pl_module.skipping.count == self._left_out:  # the errors of a skipped step mean nothing
            self.recent.append(step)
        self._left_out, self._sums = pl_module.skipping.count, None
        self._act(trainer, pl_module, self._fault(pl_module, broken > 0))

    def _not_finite(self, module: AlignmentModule) -> Tensor:
        """(1,) 1 where a weight on this device is not finite: then the norm of all is not. Few kernels read them."""
        weights = [to_local(weight.detach()) for weight in module.backbone.trainable_parameters().values()]
        return 1.0 - get_total_norm(weights).isfinite().float().reshape(1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        rise = trainer.callback_metrics.get("val/chosen_error_rise", torch.tensor(0.0)).item()
        if not rise <= self.max_rise:  # also true for NaN
            what = f"the chosen error of held-out pairs is {rise:.1%} over its start"
            self._act(trainer, pl_module, f"{what}; max_rise is {self.max_rise:.0%}")
        if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
            return  # the loss of some batches cannot be compared with later ones
        loss = trainer.callback_metrics.get("val/loss", torch.tensor(float("nan"))).item()  # NaN: no pair counts
        if self.seen is None and self.action == "restore" and (self.best is None or loss < self.best["loss"]):
            self._keep(trainer, pl_module, loss)

    def _fault(self, module: AlignmentModule, broken: bool) -> str | None:
        """Describe what is wrong after a step; equal on all ranks. `broken`: whether weights are not finite."""
        if module.skipping.fault is not None:
            return module.skipping.fault
        if broken:
            return "some weights are not finite"
        now, start, limit = mean_of(self.recent), self.start, 1 + self.max_rise
        if start is None or now is None or len(self.recent) < self.window:
            return None
        chance = SURE * hypot(now.error, limit * start.error)
        if now.mean <= start.mean * limit + chance:
            return None
        return (
            f"the chosen error of training pairs is {now.mean:.4g}, the mean of {self.window} steps, "
            f"{now.mean / start.mean - 1:.1%} over its start {start.mean:.4g}; max_rise is {self.max_rise:.0%}"
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set in Trainer's constructor
        if self.action == "restore" and not any(isinstance(callback, ChosenErrorRise) for callback in callbacks):
            raise UserValueError(
                "DivergenceGuard.action is restore, which needs the held-out loss before the first step. Add "
                "lit_align.callbacks.ChosenErrorRise to the Trainer's callbacks, or set action to stop."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        self.seen, self._left_out = None, pl_module.skipping.count
        if self.action == "restore" and not trainer.enable_validation:
            raise UserValueError(
                "DivergenceGuard.action is restore, but there are no held-out pairs to find the best weights with. "
                "Set data.val_shards, or set action to stop."
            )
        if self.start is None and trainer.global_step > 0:
            rank_zero_warn(
                f"DivergenceGuard: the run began without it, so that at step {trainer.global_step} the start of the "
                "training errors is unknown. It only watches held-out pairs, and values that are not finite."
            )
        if self.start is None and trainer.global_step == 0:
            self._measure_start(trainer, pl_module)
        if self.action == "restore" and (self.best is None or not self._is_there(trainer, self.best["file"])):
            self._keep(trainer, pl_module, float("inf"))

    def _is_there(self, trainer: L.Trainer, file: str) -> bool:
        return trainer.strategy.broadcast(Path(file).is_file())  # only the first rank reads it

    def _keep(self, trainer: L.Trainer, module: L.LightningModule, loss: float) -> None:
        """Write the trained weights as the best so far, atomically."""
        assert isinstance(module, AlignmentModule)
        path = run_folder(trainer) / WEIGHTS  # a collective
        self.best = {"file": str(path), "step": trainer.global_step, "loss": loss}
        weights = module.backbone.trainable_parameters()
        kept: dict[str, Tensor] = {}
        for name, weight in weights.items():  # a collective if they are sharded
            full = to_full(weight.detach())
            kept |= {name: full.cpu().contiguous()} if trainer.is_global_zero else {}
        if trainer.is_global_zero:
            with atomic_path(path) as part:
                save_file(kept, part)

    def _act(self, trainer: L.Trainer, module: L.LightningModule, fault: str | None) -> None:
        """Stop the run, once, with the reason; on all ranks."""
        if fault is None or self.seen is not None:
            return
        self.seen = f"step {trainer.global_step:,}: {fault}"
        if self.action == "restore":
            self._restore(trainer, module)
        trainer.should_stop = True
        rank_zero_warn(f"DivergenceGuard, {self.seen}. The run stops.{self._outcome()} {self._advice(trainer)}")

    @torch.no_grad()
    def _restore(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, AlignmentModule)
        assert self.best is not None
        weights = module.backbone.trainable_parameters()
        if trainer.is_global_zero:
            file = safe_open(self.best["file"], framework="pt")  # reads tensor by tensor
        for name, weight in weights.items():
            kept = file.get_tensor(name) if trainer.is_global_zero else torch.empty(0)
            copy_full_(weight, trainer.strategy.broadcast(kept))
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.seen is not None and self.action == "restore":
            folder = run_folder(trainer)  # a collective
            trainer.save_checkpoint(folder / "checkpoints" / RESTORED, weights_only=True)

    def _outcome(self) -> str:
        if self.action == "stop":
            return " Its weights stay as they are; checkpoints of earlier steps are unchanged."
        assert self.best is not None
        of = f"held-out loss {self.best['loss']:.4g}, the lowest so far"
        return f" Its weights are again those of step {self.best['step']:,} ({of}), also in checkpoints/{RESTORED}."

    def _advice(self, trainer: L.Trainer) -> str:
        rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        return (
            f"Begin a new run with a learning rate 3 to 10 times lower than {rate:g} (a resumed run keeps it). "
            "Also try a warm-up (model.lr_scheduler), clipped gradients (trainer.gradient_clip_val is "
            f"{trainer.gradient_clip_val}), a LoRA, or settings that keep the model closer: a smaller beta_mapo, a "
            "greater beta_paper or beta_dpo. If the images are still good, set a greater max_rise."
        )

    def _reduced(self, trainer: L.Trainer, sums: Tensor) -> list[float]:
        """Sum over all ranks, and wait for the device."""
        summed: list[float] = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return summed

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start and list(self.start), "recent": list(self.recent), "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start, self.best = state_dict["start"] and Mean(*state_dict["start"]), state_dict["best"]
        self.recent = deque(state_dict["recent"], maxlen=self.window)
