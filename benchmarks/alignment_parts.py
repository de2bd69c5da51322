"""The parts of the comparison of objectives. Each writes one file, and is done when the file exists."""

from pathlib import Path

from benchmarks import alignment_runs as runs
from benchmarks.alignment_runs import PRESETS, WEIGHTS, Method, Run
from benchmarks.alignment_studies import STUDIES, TOLERANCES
from lit_align.cli import main as lit_align
from lit_align.objectives import MaPO
from lit_align.scoring.vote import Vote

TURN_STEPS, TURN_RATE = 100, 1e-4  # of the training that turns the bundled model away from high contrast
COST_STEPS, COST_RATE = 30, 1e-6
TRAINED = "trained.json"


def base_weights(output: Path, base: str) -> Path | None:
    """Weights of the UNet that a training starts from; none: the bundled ones."""
    return None if base == "bundled" else output / base / WEIGHTS


def turn(output: Path) -> None:
    """Train the base of the large mismatch: MaPO with a preference for the colour images."""
    away = Method("", MaPO, Vote(["colour"], "single"))
    backbone, _ = runs.train(
        away, None, STUDIES["mismatch"].pairs, TURN_RATE, 0, stored(output, "mismatch"), TURN_STEPS
    )
    runs.save(backbone, output / "turned")


def stored(output: Path, study: str) -> dict[str, str | None]:
    """Folders of scores and latents; none: scores lie beside the shards."""
    scores = str(output / "scores") if study == "mismatch" else None
    return {"train_scores": scores, "train_cache": str(output / "cache" / study)}


def train(run: Run, output: Path) -> None:
    """Train, and write weights and facts of the training."""
    study, folder = STUDIES[run.study], run.folder(output)
    base = base_weights(output, run.base)
    where = stored(output, run.study)
    backbone, about = runs.train(study.methods[run.method], base, study.pairs, run.rate, run.seed, where)
    runs.save(backbone, folder)
    runs.write_json(folder / TRAINED, about)


def measure(run: Run, output: Path, split: str) -> None:
    """Measure a run on the prompts of a split, `tuning` or `held_out`."""
    study, folder = STUDIES[run.study], run.folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    base = base_weights(output, run.base)
    backbone = runs.load(base if run.method == "base" else folder / WEIGHTS)
    prompts = runs.prompts_of(study.pairs, split)
    found = {"prompts": prompts} | runs.look(backbone, prompts, study.scorers, folder / f"{split}.png")
    if split == "held_out":
        found["errors"] = runs.errors(backbone, study.pairs)
    runs.write_json(folder / f"{split}.json", found)


def prepare(output: Path) -> None:
    """Make scores, caches and the second base."""
    shards = f"--shards={STUDIES['mismatch'].pairs}/train/*.tar"
    scorers = [f"--scorers={','.join(TOLERANCES)}", f"--presets={PRESETS}"]
    lit_align(["score", shards, *scorers, f"--output={output}/scores", "--accelerator=cpu"])
    for name, study in STUDIES.items():
        config = ["--config=configs/quickstart.yaml", f"--data.train_shards={study.pairs}/train/*.tar"]
        lit_align(["encode", *config, f"--output={output}/cache/{name}", "--accelerator=cpu"])
    if not (output / "turned" / WEIGHTS).exists():
        turn(output)


def cost(name: str, output: Path) -> dict[str, float]:
    """Measure seconds per step and the rise of memory in training, in a process that does nothing else, on Linux."""
    method, where = STUDIES["mismatch"].methods[name], stored(output, "mismatch")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which a new process inherits
    before = peak_megabytes()
    _, about = runs.train(method, None, STUDIES["mismatch"].pairs, COST_RATE, 0, where, COST_STEPS)
    return {"step_seconds": about["seconds"], "megabytes": peak_megabytes() - before}


def peak_megabytes() -> float:
    """Peak memory of this process, in 2^20 bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
