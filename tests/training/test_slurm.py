"""scripts/slurm/fit.sbatch on a real SLURM with two nodes on this machine."""

import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from lit_align.cli import main
from tests.support.paths import PAIRS, ROOT
from tests.support.pipelines import small_sdxl
from tests.support.processes import fork_ranks
from tests.support.slurm_cluster import SlurmCluster, missing, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no SLURM here: {missing()}"),
]
STEPS = 6
ON_TWO = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
ON_ONE = ("--nodes=1", *ON_TWO[1:])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A cluster, and a folder that its nodes share."""
    torch.set_num_threads(1)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    folder = tmp_path_factory.mktemp("shared")
    program = folder / "bin/lit-align"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lit_align "$@"\n')
    program.chmod(0o755)
    cluster.environment["PATH"] = f"{program.parent}:{cluster.environment['PATH']}"
    cluster.environment["PYTHONPATH"] = str(ROOT)
    try:
        cluster.start()
        yield SimpleNamespace(cluster=cluster, folder=folder)
    finally:
        cluster.stop()


def options(folder, *extra, steps=STEPS):
    """Options of a small quickstart with a checkpoint every second step and the callbacks `extra`."""
    kept = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}", "save_last": "link"}
    listed = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}, *extra]
    overlay = folder / f"callbacks-{len(list(folder.glob('*.yaml')))}.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}))
    return [
        "--config=configs/quickstart.yaml",
        f"--config={overlay}",
        f"--model.backbone.init_args.repo={small_sdxl()}",
        f"--trainer.logger.init_args.save_dir={folder}",
        f"--trainer.max_steps={steps}",
        "--trainer.limit_val_batches=0",
        "--data.batch_size=4",
        f"--data.train_shards={PAIRS}/train/0000{{0..1}}.tar",  # 6 batches an epoch on each of two ranks
    ]


def callback(name, **arguments):
    return {"class_path": f"tests.support.slurm_cluster.{name}", "init_args": arguments}


def submit(site, words, *slurm, **environment):
    output = f"--output={site.folder}/%j.out"
    script = str(ROOT / "scripts/slurm/fit.sbatch")
    return site.cluster.sbatch(f"--chdir={ROOT}", output, *slurm, script, *words, **environment)


def text(site, job):
    return (site.folder / f"{job}.out").read_text()


def checkpoint(site, run, name=f"step={STEPS}"):
    return torch.load(site.folder / f"quickstart/{run}/checkpoints/{name}.ckpt", weights_only=True)


def finish(site, job, restarts=0):
    """Wait for a job, and assert that it has succeeded."""
    said = site.cluster.wait(job, 150)
    assert (said["JobState"], said["ExitCode"], said["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), text(
        site, job
    )


def same_end(site, run, whole):
    """Whether weights and the optimizer's moments equal those of the unbroken run, bit for bit."""
    saved = checkpoint(site, run)
    assert saved["global_step"] == STEPS
    moments = [each["optimizer_states"][0]["state"] for each in (saved, whole)]
    return all(torch.equal(value, whole["state_dict"][name]) for name, value in saved["state_dict"].items()) and all(
        torch.equal(moments[0][i][name], moments[1][i][name]) for i in moments[1] for name in moments[1][i]
    )


@pytest.fixture(scope="module")
def whole(site):
    """The last checkpoint of the unbroken run on two nodes."""
    job = submit(site, options(site.folder), *ON_TWO)
    finish(site, job)
    said = text(site, job)
    assert f"fit.sbatch: job {job}, restart 0, on 2 nodes (n[1-2]), 1 tasks each" in said
    assert "8 pairs a step = 4 a device x 1 accumulated x 2 devices" in said
    saved = checkpoint(site, f"job_{job}")
    assert saved["global_step"] == STEPS
    return saved


