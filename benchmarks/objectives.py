"""Compare preference objectives on the bundled emoji, and check the claims of two papers.

    python benchmarks/objectives.py --jobs 2 --record benchmarks/objectives.json

Study `mismatch` (MaPO, arXiv 2406.06424: its advantage over DPO grows with the distance between the preferred images
and what the model draws): SFT, DiffusionDPO, both forms of MaPO and BalancedDPO prefer the high-contrast style, from
two bases: the bundled model, which draws it half of the time, and one that MaPO first turned away from it.

Study `votes` (BalancedDPO, arXiv 2503.12575: the vote keeps every metric from losing, and a moving reference helps):
DPO on pairs of both preferences, ordered by each single scorer, by the baselines `vanilla`, `normalized` and `random`,
and by the majority of three scorers with a static and with a moving reference.

All trainings have equal numbers of steps and of pairs per step; pairs on which a vote is undecided are left out. Each
method's learning rate is the one with the best score on training prompts with the first seed. All methods try equal
rates, and further ones as long as the best lies at an end of those tried. Then all seeds are measured on held-out
prompts. Every part (a training, a measurement) is kept in `--output`, so a killed comparison resumes where it stopped.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # worker processes find `benchmarks` too

from benchmarks import alignment_parts as parts
from benchmarks import alignment_runs as runs
from benchmarks import alignment_tables as tables
from benchmarks.alignment_conclusions import Aligned, Findings, record
from benchmarks.alignment_runs import Run
from benchmarks.alignment_studies import BETA_DPO, BETA_PAPER, STUDIES, TOLERANCES, UPDATE_EVERY, next_rate

SEEDS = (0, 1, 2)


def make(run: Run, split: str, output: Path) -> None:
    """Measure a run, after its training if that is missing."""
    if run.method != "base" and not (run.folder(output) / parts.TRAINED).exists():
        parts.train(run, output)
    parts.measure(run, output, split)


def result_of(run: Run, split: str, output: Path) -> Path:
    """File of a measurement."""
    return run.folder(output) / f"{split}.json"


def complete(wanted: list[tuple[Run, str]], output: Path, jobs: int) -> None:
    """Make the missing measurements, `jobs` at a time."""
    missing = [(run, split) for run, split in wanted if not result_of(run, split, output).exists()]
    if not missing:
        return
    begun, spawn = time.monotonic(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=runs.settle) as pool:
        waiting = {pool.submit(make, run, split, output): (run, split) for run, split in missing}
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            run, split = waiting[future]
            left = (time.monotonic() - begun) / done * (len(missing) - done) / 60
            name = run.folder(output).relative_to(output)
            print(f"{split} {name}: {done} of {len(missing)}, {left:.0f} min left of these", flush=True)


def read(run: Run, split: str, output: Path) -> dict[str, Any]:
    """Read a measurement."""
    found: dict[str, Any] = json.loads(result_of(run, split, output).read_text(encoding="utf-8"))
    return found


def tune(name: str, output: Path, jobs: int) -> dict[tuple[str, str], dict[float, float]]:
    """Worth of each learning rate that was tried, in rising order, on training prompts; by base and method."""
    study = STUDIES[name]
    tried = {pair: list(study.rates) for pair in product(study.bases, study.methods)}
    while True:
        runs_ = [Run(name, *pair, rate, SEEDS[0]) for pair, rates in tried.items() for rate in rates]
        complete([(run, "tuning") for run in runs_], output, jobs)
        worths = {
            pair: {rate: worth(Run(name, *pair, rate, SEEDS[0]), output) for rate in sorted(tried[pair])}
            for pair in tried
        }
        further = {pair: rate for pair in tried if (rate := next_rate(worths[pair])) is not None}
        if not further:
            return worths
        for pair, rate in further.items():
            tried[pair].append(rate)


def worth(run: Run, output: Path) -> float:
    """Measure by which the learning rate of a run is chosen."""
    before = read(Run(run.study, run.base, "base", 0.0, 0), "tuning", output)
    return tables.worth(read(run, "tuning", output), before, TOLERANCES, STUDIES[run.study].style_counts)


def investigate(name: str, output: Path, jobs: int) -> Findings:
    """Make the missing parts of a study, and read all."""
    study = STUDIES[name]
    bases = {base: Run(name, base, "base", 0.0, 0) for base in study.bases}
    complete([(run, split) for run in bases.values() for split in ("tuning", "held_out")], output, jobs)
    worths = tune(name, output, jobs)
    chosen = {pair: max(found, key=found.__getitem__) for pair, found in worths.items()}
    final = {pair: [Run(name, *pair, rate, seed) for seed in SEEDS] for pair, rate in chosen.items()}
    complete(
        [(run, "held_out") for number in range(len(SEEDS)) for run in (r[number] for r in final.values())], output, jobs
    )
    aligned: dict[str, dict[str, Aligned]] = {base: {} for base in bases}
    for (base, method), seeds in final.items():
        found = [read(run, "held_out", output) for run in seeds]
        about = json.loads((seeds[0].folder(output) / parts.TRAINED).read_text(encoding="utf-8"))
        by_rate = {f"{rate:g}": worth for rate, worth in worths[base, method].items()}
        picture = seeds[0].folder(output) / "held_out.png"
        aligned[base][method] = Aligned(chosen[base, method], by_rate, found, about["pairs"], picture)
    before = {base: read(run, "held_out", output) for base, run in bases.items()}
    return Findings(before, {base: run.folder(output) / "held_out.png" for base, run in bases.items()}, aligned)


def count_costs(output: Path) -> dict[str, Any]:
    """Measure time and memory of each method of the first study, one after the other."""
    path = output / "costs.json"
    if not path.exists():
        found = {}
        for method in STUDIES["mismatch"].methods:
            with ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn"), initializer=runs.settle
            ) as alone:
                found[STUDIES["mismatch"].methods[method].title] = alone.submit(parts.cost, method, output).result()
        runs.write_json(path, found)
    costs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return costs


def settings_of(output: Path) -> dict[str, Any]:
    """Settings of all parts, also written into the folder.

    Raises:
        ValueError: if the folder was begun with other settings, whose parts do not fit these.
    """
    settings: dict[str, Any] = {
        "steps": runs.STEPS,
        "pairs_a_step": runs.BATCH,
        "seeds": list(SEEDS),
        "beta_dpo": BETA_DPO,
        "beta_paper": BETA_PAPER,
        "reference_copied_every": UPDATE_EVERY,
        "turned_by": [parts.TURN_STEPS, parts.TURN_RATE],
        "tuning_prompts": runs.TUNING_PROMPTS,
        "sampling_steps": runs.SAMPLING_STEPS,
        "guidance_scale": runs.GUIDANCE,
        "tolerances": TOLERANCES,
        "methods": {name: {key: str(m.vote) for key, m in study.methods.items()} for name, study in STUDIES.items()},
    }
    path = output / "settings.json"
    begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    changed = [name for name in settings if begun.get(name) != settings[name]]
    if changed:
        raise ValueError(
            f"--output {output} was begun with another {', '.join(changed)}. Name another folder, or remove this one."
        )
    runs.write_json(path, settings)
    return settings


def main() -> None:
    """Make the missing parts, then tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/objectives"), help="folder of all parts")
    parser.add_argument("--record", type=Path, help="file for the results, JSON; tables and plots beside it")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time, on one thread each")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    arguments = parser.parse_args()
    if arguments.record is not None and set(arguments.studies) != set(STUDIES):
        parser.error("--record is for all studies; leave --studies out")
    runs.settle()
    settings = settings_of(arguments.output)
    parts.prepare(arguments.output)
    studies = {name: (STUDIES[name], investigate(name, arguments.output, arguments.jobs)) for name in arguments.studies}
    costs = count_costs(arguments.output)
    settings |= {"cores": os.cpu_count()} | {name: version(name) for name in ("torch", "lightning", "diffusers")}
    print(record(studies, settings, costs, arguments.record or arguments.output / "objectives.json"))


if __name__ == "__main__":
    main()
