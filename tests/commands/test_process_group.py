"""Processes that share a piece of work: who waits for whom, and with how many threads."""

import subprocess

import pytest
import torch

from lit_align.commands.shared import process_group as group_module
from lit_align.commands.shared.process_group import ProcessGroup, join_process_group


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
