"""Training runs of a few steps on the bundled pairs."""

import lightning as L
import torch

from lit_align.backbones import StableDiffusionXL
from lit_align.data import PreferenceDataModule
from lit_align.objectives import MaPO
from lit_align.training.module import AlignmentModule
from tests.support.paths import PAIRS
from tests.support.pipelines import small_sdxl


def make_module(seed=0, lora=None, objective=None, repo=None, backbone=StableDiffusionXL, **options):
    """On the pipeline with the small random UNet, unless told otherwise."""
    L.seed_everything(seed, verbose=False)
    return AlignmentModule(
        backbone(str(repo or small_sdxl()), lora=lora),
        objective or MaPO(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        seed=seed,
        **options,
    )


def make_data(seed=0, **options):
    settings = {"resolution": 32, "batch_size": 2, "num_workers": 0, "shuffle_window": 16, "flip_probability": 0.5}
    shards = [str(PAIRS / f"train/0000{i}.tar") for i in range(2)]  # 52 pairs
    return PreferenceDataModule(shards, str(PAIRS / "held_out/00002.tar"), seed=seed, **{**settings, **options})


def fit(module, data, folder, steps, ckpt_path=None, callbacks=(), **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=options.pop("logger", False),
        enable_checkpointing=any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, L.pytorch.callbacks.ProgressBar) for c in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **{"limit_val_batches": 0, **options},
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(module):
    return {name: p.detach().clone() for name, p in module.backbone.trainable_parameters().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Recorder(L.Callback):
    """Numbers of the pairs of every batch."""

    def __init__(self):
        self.pairs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pairs.append(batch.number.tolist())


class KeepLogs(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def keep_all(folder, **options):
    return L.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **options)


def held_out_errors(module, batches=2):
    """Chosen errors of the held-out pairs by their numbers, without the callback."""
    data = make_data(batch_size=4)
    data.setup("fit")
    module.backbone.eval()
    errors = {}
    with torch.no_grad():
        for _, batch in zip(range(batches), data.val_dataloader(), strict=False):
            policy, _ = module.errors(batch, module.validation_draw(batch, 0), batch.prompts)
            errors |= dict(zip(batch.number.tolist(), policy.chosen.tolist(), strict=True))
    return torch.tensor([errors[number] for number in sorted(errors)])
