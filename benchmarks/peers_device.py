"""Run a released script as it is, and write how fast its steps are and what they hold on their device.

python benchmarks/peers_device.py FACTS.json --skip 3 --steps 23 --pairs 2 SCRIPT [its own options]

The clock runs from the end of step `skip` to the end of step `steps`, and waits for the device at both alone, as that
of lit-align's trainings does (benchmarks/accelerator_runs.py). The script ends there, so that it saves no weights.
"""

import argparse
import json
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepClock:
    """Times the optimizer steps of this process after the first few, and ends the process after the last one.

    Args:
        facts: JSON file.
        skip: steps before the clock starts.
        steps: all of them.
        pairs: a step.
    """

    def __init__(self, facts: Path, skip: int, steps: int, pairs: int) -> None:
        self.facts, self.skip, self.steps, self.pairs = facts, skip, steps, pairs
        self.step, self.start = 0, 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Count a step, after it; the arguments are those of torch's hook."""
        self.step += 1
        if self.step == self.skip:
            self.start = _now()
        if self.step == self.steps:
            seconds = (_now() - self.start) / (self.steps - self.skip)
            found = {"pairs/s": self.pairs / seconds, "ms a step": 1000 * seconds, "peak GB": _peak() / 1e9}
            self.facts.write_text(json.dumps(found))
            raise SystemExit


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak() -> int:
    """Bytes that tensors have held of the device at once; without one, the peak of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path, help="JSON file to write")
    parser.add_argument("--skip", type=int, required=True, help="steps before the clock starts, at least one")
    parser.add_argument("--steps", type=int, required=True, help="all of them")
    parser.add_argument("--pairs", type=int, required=True, help="a step")
    parser.add_argument("script", type=Path)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the script")
    arguments = parser.parse_args()
    register_optimizer_step_post_hook(StepClock(arguments.facts, arguments.skip, arguments.steps, arguments.pairs))
    sys.argv = [str(arguments.script), *arguments.options]
    sys.path[0] = str(arguments.script.resolve().parent)  # in place of the folder of this file
    runpy.run_path(str(arguments.script), run_name="__main__")


if __name__ == "__main__":
    main()
