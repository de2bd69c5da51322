"""The LightningModule: from a batch of pairs to the loss, the logs and the checkpoint."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW

from lit_align.backbones import Backbone
from lit_align.backbones.attention import AttentionKernel
from lit_align.diffusion.draws import Draw, fixed_draw
from lit_align.internals import allow_graphs, unscales_gradients
from lit_align.objectives import Objective
from lit_align.training.checkpoints.run_record import RunRecord
from lit_align.training.checkpoints.settings import OnResume
from lit_align.training.clipping import clip
from lit_align.training.compensated import check_compensation, compensated
from lit_align.training.judging import check_facts, judge, term_names
from lit_align.training.kernels import MatmulPrecision, check_names, choose_kernels
from lit_align.training.lr_schedulers import Plateau, check_first_validation, follow_validation, with_schedule
from lit_align.training.metrics import HELD_OUT, PreferenceMetrics, weighted_mean
from lit_align.training.non_finite import ADVICE, NonFinite, Skipping
from lit_align.training.optimizer_state import fit_to_weights
from lit_align.training.precisions import COMPUTE_DTYPES, compute_dtype
from lit_align.training.reference_errors import reference_source
from lit_align.training.reference_source import VALIDATION
from lit_align.training.saved_module import SavedModule
from lit_align.training.step_draws import DROPOUT, draw_at_rank, draw_by_pair, seed_of
from lit_align.training.steps import at_logged_step, restore_accumulation
from lit_align.training.strategies import FSDP2
from lit_align.training.strategy_checks import check_strategy
from lit_align.training.trainer_checks import check_callbacks
from lit_align.types import EncodedBatch, ObjectiveOutput, PairErrors, PreferenceBatch
from lit_align.user_errors import UserValueError

GRAPHS = 64  # of a compiled block: two widths, a reference, a validation and a grid already meet torch's limit of 8


class AlignmentModule(SavedModule):
    """Aligns a backbone's denoiser with preference pairs by an objective.

    Args:
        backbone: the pretrained model.
        objective: the loss on denoising errors.
        optimizer: called with the trainable parameters.
        lr_scheduler: called with the optimizer, stepped once per optimizer step; none keeps the rate constant.
        caption_dropout: share of pairs, drawn per pair, that train without their prompt.
        validation_draws: noises and timesteps per held-out pair; more make the validation less noisy.
        non_finite: what to do when a step's gradients are not finite: `stop` ends the run with an error, `skip` leaves
            the weights unchanged. In fp16 the gradient scaler skips steps while it searches its scale; these count
            only at a scale below 1, where half precision is not the cause.
        skip_limit: number of steps that `skip` may skip in all; one more ends the run.
        float32_matmul: precision of matrix products in float32, see `torch.set_float32_matmul_precision`: `high` rounds
            factors to TF32 on GPUs that have it. None leaves it as it is, which is `highest` unless a script sets it.
        reference_errors: folder of the reference's errors from `lit-align reference-errors`, in place of a reference in
            memory; noise, timesteps and dropped prompts are then drawn by seed, epoch and pair.
        attention: kernel of torch's `scaled_dot_product_attention` for the denoiser; `auto` leaves the choice to torch.
        compensate_rounding: in bf16-true, keep the bits that bfloat16 rounds off each trained weight, 2 bytes a weight,
            in the optimizer's state, so that steps change weights as in float32.
        optimizer_on_resume: whether a resumed run keeps its numbers of optimizer and lr_scheduler, or takes these.
        seed: of noise, timesteps and caption dropout; the command line sets it from `seed_everything`.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.0,
        validation_draws: int = 1,
        non_finite: NonFinite = "stop",
        skip_limit: int = 10,
        float32_matmul: MatmulPrecision | None = None,
        reference_errors: str | None = None,
        attention: AttentionKernel = "auto",
        compensate_rounding: bool = False,
        optimizer_on_resume: OnResume = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise UserValueError(f"model.caption_dropout is {caption_dropout}; it must lie between 0 and 1.")
        check_names(float32_matmul, attention)
        if validation_draws < 1:
            raise UserValueError(f"model.validation_draws is {validation_draws}; it must be at least 1.")
        self.backbone, self.objective = backbone, objective
        self.reference = reference_source(objective, backbone, reference_errors)
        self.optimizer = compensated(optimizer) if compensate_rounding else optimizer
        self.lr_scheduler, self.attention, self.compensate_rounding = lr_scheduler, attention, compensate_rounding
        self.caption_dropout, self.validation_draws, self.seed = caption_dropout, validation_draws, seed
        self.strict_loading = False  # a checkpoint lacks frozen weights; `on_load_checkpoint` checks the others
        check_facts(objective, backbone.schedule)
        terms = term_names(objective)
        self.train_metrics = PreferenceMetrics(terms, backbone.schedule.timesteps)
        # In training a range has too few pairs between two logged steps.
        self.val_metrics = PreferenceMetrics(terms, backbone.schedule.timesteps, HELD_OUT)
        self.gradient_norm: Tensor | None = None
        self.skipping, self.float32_matmul = Skipping(non_finite, skip_limit), float32_matmul
        self.run_record = RunRecord(optimizer_on_resume)

    def training_step(self, batch: PreferenceBatch | EncodedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Compute the loss of a micro-batch, and for callbacks the chosen error of its pairs, (batch,)."""
        encoded = self.backbone.encode(batch)
        draw, dropped = self.training_draw(encoded)
        encoded = encoded.drop_prompts(dropped)
        epoch = self.trainer.current_epoch if self.reference.draws_by_pair else 0
        reference = self.reference.errors(batch, encoded, draw, epoch)
        output, errors = self._judge(encoded, draw, reference)
        self.train_metrics.observe(output, errors, draw.timesteps, encoded.pairs)
        loss = weighted_mean(output.losses, encoded.pairs.weight).to(errors.chosen.dtype)
        return {"loss": loss, "chosen_error": errors.chosen.detach()}

    def validation_step(self, batch: PreferenceBatch | EncodedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Measure held-out pairs, each on its own fixed draws; returns the chosen error for callbacks, (batch,)."""
        encoded = self.backbone.encode(batch)
        chosen_errors = []
        for repeat in range(self.validation_draws):
            draw = self.validation_draw(encoded, repeat)
            output, errors = self._judge(encoded, draw, self.reference.errors(batch, encoded, draw, VALIDATION, repeat))
            self.val_metrics.observe(output, errors, draw.timesteps, encoded.pairs)
            chosen_errors.append(errors.chosen)
        return {"chosen_error": torch.stack(chosen_errors).mean(0)}

    def _judge(
        self, encoded: EncodedBatch, draw: Draw, reference: PairErrors | None
    ) -> tuple[ObjectiveOutput, PairErrors]:
        """Apply the objective to the errors of the policy, and to those of the reference where it needs them."""
        prediction, target = self.backbone.predict_pairs(encoded, draw)
        return judge(self.objective, self.backbone.schedule, prediction, target, reference, draw, encoded.pairs)

    def training_draw(self, encoded: EncodedBatch) -> tuple[Draw, Tensor]:
        """Draw noise, timesteps and dropped prompts (batch,) of a micro-batch from seed, rank and number of the batch.

        So a resumed run draws as the unbroken one would have, on every rank.
        """
        place = f"{self.seed}/{self.global_rank}/{self.trainer.fit_loop.epoch_loop.total_batch_idx}"
        torch.manual_seed(seed_of(place + DROPOUT))  # for dropout inside the denoiser, which takes no generator
        if self.reference.draws_by_pair:
            return self.draw_by_pair(encoded, self.trainer.current_epoch)
        shape = (encoded.pairs.size, *encoded.latents_shape)
        return draw_at_rank(place, shape, self.backbone.schedule.timesteps, self.caption_dropout, self.device)

    def draw_by_pair(self, encoded: EncodedBatch, epoch: int) -> tuple[Draw, Tensor]:
        """Draw as `training_draw`, but for each pair from seed, epoch and the pair's number."""
        numbers, shape, timesteps = encoded.pairs.numbers, encoded.latents_shape, self.backbone.schedule.timesteps
        return draw_by_pair(self.seed, epoch, numbers, shape, timesteps, self.caption_dropout, self.device)

    def validation_draw(self, encoded: EncodedBatch, repeat: int) -> Draw:
        """Draw noise and timesteps of held-out pairs from their numbers.

        Device, batch size and number of ranks do not change them.
        """
        numbers = [number * self.validation_draws + repeat for number in encoded.pairs.numbers]
        return fixed_draw(numbers, encoded.latents_shape, self.backbone.schedule.timesteps, self.device)

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch | EncodedBatch, batch_idx: int) -> None:
        if at_logged_step(self.trainer):
            values = {f"train/{name}": value for name, value in self.train_metrics.compute().items()}
            if self.gradient_norm is not None:
                values["train/gradient_norm"] = self.gradient_norm
            values["train/skipped_steps"] = torch.tensor(float(self.skipping.count))
            rates = {group["lr"] for group in self.trainer.optimizers[0].param_groups}
            values["train/learning_rate"] = torch.tensor(max(rates))
            bar = {name: values[f"train/{name}"] for name in ("loss", "accuracy") if f"train/{name}" in values}
            self.log_dict(values, batch_size=batch.pairs.size)
            self.log_dict(bar, prog_bar=True, logger=False, batch_size=batch.pairs.size)
            self.train_metrics.reset()
        if self.skipping.fault is not None and not self.trainer.should_stop:  # set by callbacks, which act first
            raise FloatingPointError(f"step {self.trainer.global_step:,}: {self.skipping.fault}. {ADVICE}")

    def on_validation_epoch_end(self) -> None:
        self.reference.refuse_foreign(self.trainer)
        values = {f"val/{name}": value for name, value in self.val_metrics.compute().items()}
        self.log_dict(values, sync_dist=False)  # the metric has already been reduced over ranks
        self.val_metrics.reset()
        follow_validation(self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer is configured, keep the norm from before for the log, and apply `non_finite`.

        Gradients are already averaged over the ranks, so that all ranks decide equally. Lightning's own clipping would
        compute the norm again, and refuses fused optimizers in mixed precision.
        """
        self.reference.refuse_foreign()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and unscales_gradients(optimizer):
            scaler.unscale_(optimizer)  # else a fused optimizer does so in its step, after the clipping
        weights = [weight for weight in self.backbone.trainable_parameters().values() if weight.grad is not None]
        self.gradient_norm = clip(weights, gradient_clip_val, gradient_clip_algorithm)
        if not (self.gradient_norm.isfinite() or (scaler is not None and scaler.get_scale() >= 1)):
            optimizer.zero_grad(set_to_none=True)  # so that the optimizer does nothing
            self.skipping.leave_out(self.trainer.global_step + 1, self.gradient_norm.item())

    def configure_model(self) -> None:
        """Shard the denoiser if the strategy is FSDP2; nothing without a Trainer. Idempotent."""
        if self._trainer is None:  # in `load_from_checkpoint`
            return
        strategy = self.trainer.strategy
        check_strategy(strategy)
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]  # set in Trainer's constructor
        if isinstance(strategy, FSDP2):
            dtype = COMPUTE_DTYPES.get(str(self.trainer.precision))
            self.backbone.shard(strategy.device_mesh["data_parallel"], dtype, strategy.keep_for_backward)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self._trainer is not None:
            self.reference.check_length(self.trainer)
            check_compensation(self.compensate_rounding, str(self.trainer.precision))
        optimizer = self.optimizer(list(self.backbone.trainable_parameters().values()))
        if self.backbone.channels_last and type(optimizer).__module__.startswith("bitsandbytes"):
            raise UserValueError(
                f"model.optimizer is {type(optimizer).__name__} of bitsandbytes, which makes weights contiguous at "
                "each step, but model.backbone.channels_last is true. Set it to false."
            )
        if self.lr_scheduler is None:
            return optimizer
        return with_schedule(self.trainer, self.optimizer, optimizer, self.lr_scheduler, self.val_metrics.names)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule after an optimizer step; one on a plateau waits for `follow_validation`."""
        if not isinstance(scheduler, Plateau):
            scheduler.step()

    def on_train_start(self) -> None:
        self.run_record.take(self)
        for optimizer in self.trainer.optimizers:
            fit_to_weights(optimizer)
        restore_accumulation(self.trainer)
        check_first_validation(self.trainer)

    def on_fit_start(self) -> None:
        self.train()  # diffusers loads in eval mode, and Lightning keeps the mode
        self._prepare_frozen()
        if self.backbone.compiles:
            allow_graphs(GRAPHS)
            self.backbone.compile_blocks()

    def on_validation_start(self) -> None:
        self._prepare_frozen()

    def _prepare_frozen(self) -> None:
        """Cast frozen weights, and choose kernels. Earlier the plugin would still round the VAE's."""
        self.reference.check_model(self)
        self.backbone.cast_frozen(dtype := compute_dtype(self.trainer.precision))
        choose_kernels(self.backbone, self.float32_matmul, self.attention, dtype)
