"""The doctor's estimates of trainings, beside what was measured: of shapes alone, in processes without the device."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Self

from benchmarks.accelerator_record import ROOT, Record

TOTAL = re.compile(r"^\s*total\s+([\d.,]+) (\w+) of", re.MULTILINE)  # in the doctor's report
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
MEMORY = 1000  # GB of the doctor's device, so large that it looks for no remedies


def total(report: str) -> float | None:
    """Return the bytes that a report of the doctor expects of a training; None if there is no such line."""
    found = TOTAL.search(report)
    return None if found is None else float(found[1].replace(",", "")) * UNITS[found[2]]


class Job(NamedTuple):
    """An estimate that runs."""

    stage: str
    name: str
    process: subprocess.Popen[bytes]
    report: Path


class Estimates:
    """Adds the doctor's estimates to the rows of trainings, as they come.

    At SDXL's size an estimate takes a core for up to a minute, in which the device would wait: so it is made beside the
    trainings that follow, with a lower priority, and none is waited for when time is up.

    Args:
        record: whose rows they are added to.
        work: folder for the reports.
        at_once: processes.
    """

    def __init__(self, record: Record, work: Path, at_once: int) -> None:
        self.record, self.work, self.at_once = record, work, at_once
        self.asked = 0
        self.queue: list[tuple[str, str, list[str]]] = []
        self.jobs: list[Job] = []

    def ask(self, stage: str, name: str, line: list[str]) -> None:
        """Estimate a training, once those before it are done.

        Args:
            stage: of its row.
            name: of its row, which has its peak.
            line: words of its options, whose files must not change.
        """
        self.asked += 1
        self.queue.append((stage, name, line))
        self.go_on()

    def go_on(self) -> None:
        """Add what has ended, and start what waits."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            expected = total(job.report.read_text(errors="replace"))
            if expected is not None:  # else the training's own result stays alone
                share = expected / 1e9 / self.record.row(job.stage, job.name)["peak GB"]
                self.record.add(job.stage, job.name, {"doctor's GB": expected / 1e9, "doctor/peak": share})
        while self.queue and len(self.jobs) < self.at_once:
            self._start(*self.queue.pop(0))

    def _start(self, stage: str, name: str, line: list[str]) -> None:
        report = self.work / f"doctor-{self.asked - len(self.queue)}.txt"
        command = ["nice", "-n19", sys.executable, "-m", "lit_align", "doctor", *line, f"--memory={MEMORY}"]
        own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with report.open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, stdout=file, stderr=file)
        self.jobs.append(Job(stage, name, process, report))

    def finish(self) -> None:
        """Wait for all, while time is left."""
        while (self.jobs or self.queue) and self.record.left() > 1:
            time.sleep(0.2)
            self.go_on()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End what still runs."""
        for job in self.jobs:
            job.process.kill()
            job.process.wait()
