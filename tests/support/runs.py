"""Training runs of a few steps on the bundled pairs."""

import lightning as L
import torch

from lit_align.backbones import StableDiffusionXL
from lit_align.callbacks import ChosenErrorRise
from lit_align.data import PreferenceDataModule
from lit_align.objectives import MaPO
from lit_align.training.module import AlignmentModule
from tests.support.paths import PAIRS
from tests.support.pipelines import small_sdxl


def make_module(seed=0, lora=None, objective=None, repo=None, backbone=StableDiffusionXL, **options):
    """Seed everything and build a module, by default MaPO on the small SDXL."""
    L.seed_everything(seed, verbose=False)
    return AlignmentModule(
        backbone(str(repo or small_sdxl()), lora=lora),
        objective or MaPO(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        seed=seed,
        **options,
    )


def make_data(seed=0, **options):
    """Build a data module of 52 training pairs and 20 held-out pairs, of 32 x 32 pixels."""
    settings = {"resolution": 32, "batch_size": 2, "num_workers": 0, "shuffle_window": 16, "flip_probability": 0.5}
    shards = [str(PAIRS / f"train/0000{i}.tar") for i in range(2)]
    return PreferenceDataModule(shards, str(PAIRS / "held_out/00002.tar"), seed=seed, **{**settings, **options})


def fit(module, data, folder, steps, ckpt_path=None, callbacks=(), **options):
    """Train on the CPU for some steps and return the Trainer; `options` are the Trainer's."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=options.pop("logger", False),
        enable_checkpointing=any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, L.pytorch.callbacks.ProgressBar) for c in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=options.pop("num_sanity_val_steps", -1 if measures_start(callbacks) else 0),
        callbacks=list(callbacks),
        **{"limit_val_batches": 0, **options},
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def measures_start(callbacks):
    """Tell whether a callback compares with the held-out errors before the first step."""
    return any(isinstance(callback, ChosenErrorRise) for callback in callbacks)


def weights(module):
    """Copy the trained weights."""
    return {name: p.detach().clone() for name, p in module.backbone.trainable_parameters().items()}


def equal(first, second):
    """Tell whether two sets of weights are equal, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Recorder(L.Callback):
    """Records the indices of the pairs of every training batch."""

    def __init__(self):
        self.pairs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pairs.append(batch.pairs.numbers)


class Losses(Recorder):
    """Records the loss of every training batch too."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.losses.append(outputs["loss"].item())


class KeepLogs(L.pytorch.loggers.logger.DummyLogger):
    """Keeps every row that is logged, with its step."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def keep_all(folder, **options):
    """Return a ModelCheckpoint that keeps every checkpoint, as `step=3.ckpt`."""
    return L.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **options)


def held_out_errors(module, batches=2):
    """Compute the chosen errors of the first held-out batches without a callback, in the order of the pairs."""
    data = make_data(batch_size=4)
    data.setup("fit")
    module.backbone.eval()
    errors = {}
    with torch.no_grad():
        for _, batch in zip(range(batches), data.val_dataloader(), strict=False):
            encoded = module.backbone.encode(batch)
            policy = module.backbone.pair_errors(encoded, module.validation_draw(encoded, 0))
            errors |= dict(zip(batch.pairs.numbers, policy.chosen.tolist(), strict=True))
    return torch.tensor([errors[number] for number in sorted(errors)])
