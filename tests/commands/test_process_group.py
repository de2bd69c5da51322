"""Processes that share a piece of work: who waits for whom, and with how many threads."""

import socket
import subprocess

import pytest
import torch

from lit_align.commands.shared import process_group as group_module
from lit_align.commands.shared.launchers import check_ranks
from lit_align.commands.shared.process_group import ProcessGroup, join_process_group
from lit_align.user_errors import UserRuntimeError


def test_a_failed_process_is_an_error():
    def group(*words):
        return ProcessGroup(
            0, 1 + len(words), torch.device("cpu"), tuple(subprocess.Popen(word.split()) for word in words)
        )

    group().wait()
    group("true", "sleep 0.2").wait()
    with pytest.raises(ChildProcessError, match=r"devices: process 3 of 3 ended with exit code 1, .*--devices 1"):
        group("true", "false").wait()


def test_what_others_wrote_may_come_late(monkeypatch):
    slept = []
    monkeypatch.setattr(group_module.time, "sleep", slept.append)
    alone, one_of_two = (ProcessGroup(0, count, torch.device("cpu")) for count in (1, 2))
    found = iter([None, None, 7])
    assert one_of_two.patiently(lambda: next(found)) == 7
    assert slept == [2, 2]
    assert one_of_two.patiently(lambda: None) is None
    assert sum(slept[2:]) == 30
    assert alone.patiently(lambda: None) is None
    assert len(slept) == 17


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), ("", 1), ("3", 3), ("2,1", 2)])
def test_threads_do_not_depend_on_the_processes(monkeypatch, variable, threads):
    """Nor on the machine, unless the user says so."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = 4
    torch.set_num_threads(before)
    assert join_process_group("cpu", 1) == ProcessGroup(0, 1, torch.device("cpu"))
    assert torch.get_num_threads() == before
    join_process_group("cpu", 1, pin_threads=True)
    assert torch.get_num_threads() == threads


BATCH = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
BATCH |= {"SLURM_JOB_NAME": "score", "SLURM_NODEID": "0", "SLURM_TASK_PID": "7"}  # of a script that sbatch starts
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}


def group_in(monkeypatch, environment, devices=1):
    """Join the group with these variables alone."""
    for name in [*BATCH, *STEP, "SLURM_PTY_PORT", "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(group_module.RUN, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return join_process_group("cpu", devices)


def test_a_batch_script_without_srun_is_refused(monkeypatch):
    """It would do an eighth of the work, and end as if all were done."""
    with pytest.raises(UserRuntimeError, match=r"SLURM_NTASKS is 8, .*Put srun before the command"):
        group_in(monkeypatch, BATCH)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "mine"},  # salloc without a step of its own
        BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc in a step
        BATCH | STEP | {"SLURM_PTY_PORT": "40000"},  # srun --pty, a shell in which a command was typed
        BATCH | {"SLURM_JOB_NAME": "bash"},
        BATCH | {"SLURM_NTASKS": "1"},
    ],
    ids=["salloc", "step of salloc", "pty", "job name", "one task"],
)
def test_a_shell_of_slurm_does_all_the_work(monkeypatch, environment):
    assert group_in(monkeypatch, environment)[:2] == (0, 1)


def test_tasks_of_srun_share_the_work(monkeypatch):
    assert group_in(monkeypatch, BATCH | STEP)[:2] == (0, 8)
    assert group_in(monkeypatch, BATCH | STEP | {"SLURM_PROCID": "5"})[:2] == (5, 8)


@pytest.mark.parametrize("shell", ["bash", "interactive"])
def test_tasks_of_srun_in_a_shell_of_salloc_share_the_work(monkeypatch, shell):
    """The step has the name of the job; each of its tasks would do all the work."""
    step = BATCH | STEP | {"SLURM_JOB_NAME": shell, "SLURM_PROCID": "5"}
    assert group_in(monkeypatch, step)[:2] == (5, 8)


def test_what_torchrun_left_over_is_refused(monkeypatch):
    """With its agent alive the same variables are taken."""
    with socket.create_server(("127.0.0.1", 0)) as agent:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.getsockname()[1])}
        left = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", **address}
        left |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert group_in(monkeypatch, left)[:2] == (3, 4)
    with pytest.raises(UserRuntimeError, match=r"no torchrun answers at 127\.0\.0\.1:\d+ .*are left over"):
        group_in(monkeypatch, left)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in {"LOCAL_RANK": "0", "NODE_RANK": "1", "GROUP_RANK": "1"}.items():
        with pytest.raises(UserRuntimeError, match=f"{name} is {value}, but neither torchrun nor srun"):
            group_in(monkeypatch, {name: value}, devices=2)
    assert group_in(monkeypatch, {"LOCAL_RANK": "3"})[:2] == (0, 1)


def test_a_variable_of_torchrun_alone_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserRuntimeError, match=r"TORCHELASTIC_RUN_ID is set, but RANK is not: .*is left over"):
        group_in(monkeypatch, {"TORCHELASTIC_RUN_ID": "none"})


@pytest.mark.parametrize("name", ["NODE_RANK", "GROUP_RANK"])
def test_the_number_of_the_first_machine_is_no_rank(monkeypatch, name):
    """Some clouds set it on every machine."""
    monkeypatch.setenv(name, "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    check_ranks("NONE_OF_OURS")
