"""Which of several processes this is, by what torchrun and SLURM leave in the environment, and whether that is true."""

import os
import socket
from typing import NamedTuple

from lit_align.user_errors import UserRuntimeError

ANSWER = 10.0  # seconds until torchrun's agent has accepted a connection
SHELLS = ("bash", "interactive")  # names of SLURM jobs in which Lightning starts no process of a group either
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # it sets these for each process
STARTED = "LOCAL_RANK"  # where it is set, Lightning takes all processes for started
MACHINES = ("NODE_RANK", "GROUP_RANK")  # 0 is the first machine, as without them


class Seat(NamedTuple):
    """Place of this process among those that a launcher has started."""

    rank: int
    world_size: int
    local_rank: int  # on its machine


def seat_of() -> Seat | None:
    """This process's seat, as torchrun or SLURM gave it; None without either.

    Raises:
        UserRuntimeError: if the variables promise several processes and only this one was started.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _torchrun()
    return _slurm() if int(os.environ.get("SLURM_NTASKS", 1)) > 1 else None


def _torchrun() -> Seat:
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise UserRuntimeError(
            f"TORCHELASTIC_RUN_ID is set, but {missing[0]} is not: a variable of an earlier torchrun is left over. "
            "Unset it (unset TORCHELASTIC_RUN_ID), or start this command with torchrun."
        )
    seat = Seat(*(int(os.environ[name]) for name in TORCHRUN))
    if seat.world_size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
        try:
            socket.create_connection(address, ANSWER).close()
        except OSError as error:
            raise UserRuntimeError(
                f"TORCHELASTIC_RUN_ID is set and WORLD_SIZE is {seat.world_size}, but no torchrun answers at "
                f"{address[0]}:{address[1]} ({error}): variables of an earlier torchrun are left over. Unset them "
                "(unset TORCHELASTIC_RUN_ID RANK LOCAL_RANK WORLD_SIZE), or start this command with torchrun."
            ) from error
    return seat


def _slurm() -> Seat | None:
    """The seat of a task that srun has started; None in an interactive shell, where this process works alone.

    The script of a batch job has the variables of the job's first task too, and no step of its own.
    """
    tasks = int(os.environ["SLURM_NTASKS"])
    if _is_shell(tasks):
        return None
    rank = int(os.environ["SLURM_PROCID"])
    if rank == 0 and "SLURM_STEP_NUM_TASKS" not in os.environ:
        raise UserRuntimeError(
            f"SLURM_NTASKS is {tasks}, but srun has not started this process: it would do one share of {tasks}, and "
            "nobody the others. Put srun before the command (srun lit-align ...), or ask sbatch for one task "
            "(--ntasks=1): it works on all GPUs that it sees."
        )
    return Seat(rank, tasks, int(os.environ["SLURM_LOCALID"]))


def _is_shell(tasks: int) -> bool:
    """Whether this is a shell of salloc or of `srun --pty`, in which commands do not run once for each task.

    The name of a job is that of its shell also in the steps that srun starts from there.
    """
    step = os.environ.get("SLURM_STEP_NUM_TASKS")
    shell_of_pty = "SLURM_PTY_PORT" in os.environ and os.environ.get("SLURM_TASK_PID") != str(os.getpid())
    return (
        "SLURM_PROCID" not in os.environ
        or (step is None and os.environ.get("SLURM_JOB_NAME") in SHELLS)
        or int(step or tasks) == 1
        or shell_of_pty
    )


def check_ranks(own: str) -> None:
    """Refuse ranks in the environment of a process that no launcher has started, before it shares work out.

    Args:
        own: variable that this command gives to the processes that it starts itself.

    Raises:
        UserRuntimeError: naming the variables; this process would take itself for one of several that nobody starts.
    """
    found = [name for name in MACHINES if os.environ.get(name, "0") != "0"]
    found += [STARTED] if STARTED in os.environ else []
    if found and own not in os.environ:
        raise UserRuntimeError(
            f"{found[0]} is {os.environ[found[0]]}, but neither torchrun nor srun has started this process: the "
            f"variable is left over, and nobody would do the other shares. Unset it (unset {' '.join(found)}), start "
            "the command with torchrun or srun, or give --devices 1."
        )
