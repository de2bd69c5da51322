"""A SLURM cluster of two nodes on this machine."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ctld}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2
JobRequeue=1
FirstJobId={first_job}
KillWait=30
SlurmdTimeout=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=UNLIMITED State=UP
"""


def missing() -> str:
    """Return why no cluster can run here, or an empty string."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    """Return different TCP ports that are free."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class SlurmCluster:
    """Runs munged, slurmctld and a slurmd for each of the nodes `n1` and `n2`.

    Args:
        folder: for configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)  # munged wants its socket's folder to be open to all
        self.folder, self.daemons = folder, list[subprocess.Popen[bytes]]()
        self.nodes = dict[str, subprocess.Popen[bytes]]()
        ctld, n1, n2 = free_ports(3)
        first = random.SystemRandom().randrange(1000, 9000)  # ranks meet at a port that is made of the job's number
        conf = CONF.format(host=socket.gethostname(), folder=folder, ctld=ctld, n1=n1, n2=n2, first_job=first)
        (folder / "slurm.conf").write_text(conf)
        (folder / "state").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}

    def start(self) -> None:
        """Start the daemons and wait until both nodes take jobs."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder / f'munge.{name}'}" for option, name in names.items()]
        self._daemon("munged", "--foreground", "--force", *files)
        wait_for(lambda: (self.folder / "munge.socket").exists(), 20, "munged's socket")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for(lambda: self._idle() == ["idle", "idle"], 60, f"idle nodes, see the logs in {self.folder}")

    def start_node(self, node: str) -> None:
        self.nodes[node] = self._daemon("slurmd", "-D", "-N", node)

    def lose_node(self, node: str, task: int) -> None:
        """Kill what runs on a node: its slurmd, the step daemon and the task with this process id."""
        step = int(Path(f"/proc/{task}/stat").read_text().rsplit(")", 1)[1].split()[1])
        self.nodes[node].kill()
        for process in (step, task):
            os.kill(process, signal.SIGKILL)

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        self.daemons.append(process)
        return process

    def _idle(self) -> list[str]:
        return self._run("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def stop(self) -> None:
        """End all jobs and all daemons."""
        self._run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        self._run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 20
        while self._run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in reversed(self.daemons):
            process.terminate()
        for process in self.daemons:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def _run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def sbatch(self, *words: str, **environment: str) -> str:
        """Submit a job and return its number; `environment` is added to the environment of the tests."""
        names = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
        return self._run("sbatch", "--parsable", f"--export={names}", *words).strip()

    def scancel(self, *words: str) -> None:
        self._run("scancel", *words)

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`: `JobState`, `ExitCode`, `Restarts` and others."""
        line = self._run("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: str, timeout: float = 120) -> dict[str, str]:
        """Wait until a job has ended for good and return its fields, see `job`."""
        wait_for(lambda: self.state(job) in ENDED, timeout, f"job {job} to end, it is {self.job(job)}")
        return self.job(job)

    def restart(self, job: str, restarts: int, timeout: float = 60) -> None:
        """Wait until a job is queued again, and let it start now instead of after SLURM's two minutes."""
        wait_for(lambda: self.job(job)["Restarts"] == str(restarts), timeout, f"job {job} to be put back")
        wait_for(lambda: self.state(job) in ("PENDING", "RUNNING"), timeout, f"job {job} to be pending")
        time.sleep(2)  # nodes refuse a start in the second of the previous end
        if self.state(job) == "PENDING":
            self._run("scontrol", "update", f"JobId={job}", "StartTime=now")


class Gate(L.Callback):
    """Holds a run after a step until a file exists, so that a test can act at that moment.

    Args:
        file: a waiting rank writes its process id to `FILE.RANK`.
        step: optimizer step after which to wait.
        rank: the rank that waits; none: all ranks.
    """

    def __init__(self, file: str, step: int, rank: int | None = None) -> None:
        self.file, self.step, self.rank = Path(file), step, rank

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            Path(f"{self.file}.{trainer.global_rank}").write_text(str(os.getpid()))
            wait_for(self.file.exists, 120, f"{self.file} to be made")


class Slow(L.Callback):
    """Makes each step slower.

    Args:
        seconds: added to each step.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        time.sleep(self.seconds)


def wait_for(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Return once a condition holds.

    Raises:
        TimeoutError: if it does not hold within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.1)
