"""Watch a training from outside: the CPU seconds of its process at each step, and its peak memory (Linux)."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import lightning as L

from benchmarks.accelerator_record import Facts

STEP = re.compile(rb"Steps:[^\r\n]*?(\d+)/\d+")  # of a bar of tqdm whose name is Steps, and of `mark`
TAIL = 400  # bytes, longer than a bar's line


def mark(step: int, steps: int) -> None:
    """Say on stderr that a step has ended."""
    print(f"Steps: {step}/{steps}", file=sys.stderr, flush=True)


class StepMarks(L.Callback):
    """Marks the end of each step of a training by Lightning."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        mark(trainer.global_step, int(trainer.max_steps))


def watch(
    command: Sequence[str | Path], steps: int, log: Path, cwd: Path, env: Mapping[str, str], seconds: float
) -> Facts:
    """Run a training that says `Steps: n/N` after each step, and return what a step costs and the peak memory.

    The first step is not counted: it makes the optimizer's state and warms caches.

    Args:
        command: of the training, which works in one process.
        steps: that it makes, at least 2.
        log: file for what it prints.
        cwd: folder in which it runs.
        env: its environment.
        seconds: after which it is killed.

    Raises:
        RuntimeError: if it fails, or if steps are missing in what it prints.
    """
    times: dict[int, float] = {}
    process = subprocess.Popen(command, cwd=cwd, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    timer = Timer(seconds, process.kill)
    timer.start()
    try:
        with log.open("wb") as file:
            tail, peak = b"", 0
            while data := os.read(process.stdout.fileno(), 65536):
                file.write(data)
                tail += data
                for step in STEP.findall(tail):
                    if int(step):
                        times.setdefault(int(step), cpu_seconds(process.pid))
                peak = max(peak, peak_bytes(process.pid))
                tail = tail[-TAIL:]
        _, status, usage = os.wait4(process.pid, 0)  # its peak of memory may be that of this process, before the fork
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        timer.cancel()
        process.stdout.close()
    if process.returncode or not {1, steps} <= times.keys():
        said = log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"exit code {process.returncode}, steps {sorted(times)} of {steps}: {said}")
    each = [times[step] - times[step - 1] for step in range(2, steps + 1)]
    return {
        "CPU s a step": (times[steps] - times[1]) / (steps - 1),
        "fastest": min(each),
        "slowest": max(each),
        "peak GB": peak / 1e9,
        "CPU s in all": usage.ru_utime + usage.ru_stime,
    }


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that all threads of a process have used: user's and system's, to a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes(process: int | str = "self") -> int:
    """Return the most main memory that a process has ever held, in bytes; 0 once it has ended. Linux only."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