def test_two_nodes_are_two_processes(site, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = options(tmp_path)
    fork_ranks(lambda: main(["fit", *words, "--trainer.devices=2"]))
    saved = torch.load(tmp_path / "quickstart/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == STEPS
    for name, value in saved["state_dict"].items():
        torch.testing.assert_close(value, whole["state_dict"][name], rtol=1e-5, atol=1e-6)


def held(site, name, rank=None, step=3):
    """Submit a job that waits after a step until its gate, a file, exists; returns both."""
    gate = site.folder / name
    job = submit(site, options(site.folder, callback("Gate", file=str(gate), step=step, rank=rank)), *ON_TWO)
    for each in (0, 1) if rank is None else (rank,):
        wait_for((site.folder / f"{name}.{each}").exists, 120, f"rank {each} of job {job} at step {step}")
    return job, gate


def test_a_warned_run_is_requeued_and_resumes(site, whole):
    job, gate = held(site, "warned")
    site.cluster.scancel("--signal=USR1", job)
    wait_for(lambda: "SIGUSR1: a checkpoint will be written after this step" in text(site, job), 20, "the signal")
    gate.touch()
    site.cluster.restart(job, 1)
    finish(site, job, restarts=1)
    said = text(site, job)
    assert "Preemption: step 3 is saved in " in said
    assert f"job {job} goes back into the queue" in said
    assert f"fit.sbatch: job {job}, restart 1" in said
    assert "from step 3;" in said
    assert checkpoint(site, f"job_{job}", "preempted")["global_step"] == 3
    assert same_end(site, f"job_{job}", whole)
    events = list((site.folder / f"quickstart/job_{job}").glob("events.out.tfevents*"))
    assert len(events) == 2  # both parts of the run in one folder


def test_a_cancelled_run_leaves_a_checkpoint(site, whole):
    """Even if the step ends seconds after scancel; a new job resumes in that folder."""
    job, gate = held(site, "cancelled")
    site.cluster.scancel(job)
    wait_for(lambda: "SIGTERM: a checkpoint will be written" in text(site, job), 20, "the signal")
    time.sleep(3)
    gate.touch()
    said = site.cluster.wait(job, 60)
    assert (said["JobState"], said["Restarts"]) == ("CANCELLED", "0")
    assert checkpoint(site, f"job_{job}", "preempted")["global_step"] == 3
    finish(site, submit(site, options(site.folder), *ON_TWO, LIT_ALIGN_RUN=f"job_{job}"))
    assert same_end(site, f"job_{job}", whole)


def test_a_job_with_a_killed_task_is_requeued_and_resumes(site, whole):
    """The other rank waits in a reduction; the last checkpoint is that of step 2."""
    job, gate = held(site, "killed", rank=1)
    killed = time.monotonic()
    os.kill(int((site.folder / "killed.1").read_text()), signal.SIGKILL)
    gate.touch()
    site.cluster.restart(job, 1)
    assert time.monotonic() - killed < 60
    said = text(site, job)
    assert "srun: error: n2: task 1: Killed" in said
    assert "fit.sbatch: a task was killed (srun: error: n2: task 1: Killed)" in said
    finish(site, job, restarts=1)
    assert "from step 2;" in text(site, job)
    assert same_end(site, f"job_{job}", whole)


def test_a_job_with_a_lost_node_is_requeued_and_resumes(site, whole):
    """SLURM notices a lost node after up to twice SlurmdTimeout, and needs it, or another one, to resume."""
    job, gate = held(site, "lost", rank=1)
    lost = time.monotonic()
    site.cluster.lose_node("n2", int((site.folder / "lost.1").read_text()))
    gate.touch()
    wait_for(lambda: site.cluster.job(job)["Restarts"] == "1", 90, f"job {job} to be requeued")
    assert time.monotonic() - lost < 80
    assert "srun: error: Node failure on n2" in text(site, job)
    site.cluster.start_node("n2")
    site.cluster.restart(job, 1)
    finish(site, job, restarts=1)
    assert "from step 2;" in text(site, job)
    assert same_end(site, f"job_{job}", whole)


def stub(site, name, script):
    """Write a program that replaces lit-align, by the variable that would name a container."""
    path = site.folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return {"LAUNCH": str(path)}


def test_an_error_ends_the_job(site):
    """It is not requeued, although SLURM has to kill the other task, which waits for the first."""
    waits = "(( SLURM_PROCID )) && { sleep 1; exit 1; }\ntrap '' TERM\nfor i in {1..600}; do sleep 0.1; done"
    said = site.cluster.wait(submit(site, [], *ON_TWO, **stub(site, "fails", waits)), 90)
    assert (said["JobState"], said["Restarts"]) == ("FAILED", "0")
    told = text(site, said["JobId"])
    assert "srun: error: n2: task 1: Exited with exit code 1" in told
    assert "fit.sbatch: the run ended with exit code 137 after 0 restarts" in told


def test_one_task_of_an_array_is_requeued_alone(site):
    """The task whose job number is that of the array."""
    script = (
        'if [[ $SLURM_JOB_ID == "$SLURM_ARRAY_JOB_ID" && -z ${SLURM_RESTART_COUNT:-} ]]; then exit 75; fi\n'
        "[[ -n ${SLURM_RESTART_COUNT:-} ]] || sleep 6"
    )
    array = submit(site, [], *ON_ONE, "--array=0-1", **stub(site, "again", script))
    wait_for(lambda: "1" in restarts(site, array), 30, "one task to be requeued")
    for task in (0, 1):
        site.cluster._run("scontrol", "update", f"JobId={array}_{task}", "StartTime=now", check=False)
        assert site.cluster.wait(f"{array}_{task}", 150)["JobState"] == "COMPLETED"
    assert sorted(restarts(site, array)) == ["0", "1"]


def restarts(site, array):
    return [site.cluster.job(f"{array}_{task}")["Restarts"] for task in (0, 1)]


def test_an_array_of_seeds(site):
    array = submit(site, options(site.folder, steps=2), *ON_ONE, "--array=0-1")
    saved = []
    for task in (0, 1):
        site.cluster.wait(f"{array}_{task}", 300)
        saved.append(checkpoint(site, f"job_{array}_{task}", "step=2"))
    assert [each["lit_align"]["seed"] for each in saved] == [0, 1]
    assert [each["global_step"] for each in saved] == [2, 2]
    first, second = (each["state_dict"] for each in saved)
    assert not all(torch.equal(value, second[name]) for name, value in first.items())


LIMITED = bool(os.environ.get("LIT_ALIGN_SLURM_LIMIT"))


@pytest.mark.skipif(not LIMITED, reason="takes minutes: make test_slurm_limit")
def test_the_time_limit_itself(site, whole):
    """With SLURM's own warning and wait before the restart; a record keeps the job's output."""
    words = options(site.folder, callback("Slow", seconds=20.0))
    job = submit(site, words, *ON_TWO, "--time=3", "--signal=SIGUSR1@60")
    wait_for(lambda: site.cluster.job(job)["Restarts"] != "0", 240, "the time limit's warning")
    said = site.cluster.wait(job, 420)
    assert said["JobState"] == "COMPLETED", text(site, job)
    assert same_end(site, f"job_{job}", whole)
    telling = ("fit.sbatch:", "SIGUSR1", "Preemption:", "srun:", "slurmstepd", "  until", "ckpt_path last", "fit: 100%")
    lines = [line for line in re.split(r"[\n\r]", text(site, job)) if any(word in line for word in telling)]
    kept = [re.sub(r"--(?!kill|trainer.num|trainer.dev|ckpt)[^ =]+[ =][^ ]+ ", "", line) for line in lines]
    record = "\n".join(kept).replace(f"{site.folder}/", "")
    ended = f"{said['JobState']} after {said['Restarts']} restarts; weights and moments are those of the unbroken run."
    header = "Two nodes, --time=3 --signal=SIGUSR1@60, 6 steps of 20 s. The job's output, without its options:"
    (ROOT / "tests/records/slurm_limit.txt").write_text(f"{header}\n\n{record}\n\n{ended}\n")
