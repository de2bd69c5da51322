"""Folders that one run of a command works in at a time."""

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import threading
import time
from contextlib import ExitStack

import pytest

from lit_align.common.lock import folder_turn, locked_folder
from lit_align.user_errors import UserRuntimeError


def hold(folder, run, ready):
    with locked_folder(folder, "encode", run):
        ready.set()
        time.sleep(60)


def holder(folder, run):
    """Another process that holds the folder."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold, args=(folder, run, ready := context.Event()))
    process.start()
    assert ready.wait(60)
    return process


def test_processes_of_one_run_share_a_folder_that_others_are_kept_out_of(tmp_path):
    folder = tmp_path / "new"
    with locked_folder(folder, "encode", "one"), locked_folder(folder, "encode", "one"):
        for run in ("other", None):
            message = r"another lit-align encode writes to .*new\. Wait until it has ended, or choose another"
            with pytest.raises(UserRuntimeError, match=message), locked_folder(folder, "encode", run):
                pytest.fail("two runs in one folder")
        with locked_folder(folder, "score"):  # another command
            pass
        assert [path.name for path in folder.iterdir()] == [".encode.lock"]
    assert list(folder.iterdir()) == []
    with locked_folder(folder, "encode", "other"):
        pass


def test_a_lock_ends_with_its_last_process(tmp_path):
    """Ended in order, or killed, which leaves a file that keeps nobody out."""
    with ExitStack() as stack:
        first = holder(tmp_path, "one")
        stack.callback(first.kill)
        with locked_folder(tmp_path, "encode", "one"):
            pass
        with pytest.raises(UserRuntimeError), locked_folder(tmp_path, "encode", "two"):
            pass
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    assert (tmp_path / ".encode.lock").read_text() == "one"
    with locked_folder(tmp_path, "encode", "two"):
        assert (tmp_path / ".encode.lock").read_text() == "two"
    assert list(tmp_path.iterdir()) == []


def test_turns_come_one_after_the_other(tmp_path):
    """Eight threads, each of which deletes the lock's file that others wait for."""
    inside, most = 0, 0

    def take_turns():
        nonlocal inside, most
        for _ in range(20):
            with folder_turn(tmp_path, "score"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0002)
                inside -= 1

    threads = [threading.Thread(target=take_turns) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), locked_folder(tmp_path, "encode"), folder_turn(tmp_path, "score"):
        pass
    assert caplog.text.count("cannot be locked ([Errno 38] Function not implemented). Start no second command") == 2
    assert list(tmp_path.iterdir()) == []
