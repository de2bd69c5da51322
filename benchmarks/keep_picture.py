"""Train plain DPO, with a share of the chosen error and with the winner guard, at a rate a little too high.

python benchmarks/keep_picture.py --output runs/keep_picture [--seeds 0 1] [--record FILE]

The bundled model and pairs, 60 steps of 8 pairs, AdamW at 6e-5, beta 5000. What differs is the objective alone. A run
that is there already is not made again. It prints a table, and writes a grid of the pictures of 12 prompts.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from lit_align.callbacks.sample_grid import draw_grid
from lit_align.common.files import write_png, write_text
from lit_align.data.decoder import decode_pixels
from lit_align.data.images import to_planes

ROOT = Path(__file__).parents[1]
DPO, RATE, STEPS, PAIRS, SHOWN = "lit_align.objectives.DiffusionDPO", 6e-5, 60, 8, 12
INNER = {"class_path": DPO, "init_args": {"beta_dpo": 5000.0}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": INNER,
    "mix": {"class_path": DPO, "init_args": {"beta_dpo": 5000.0, "sft_mix": 0.25}},
    "guard": {"class_path": "lit_align.objectives.WinnerGuard", "init_args": {"objective": INNER, "mu": 0.9}},
}


def lit_align(*words: str) -> None:
    """Run a command; what it prints is shown."""
    subprocess.run([sys.executable, "-m", "lit_align", *words], cwd=ROOT, check=True)


def train(name: str, seed: int, output: Path) -> Path:
    """Train unless the checkpoint is there, and return it."""
    folder = output / f"{name}-{seed}"
    checkpoint = folder / "last.ckpt"
    if not (checkpoint.is_file() and validated(folder)):
        saving = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_train_steps": STEPS}
        keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
        rise = {"class_path": "lit_align.callbacks.ChosenErrorRise"}
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": ""},
        }
        lit_align(
            "fit", f"--config={ROOT / 'configs/quickstart.yaml'}", f"--seed_everything={seed}",
            f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}",
            f"--trainer.callbacks={json.dumps([keep, rise])}", f"--trainer.logger={json.dumps(logger)}",
            f"--model.objective={json.dumps(OBJECTIVES[name])}",
            f"--model.optimizer.init_args.lr={RATE}", f"--data.batch_size={PAIRS}", "--ckpt_path=last",
        )  # fmt: skip
    return checkpoint


def validated(folder: Path) -> list[dict[str, str]]:
    """Read the rows of the validations after the start."""
    rows = [row for path in folder.rglob("metrics.csv") for row in csv.DictReader(path.read_text().splitlines())]
    return [row for row in rows if row.get("val/chosen_error_rise")]


def held_out(output: Path, name: str, seed: int) -> dict[str, float]:
    """Read the values of the last validation."""
    rows = validated(output / f"{name}-{seed}")
    wanted = ("val/chosen_error_rise", "val/accuracy", "val/chosen_drift", "val/rejected_drift")
    return {key.removeprefix("val/"): float(rows[-1][key]) for key in wanted}


def draw(output: Path, models: list[str]) -> None:
    """Write a grid of the base's and all models' images of the first prompts."""
    results = json.loads((output / "test/results.json").read_text())
    prompts = [row["prompt"] for row in results["prompts"]][:SHOWN]
    rows = {}
    for model in ("base", *models):
        files = sorted((output / "test/images" / model).glob("*.png"))[:SHOWN]
        rows[model] = list(torch.stack([to_planes(decode_pixels(path.read_bytes())) for path in files]))
    write_png(output / "pictures.png", draw_grid(prompts, rows, cell=64))


def main() -> None:
    """Train, draw, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--record", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    runs = [(name, seed) for seed in arguments.seeds for name in OBJECTIVES]
    checkpoints = {f"{name}-{seed}": str(train(name, seed, output)) for name, seed in runs}
    presets = yaml.safe_load((ROOT / "assets/emoji/scorers/scorers.yaml").read_text())
    presets["high_contrast"] = {"class_path": "lit_align.scoring.HighContrast"}
    write_text(output / "scorers.yaml", yaml.safe_dump(presets))
    lit_align(
        "test", f"--config={ROOT / 'configs/test/emoji.yaml'}", f"--models={json.dumps(checkpoints)}",
        f"--output={output / 'test'}", f"--presets={output / 'scorers.yaml'}", "--scorers=[high_contrast,clip]",
        "--devices=1", f"--cache={output / 'cache'}",
    )  # fmt: skip
    comparisons = json.loads((output / "test/results.json").read_text())["comparisons"]
    compared = {one["model"]: one["scorers"] for one in comparisons if one["against"] == "base"}
    record = {}
    print("| objective, seed | chosen error | accuracy | high contrast | CLIP wins against the base |")
    print("|---|---|---|---|---|")
    for name, seed in runs:
        values, scorers = held_out(output, name, seed), compared[f"{name}-{seed}"]
        values |= {"style": scorers["high_contrast"]["mean"], "clip_wins": scorers["clip"]["win_rate"]}
        record[f"{name}-{seed}"] = values
        print(
            f"| {name}, {seed} | {values['chosen_error_rise']:+.0%} | {values['accuracy']:.0%} | {values['style']:.0%} "
            f"| {values['clip_wins']:.0%} |"
        )
    draw(output, list(checkpoints))
    if arguments.record:
        write_text(arguments.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
