"""The configs of the experiments, made small enough for a test."""

from pathlib import Path

import yaml

from tests.support.paths import PAIRS, PIPELINE, ROOT
from tests.support.pipelines import small_sdxl

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STORED_VOTERS = {"voters": "[clip,style,colour]", "ties": "human"}  # whose scores of the bundled pairs are stored
CPU = str(ROOT / "configs/hardware/cpu.yaml")


def small_options(config, folder, sd15, sd21):
    """Return the overrides that run a config on one CPU, with the bundled pairs and a small pipeline."""
    name = config.stem
    repo = sd15 if "sd15" in name else sd21 if "sd21" in name else small_sdxl()
    vae = PIPELINE / "vae" if "sdxl" in name else None
    votes = [f"--data.vote.{key}={value}" for key, value in STORED_VOTERS.items()] if "balanced_dpo_sd" in name else []
    return [
        f"--config={config}",
        f"--config={CPU}",
        f"--model.backbone.init_args.repo={repo}",
        *([f"--model.backbone.init_args.vae_repo={vae}"] if vae else []),
        "--model.backbone.init_args.vae_precision=fp32",
        "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accumulate_grad_batches=1",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=1",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.logger.init_args.save_dir={folder}",
        f"--data.train_shards={PAIRS}/train/0000{{0..1}}.tar",
        f"--data.val_shards={PAIRS}/held_out/00000.tar",
        "--data.resolution=32",
        "--data.batch_size=2",
        "--data.num_workers=0",
        *votes,
        *callbacks(folder, moving="balanced" in name),
    ]


def callbacks(folder, moving=False):
    """Write the config's callbacks at the size of a test; this list replaces the one in the config."""
    checkpoints = {"dirpath": f"{folder}/checkpoints", "every_n_train_steps": 1, "save_last": True}
    grid = {"prompts": ["fox", "tulip"], "every_n_steps": 1, "height": 32, "width": 32, "steps": 2}
    classes = {"lightning.pytorch.callbacks.ModelCheckpoint": checkpoints, "SampleGrid": grid}
    classes |= {"ReferenceUpdate": {"every_n_steps": 1}} if moving else {}
    listed = [{"class_path": name, "init_args": arguments} for name, arguments in classes.items()]
    path = Path(folder) / "callbacks.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}))
    return [f"--config={path}"]
