"""The experiment scripts under real ``sbatch``: every one of them, two nodes, requeueing, time limits and ``scancel``.

Runs are small (``SMOKE=1``) and on the CPU, on the two nodes of ``slurm.cluster``; what the scripts ask for in their
``#SBATCH`` lines stays. Jobs that need no attention are queued at the start with a low priority (``--nice``) and fill
the nodes while the tests that watch a job go first.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import ENDED, Cluster, Job
from working_copy import make_working_copy, script_environment

REPOSITORY = Path(__file__).resolve().parents[2]
FAMILIES = ("arm", "mdm")
# Those that look at what example_training.sh has trained come after it.
SCRIPTS = sorted(
    (f"{path.parent.name}/{path.stem}" for path in (REPOSITORY / "examples_training").glob("*/example_*.sh")),
    key=lambda script: (not script.endswith("/example_training"), script),
)
PATIENCE = 300.0
"""Seconds to wait for anything. A job takes about ten once it has its nodes."""

LONG = "--train-samples 400000 --save-interval 1000000 --eval-interval 1000000"
"""Steps until it is stopped."""
SHORT = "--train-samples 1000 --save-interval 1000000 --eval-interval 1000000"
"""250 steps."""
TWENTY_STEPS = "--train-samples 80 --eval-interval 1000000"
LOW = "--nice=100"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="deepspeed shows a machine's GPUs to CPU runs"),
]


@dataclass(frozen=True)
class Submitted:
    """A job, and what its run leaves behind. ``number`` is Slurm's, of a task of an array ``12_0``."""

    cluster: Cluster
    path: Path
    number: str

    @property
    def job(self) -> Job:
        """What Slurm knows of it now."""
        return self.cluster.job(self.number)

    @property
    def log(self) -> str:
        """What it has printed, over all of its lives."""
        found = list(self.path.glob(f"slurm-*-{self.number}.out"))
        return found[0].read_text(encoding="utf-8", errors="replace") if found else ""

    @property
    def checkpoints(self) -> Path | None:
        """The directory that it says it saves to."""
        named = re.search(r"^checkpoints: (.+) \(the same command", self.log, re.MULTILINE)
        return self.path / named[1] if named else None

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The metrics so far. The last line may be half written."""
        file = self.checkpoints and self.checkpoints / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file and file.is_file() else []
        return [event for event in (json.loads(line) for line in lines if line.endswith("\n")) if event["kind"] == kind]

    def curve(self) -> list[tuple[int, float, float]]:
        """Step, loss and gradient norm, in order of time: steps after the last checkpoint may be taken twice."""
        return [(event["iteration"], event["loss"], event["grad_norm"]) for event in self.events("train")]

    def lives(self) -> list[tuple[Any, ...]]:
        """The starts and ends of the run, with step and reason."""
        told = ("start", "stopped", "finished")
        return [(e["event"], e["iteration"], e.get("reason")) for e in self.events("meta") if e["event"] in told]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for ``condition``, which is about this job."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}: {self.job}\n{self.log[-3000:]}"
            time.sleep(0.1)

    def reach(self, step: int) -> None:
        """Wait until the run has taken ``step``."""
        self.wait_until(lambda: any(taken >= step for taken, *_ in self.curve()), f"step {step}")

    def restarted(self, times: int) -> None:
        """Wait until the job is back in the queue."""
        self.wait_until(lambda: self.job.restarts == times, f"requeueing {times}")

    def end(self) -> Job:
        """Wait for its end."""
        self.wait_until(lambda: self.job.state in ENDED, "its end")
        return self.job

    def succeed(self) -> None:
        """Wait for its end with exit code 0."""
        job = self.end()
        assert (job.state, job.exit_code) == ("COMPLETED", 0), f"{job}\n{self.log[-3000:]}"

    def leave_no_process(self) -> None:
        """Wait until none of its processes is left: thirty seconds after its end Slurm itself gives up."""
        self.wait_until(lambda: not self.cluster.job_processes(self.number), "the end of its processes")


@dataclass(frozen=True)
class Queue:
    """The working copy that jobs are submitted from, and by name those that were submitted at the start."""

    cluster: Cluster
    path: Path
    waiting: dict[str, Submitted]

    def submit(self, script: str, *options: str, words: tuple[str, ...] = (), **settings: str) -> Submitted:
        """``sbatch options script words``; the script is a file of ``examples_training``, or a path."""
        file = script if script.endswith(".sh") else f"examples_training/{script}.sh"
        settings = {"SMOKE": "1", "HF_HOME": str(self.path / "hub"), **settings}
        number = self.cluster.submit(self.path, script_environment(self.path, settings), *options, file, *words)
        return Submitted(self.cluster, self.path, number)

    def multi_node(self, family: str, *options: str, nodes: int = 2, **settings: str) -> Submitted:
        """``example_multi_node_training.sh`` with one task a node."""
        # Without dropout, whose masks differ from one number of replicas to another.
        settings = {"HIDDEN_DROPOUT": "0", "ATTENTION_DROPOUT": "0", **settings}
        options = (f"--nodes={nodes}", "--ntasks-per-node=1", *options)
        return self.submit(f"{family}/example_multi_node_training", *options, **settings)


@pytest.fixture(scope="module")
def queue(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Queue:
    """Submits the jobs that need no attention."""
    path = tmp_path_factory.mktemp("slurm_scripts") / "working copy"
    make_working_copy(path, REPOSITORY)
    queue = Queue(cluster, path, {})
    code = 'source examples_training/lib.sh; source examples_training/smoke.sh; make_smoke_data "$OUTPUT_DIR/data"'
    environment = script_environment(path, {"OUTPUT_DIR": "output/smoke"})
    subprocess.run(["bash", "-c", code], cwd=path, env=environment, check=True, timeout=PATIENCE)
    add = queue.waiting.__setitem__
    # Slurm looks for expired limits every thirty seconds, and warns that much earlier than asked: here, 10 to 40
    # seconds after the start.
    limit = ("--time=1", "--signal=B:USR1@20")
    add("limited", queue.submit("arm/example_training", *limit, VARIANT="limited", EXTRA_ARGS=LONG))
    settings = {"VARIANT": "uninterrupted", "EXTRA_ARGS": SHORT}
    add("uninterrupted", queue.submit("mdm/example_training", LOW, **settings))
    for script, launcher in zip(SCRIPTS, itertools.cycle(("deepspeed", "torchrun", "srun"))):
        family, name = script.split("/")
        options, settings = [LOW], {"LAUNCHER": launcher}
        if name in ("example_evaluation", "example_downstream"):
            trained = queue.waiting[f"{family}/example_training"].number
            options += [f"--dependency=afterok:{trained}", "--kill-on-invalid-dep=yes"]
        if name == "example_multi_node_training":
            options, settings = [LOW, "--ntasks-per-node=1"], {}  # at its default
        add(script, queue.submit(script, *options, **settings))
    for family in FAMILIES:
        for nodes in (1, 2):
            settings = {"VARIANT": f"{family}_{nodes}", "EXTRA_ARGS": TWENTY_STEPS}
            add(f"{family} on {nodes}", queue.multi_node(family, LOW, nodes=nodes, **settings))
    grid = ("order_list", "--set", "NUM_ORDER_LIST=1,2")
    add("sweep", queue.submit("sweep", LOW, "--array=0-1", words=grid))
    again = f"--dependency=afterok:{queue.waiting['sweep'].number}"
    add("sweep again", queue.submit("sweep", LOW, "--array=0-1", again, "--kill-on-invalid-dep=yes", words=grid))
    return queue


def test_a_time_limit_saves_and_requeues_and_scancel_leaves_nothing(queue: Queue) -> None:
    run = queue.waiting["limited"]
    run.restarted(1)
    # More time for the second life, so that it is still there when it is cancelled.
    queue.cluster.command("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")
    start, stop = run.lives()
    assert start == ("start", 0, None)
    event, step, reason = stop
    assert (event, reason) == ("stopped", "received SIGUSR1") and step == run.curve()[-1][0]
    assert run.checkpoints is not None and (run.checkpoints / "latest").read_text().strip() == f"global_step{step}"
    assert f"job {run.number} goes back into the queue" in run.log
    run.reach(step + 1)
    assert run.lives()[2] == ("start", step, None)
    queue.cluster.command("scancel", run.number)
    assert run.end().state == "CANCELLED"
    run.leave_no_process()


def test_requeue_resumes_exactly(queue: Queue) -> None:
    run = queue.submit("mdm/example_training", VARIANT="requeued", EXTRA_ARGS=SHORT)
    run.reach(10)
    queue.cluster.command("scontrol", "requeue", run.number)
    run.succeed()
    # Slurm's SIGTERM came first, so nothing was lost.
    _, (_, step, _), _, _ = lives = run.lives()
    assert lives == [
        ("start", 0, None), ("stopped", step, "received SIGTERM"), ("start", step, None), ("finished", 250, None)
    ]  # fmt: skip
    assert 10 <= step < 250 and run.job.restarts == 1
    whole = queue.waiting["uninterrupted"]
    whole.succeed()
    assert run.curve() == whole.curve() and len(whole.curve()) == 250


def test_a_warning_reaches_both_nodes_and_a_dead_rank_ends_both(queue: Queue) -> None:
    run = queue.multi_node("mdm", VARIANT="warned", EXTRA_ARGS=LONG)
    steps = []
    # To the batch script, as the scripts' --signal=B: does, and to the steps, as --signal without B: does.
    for life, target in enumerate((["--batch"], []), 1):
        run.reach(steps[-1] + 1 if steps else 1)
        ranks = [
            queue.cluster.job_processes(run.number, f"RANK={rank}", f"SLURMD_NODENAME=n{rank + 1}", "WORLD_SIZE=2")
            for rank in (0, 1)
        ]
        assert all(ranks)
        # On the CPU a task sees none of the job's GPUs.
        assert ranks[1].keys() == queue.cluster.job_processes(run.number, "RANK=1", "CUDA_VISIBLE_DEVICES=").keys()
        queue.cluster.command("scancel", "--signal=USR1", *target, run.number)
        run.restarted(life)
        event, step, reason = run.lives()[-1]
        assert (event, reason) == ("stopped", "received SIGUSR1")
        steps.append(step)
    run.reach(steps[-1] + 1)
    assert [step for event, step, _ in run.lives() if event == "start"] == [0, *steps]
    os.kill(min(queue.cluster.job_processes(run.number, "RANK=1")), signal.SIGKILL)
    job = run.end()
    assert job.state == "FAILED" and job.exit_code != 0 and job.restarts == 2
    run.leave_no_process()


def test_scancel_leaves_nothing_on_two_nodes(queue: Queue) -> None:
    run = queue.multi_node("arm", VARIANT="cancelled", EXTRA_ARGS=LONG)
    run.reach(1)
    assert len(queue.cluster.job_processes(run.number)) > 2
    queue.cluster.command("scancel", run.number)
    assert run.end().state == "CANCELLED"
    run.leave_no_process()
    assert [event for event, *_ in run.lives()] == ["start", "stopped"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs(script: str, queue: Queue) -> None:
    family, name = script.split("/")
    if name == "example_downstream" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval")
    run = queue.waiting[script]
    run.succeed()
    if name == "example_downstream":
        [results] = queue.path.glob(f"output/smoke/checkpoints_smoke_training_{family}_*/downstream_auto.json")
        assert 0 <= json.loads(results.read_text(encoding="utf-8"))["results"]["smoke"]["acc,none"] <= 1
        return
    assert run.checkpoints is not None and f"_{family}_" in run.checkpoints.name
    assert (run.checkpoints / "latest").read_text().strip() == "global_step3"
    objective = {"arm": "ar", "mdm": "mdm"}[family]
    assert all(e["objective"] == objective for e in run.events("meta") if e["event"] == "start")
    assert [step for step, *_ in run.curve()] == [1, 2, 3]
    assert {event["iteration"] for event in run.events("valid")} == {3}
    if name == "example_evaluation":
        assert run.events("valid")[-1]["windows"] == 105  # all of the smoke data


@pytest.mark.parametrize("family", FAMILIES)
def test_two_nodes_train_as_one(family: str, queue: Queue) -> None:
    curves = []
    for nodes in (1, 2):
        run = queue.waiting[f"{family} on {nodes}"]
        run.succeed()
        assert f"processes {nodes} (data {nodes} x tensor 1 x pipeline 1) on CPU, ZeRO stage 1" in run.log
        assert "cpu-optimizer yes" in run.log
        curves.append(run.curve())
    one, two = curves
    assert [step for step, *_ in one] == [step for step, *_ in two] == list(range(1, 21))
    assert [number for step in two for number in step] == pytest.approx([n for step in one for n in step], rel=1e-5)


def test_a_sweep_is_an_array(queue: Queue) -> None:
    names = set()
    for task in (0, 1):
        first, again = (
            Submitted(queue.cluster, queue.path, f"{queue.waiting[name].number}_{task}")
            for name in ("sweep", "sweep again")
        )
        first.succeed()
        again.succeed()
        assert first.checkpoints is not None and [step for step, *_ in first.curve()] == [1, 2, 3]
        names.add(first.checkpoints.name)
        assert "finished, skipped" in again.log and again.checkpoints is None
    assert len(names) == 2 and all(f"orders{count}" in str(names) for count in (1, 2))


PRINT_RANK = """#!/bin/bash
echo "rank $RANK $LOCAL_RANK $WORLD_SIZE $SLURMD_NODENAME $MASTER_ADDR $CUDA_VISIBLE_DEVICES"
"""


def test_the_multi_node_script_starts_a_task_on_each_gpu(queue: Queue) -> None:
    """At its defaults, with what it would start replaced by a program that says where it is."""
    script = "examples_training/mdm/example_multi_node_training.sh"
    headers = [line for line in (queue.path / script).read_text().splitlines() if line.startswith("#SBATCH")]
    program = queue.path / "print_rank"
    program.write_text(PRINT_RANK, encoding="utf-8")
    program.chmod(0o755)
    code = [
        f"mapfile -t words < <(DRY_RUN=1 bash {script} | sed -n '/^srun$/,/launch.sh$/p')",
        '"${words[@]}" pretrain_diff_gpt.py',
    ]
    (queue.path / "defaults.sh").write_text("\n".join(["#!/bin/bash", *headers, *code, ""]), encoding="utf-8")
    run = queue.submit("defaults.sh", SMOKE="0", PYTHON=str(program))
    run.succeed()
    ranks = sorted(line.split()[1:] for line in run.log.splitlines() if line.startswith("rank "))
    assert ranks == sorted(
        [str(rank), str(rank % 8), "16", f"n{rank // 8 + 1}", "127.0.0.1", "0,1,2,3,4,5,6,7"] for rank in range(16)
    )
