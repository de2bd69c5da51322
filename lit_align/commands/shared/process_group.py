"""Which process this is among those that share a piece of work, and where it computes."""

import os
import time
import uuid
from collections.abc import Callable
from subprocess import Popen
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment

from lit_align.commands.shared.launchers import Seat, check_ranks, seat_of

LOOKS, PAUSE = 15, 2.0  # seconds: half a minute, by which network disks show what others have written
ALONE = "If none is running, run the same command again."  # where others are waited for
OTHERS = "Other processes are at work on them."
# What tells two runs apart: torchrun's id may be the default `none`, but two masters do not share address and port.
RUN = "LIT_ALIGN_PROCESS_RUN"  # names the run of a command to the processes that it starts
RUN_VARIABLES = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
T = TypeVar("T")


class ProcessGroup(NamedTuple):
    """The processes that share the work of one command, as seen by one of them."""

    rank: int
    world_size: int
    device: torch.device  # where this process computes
    children: tuple[Popen[bytes], ...] = ()  # the other processes, if this one has started them
    run: str | None = None  # equal in all processes; none: this process is alone

    def __str__(self) -> str:
        return f"process {self.rank + 1} of {self.world_size}, {self.device}"

    def wait(self) -> None:
        """Wait for the processes that this one has started: what comes after the command needs the work of all.

        Raises:
            ChildProcessError: if one of them failed.
        """
        codes = [child.wait() for child in self.children]
        failed = [number for number, code in enumerate(codes, 2) if code]
        if failed:
            raise ChildProcessError(
                f"devices: process {failed[0]} of {self.world_size} ended with exit code {codes[failed[0] - 2]}, see "
                "above what it said. Run the same command again to go on; with --devices 1 there is this process alone."
            )

    def say_whole(self, missing: int, of: int, what: str, whole: str) -> None:
        """Print that the output is whole, or how much of it other processes still have to write.

        Args:
            missing: parts that are not there.
            of: parts of the whole output.
            what: name of the parts.
            whole: what to print if none is missing.
        """
        if self.rank > 0 and os.environ.get(RUN) == self.run is not None:
            return  # the first process has started this one, waits for it, and speaks for both
        print(whole if not missing else f"{self}: {missing} of {of} {what} are still to come. {OTHERS} {ALONE}")

    def patiently(self, look: Callable[[], T | None]) -> T | None:
        """Return what `look` finds; with several processes, look again for a while before giving up."""
        for _ in range(LOOKS if self.world_size > 1 else 0):
            if (found := look()) is not None:
                return found
            time.sleep(PAUSE)
        return look()


def join_process_group(accelerator: str, devices: int | str, pin_threads: bool = False) -> ProcessGroup:
    """This process's group among those that torchrun or SLURM has started, or that Fabric starts here.

    The processes need no process group: they only share out the work.

    Args:
        accelerator: `auto`, `cpu` or `gpu`.
        devices: of this machine, a number, or `auto` for all.
        pin_threads: compute on the CPU with as many threads as OMP_NUM_THREADS says, or else with one. Torch's own
            choice depends on the number of processes, and how it rounds on the number of threads.
    """
    threads = (os.environ.get("OMP_NUM_THREADS") or "1").split(",")[0]  # before Fabric sets it
    group = _join(accelerator, devices)
    if pin_threads and group.device.type == "cpu":
        torch.set_num_threads(int(threads))
    return group


def _join(accelerator: str, devices: int | str) -> ProcessGroup:
    seat = seat_of()
    if seat is not None:
        return _launched(accelerator, seat)
    fabric = Fabric(accelerator=accelerator, devices=devices, plugins=[LightningEnvironment()])
    if fabric.world_size > 1:
        check_ranks(RUN)
    own = os.environ.setdefault(RUN, uuid.uuid4().hex) if fabric.world_size > 1 else None  # processes inherit it
    fabric.launch()
    children = getattr(fabric.strategy.launcher, "procs", [])  # that of one device is None
    return ProcessGroup(fabric.global_rank, fabric.world_size, fabric.device, tuple(children), own)


def _launched(accelerator: str, seat: Seat) -> ProcessGroup:
    # A task may see all GPUs of its machine, or its own alone.
    visible = torch.cuda.device_count() if accelerator != "cpu" else 0
    one: Any = [seat.local_rank % visible] if visible else 1
    fabric = Fabric(accelerator=accelerator, devices=one, plugins=[LightningEnvironment()])
    run = " ".join(os.environ.get(name, "") for name in RUN_VARIABLES)
    return ProcessGroup(seat.rank, seat.world_size, fabric.device, run=run)
