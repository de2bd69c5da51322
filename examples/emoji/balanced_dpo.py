"""Does the vote align? DiffusionDPO and BalancedDPO on the bundled pairs, win rates against the base.

    python examples/emoji/balanced_dpo.py --jobs 2

Three methods: DiffusionDPO on the human label, BalancedDPO (the vote of three scorers) with a static reference, and
with one that is copied from the policy on a schedule. First beta_dpo and the learning rate are chosen on a small grid,
by the macro win rate of BalancedDPO with the static reference on training prompts; all methods take them over. Then
each method runs with three seeds, and is measured on the held-out prompts. Every run is kept in `--output`, so a killed
comparison goes on where it stopped.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from measure import held_out_pairs
from PIL import Image, ImageDraw
from win_rates import PROMPTS, SCORERS, compare, summarize

from lit_align.common.files import write_png

CONFIG = Path("configs/quickstart_balanced_dpo.yaml")
TRAINING_PROMPTS = PROMPTS.replace("held_out", "train")
METHODS = {
    "human": "DiffusionDPO, human label",
    "static": "BalancedDPO, static reference",
    "moving": "BalancedDPO, moving reference",
}
BETAS, RATES, SEEDS = (1000.0, 5000.0), (3e-6, 1e-5), (0, 1, 2)
HEAD, GRID_MARGIN = 16, 90  # pixels above and left of the images in draw_grid's pictures
STEPS, UPDATE_EVERY = 100, 25
TUNING_PROMPTS, REPEATS = 72, 4


class Run(NamedTuple):
    """One training, and the prompts it is measured on."""

    method: str
    beta: float
    rate: float
    seed: int
    held_out: bool

    @property
    def name(self) -> str:
        prompts = "held_out" if self.held_out else "tuning"
        return f"{prompts}-{self.method}-beta{self.beta:g}-lr{self.rate:g}-seed{self.seed}"

    def config(self, folder: Path) -> dict[str, Any]:
        """The quickstart's config with this run's settings."""
        config = yaml.safe_load(CONFIG.read_text())
        model, data, trainer = config["model"], config["data"], config["trainer"]
        config["seed_everything"] = self.seed
        model["optimizer"]["init_args"]["lr"] = self.rate
        model["objective"]["init_args"]["beta_dpo"] = self.beta
        model["objective"]["class_path"] = "DiffusionDPO" if self.method == "human" else "BalancedDPO"
        if self.method == "human":
            data["vote"] = None
        checkpoint = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_train_steps": STEPS}
        callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}]
        if self.method == "moving":
            callbacks.append({"class_path": "ReferenceUpdate", "init_args": {"every_n_steps": UPDATE_EVERY}})
        trainer |= {"max_steps": STEPS, "val_check_interval": STEPS, "callbacks": callbacks}
        trainer["logger"]["init_args"] = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
        return config


def result_of(run: Run, output: Path) -> Path:
    return output / run.name / "result.json"


def execute(run: Run, output: Path) -> None:
    """Train, export, measure; the wins of every prompt are kept."""
    folder = output / run.name
    folder.mkdir(parents=True, exist_ok=True)
    config, unet = folder / "run.yaml", folder / "unet"
    config.write_text(yaml.safe_dump(run.config(folder)))
    begun = time.monotonic()
    lit_align = [sys.executable, "-m", "lit_align"]
    subprocess.run([*lit_align, "fit", f"--config={config}"], check=True)
    seconds = time.monotonic() - begun
    checkpoint = folder / "last.ckpt"
    subprocess.run([*lit_align, "export", f"--ckpt_path={checkpoint}", f"--output={unet}", "--overwrite"], check=True)
    prompts = held_out_pairs(PROMPTS)[0] if run.held_out else held_out_pairs(TRAINING_PROMPTS)[0][:TUNING_PROMPTS]
    won = compare(unet, prompts, REPEATS if run.held_out else 1, output, folder / "before-after.png")
    found = {"win_rates": summarize(won), "wins": won.tolist(), "seconds": seconds, **run._asdict()}
    part = result_of(run, output).with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(result_of(run, output))
    checkpoint.unlink()


def complete(runs: list[Run], output: Path, jobs: int) -> dict[Run, dict[str, Any]]:
    """Results of all runs; those that are missing are executed, `jobs` at a time."""
    missing = [run for run in runs if not result_of(run, output).exists()]
    print(f"{len(runs)} runs, {len(missing)} to do", flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})

    def start(run: Run) -> None:
        (output / run.name).mkdir(parents=True, exist_ok=True)
        words = [sys.executable, __file__, "--output", str(output), "--only", json.dumps(run._asdict())]
        with (output / run.name / "log.txt").open("w") as log:
            subprocess.run(words, check=True, stdout=log, stderr=log, env=environment)
        rates = json.loads(result_of(run, output).read_text())["win_rates"]
        shown = ", ".join(f"{name} {rates[name][0]:.1%}" for name in (*SCORERS, "macro"))
        print(f"{run.name}: {shown}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, missing))
    return {run: json.loads(result_of(run, output).read_text()) for run in runs}


def choose(output: Path, jobs: int) -> Run:
    """The run with the best macro win rate on training prompts."""
    grid = [Run("static", beta, rate, 0, False) for beta, rate in itertools.product(BETAS, RATES)]
    found = complete(grid, output, jobs)
    return max(grid, key=lambda run: found[run]["win_rates"]["macro"][0])


def table(found: dict[Run, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Win rates of each method over seeds and held-out prompts, as Markdown and as plain values."""
    names = (*SCORERS, "macro")
    lines = [f"| | {' | '.join(names)} | macro by seed |", "|---" * 6 + "|", "| base | 50 | 50 | 50 | 50 | |"]
    values: dict[str, Any] = {}
    won: dict[str, torch.Tensor] = {}  # by method: (scorers, prompts), mean over seeds
    for method, title in METHODS.items():
        runs = [run for run in found if run.method == method]
        won[method] = torch.tensor([found[run]["wins"] for run in runs], dtype=torch.float64).mean(0)
        rates = summarize(won[method])
        seeds = [found[run]["win_rates"]["macro"][0] for run in runs]
        values[method] = {"win_rates": rates, "macro_by_seed": seeds}
        values[method] |= {"seconds": [found[run]["seconds"] for run in runs]}
        cells = [f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})" for mean, low, high in rates.values()]
        by_seed = ", ".join(f"{100 * seed:.1f}" for seed in seeds)
        lines.append(f"| {title} | {' | '.join(cells)} | {by_seed} |")
    values["moving_minus_static"] = summarize(won["moving"] - won["static"])
    changes = {name: [100 * x for x in change] for name, change in values["moving_minus_static"].items()}
    shown = [f"{name} {mean:+.1f} ({low:+.1f} to {high:+.1f})" for name, (mean, low, high) in changes.items()]
    lines += ["", f"moving minus static, by prompt: {', '.join(shown)}"]
    return "\n".join(lines) + "\n", values


