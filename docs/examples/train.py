"""Train without the command line: MaPO on the bundled pairs. Run it from the root of the repository."""

import argparse

import lightning as L
from torch.optim import AdamW

from lit_align.backbones import StableDiffusionXL
from lit_align.callbacks import ChosenErrorRise, StartBanner, StepProgress, Throughput
from lit_align.data import PreferenceDataModule
from lit_align.objectives import MaPO
from lit_align.training.module import AlignmentModule

PAIRS = "assets/emoji/pairs/high_contrast-over-color"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--output", default="runs/python")
    options = parser.parse_args()

    L.seed_everything(0)
    data = PreferenceDataModule(
        train_shards=f"{PAIRS}/train/*.tar",
        val_shards=f"{PAIRS}/held_out/*.tar",
        resolution=32,
        batch_size=16,
        num_workers=0,
        flip_probability=0.0,
    )
    module = AlignmentModule(
        backbone=StableDiffusionXL(repo="assets/emoji/pipeline"),
        objective=MaPO(beta_mapo=0.1),
        optimizer=lambda parameters: AdamW(parameters, lr=1e-4),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=options.max_steps,
        default_root_dir=options.output,
        log_every_n_steps=1,
        num_sanity_val_steps=-1,  # all held-out pairs: the start that later errors are compared with
        callbacks=[StartBanner(), StepProgress(), Throughput(), ChosenErrorRise()],
    )
    trainer.fit(module, data)
    trainer.validate(module, data)
    trainer.save_checkpoint(f"{options.output}/last.ckpt", weights_only=True)


if __name__ == "__main__":
    main()
