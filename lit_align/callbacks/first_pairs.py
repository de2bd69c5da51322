"""The pairs of the first step and their errors, before it."""

from itertools import islice

import lightning as L
import torch
from torch import Tensor

from lit_align.callbacks.mean_errors import chosen_sums
from lit_align.callbacks.preemption import end_if_signalled
from lit_align.common.progress import Progress, show_progress
from lit_align.data.loader import PairLoader
from lit_align.training.module import AlignmentModule
from lit_align.training.steps import accumulated
from lit_align.types import EncodedBatch, PreferenceBatch

AnyBatch = PreferenceBatch | EncodedBatch


def first_batches(trainer: L.Trainer, pairs: int) -> list[AnyBatch]:
    """Read at most `pairs` pairs of this rank's first step, without touching the loader's workers."""
    loader = trainer.train_dataloader
    batches = loader.first_batches(pairs) if isinstance(loader, PairLoader) else iter(loader or ())
    return list(islice(batches, accumulated(trainer)))


def first_sums(trainer: L.Trainer, module: AlignmentModule, pairs: int, draws: int) -> Tensor:
    """Sum the chosen errors of at most `pairs` pairs of this rank's first step, (3,), see `chosen_sums`.

    A signal ends the run after the pass that it meets; all ranks make equally many.

    Args:
        trainer: of the run.
        module: of the run; its mode stays as it is.
        pairs: of this rank.
        draws: noises and timesteps of each pair, over which its error is a mean.
    """
    batches, sums = first_batches(trainer, pairs), torch.zeros(3, device=module.device)
    name, hidden = "start of the training errors", not trainer.is_global_zero
    with show_progress(len(batches) * draws, name, "pass", delay=10.0, hidden=hidden) as bar:
        for batch in batches:
            moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            sums = sums + chosen_sums(moved.pairs, _mean_errors(trainer, module, moved, draws, bar))
    return sums


@torch.no_grad()
def _mean_errors(trainer: L.Trainer, module: AlignmentModule, batch: AnyBatch, draws: int, bar: Progress) -> Tensor:
    """Average the chosen errors of several draws, (batch,)."""
    module.backbone.eval()  # no dropout
    errors = []
    with trainer.precision_plugin.forward_context():
        encoded = module.backbone.encode(batch)
        for repeat in range(draws):
            errors.append(module.backbone.chosen_errors(encoded, module.validation_draw(encoded, repeat)))
            bar.update()
            end_if_signalled(trainer)
    module.backbone.train()
    return torch.stack(errors).mean(0)