def draw_methods(best: Run, output: Path, path: Path) -> None:
    """The same prompts and noise by the base and by each method, from the pictures of the first seed's runs."""
    pictures = {}
    for method, title in METHODS.items():
        run = best._replace(method=method, seed=SEEDS[0], held_out=True)
        pictures[title] = Image.open(output / run.name / "before-after.png").convert("RGB")
    first = next(iter(pictures.values()))
    width, row = first.width, (first.height - HEAD) // 2
    sheet = Image.new("RGB", (width, HEAD + row * (1 + len(pictures)) + HEAD * len(pictures)), "white")
    sheet.paste(first.crop((0, 0, width, HEAD + row)), (0, 0))
    pen, top = ImageDraw.Draw(sheet), HEAD + row
    for title, picture in pictures.items():
        pen.text((GRID_MARGIN, top + 2), title, fill="black")
        sheet.paste(picture.crop((GRID_MARGIN, HEAD + row, width, HEAD + 2 * row)), (GRID_MARGIN, top + HEAD))
        top += HEAD + row
    write_png(path, sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/balanced_dpo"))
    parser.add_argument("--record", type=Path, help="file for the results, JSON; a picture beside it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on one thread each if more than one")
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)  # one run, for the processes started here
    arguments = parser.parse_args()
    if arguments.only:
        execute(Run(**arguments.only), arguments.output)
        return
    best = choose(arguments.output, arguments.jobs)
    print(f"beta_dpo {best.beta:g}, learning rate {best.rate:g}", flush=True)
    runs = [best._replace(method=method, seed=seed, held_out=True) for method in METHODS for seed in SEEDS]
    text, values = table(complete(runs, arguments.output, arguments.jobs))
    values |= {"beta_dpo": best.beta, "learning_rate": best.rate}
    print(
        f"\nwin rates against the base in %, held-out prompts, {len(SEEDS)} seeds, {REPEATS} images a prompt\n\n{text}"
    )
    if arguments.record:
        arguments.record.write_text(json.dumps(values, indent=2) + "\n")
        draw_methods(best, arguments.output, arguments.record.with_suffix(".png"))


if __name__ == "__main__":
    main()
