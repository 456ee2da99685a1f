"""launch.sh: how processes are started, and that signals reach the ranks and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import wait_until

# A rank: notes its start and the signal that stops it; its child stands for a data loader, which nobody may signal.
RANK = """
import os, signal, sys, time
def stop(number, frame):
    open(f"stopped_{os.environ['RANK']}", "w").write(signal.Signals(number).name)
    os.kill(loader, signal.SIGKILL)
    sys.exit(0)
loader = os.fork()
if loader == 0:
    signal.signal(signal.SIGTERM, lambda *_: open("loader_signalled", "w").close())
    time.sleep(60)
    os._exit(0)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop if "stubborn" not in sys.argv else signal.SIG_IGN)
open(f"started_{os.environ['RANK']}", "w").close()
time.sleep(60)
"""
# A launcher: two ranks in sessions of their own, as torchrun starts them; SIGTERM kills it at once, as deepspeed's.
LAUNCHER = """
import os, subprocess, sys
open("launcher_pid", "w").write(str(os.getpid()))
ranks = [
    subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(i)}, start_new_session=True)
    for i in range(2)
]
sys.exit(max(rank.wait() for rank in ranks))
"""
SUPERVISE = 'source examples_training/launch.sh; code=0; supervise "$@" || code=$?; echo "$STOPPED_BY"; exit "$code"'


def _as_from_a_terminal() -> None:
    """nohup and background jobs begin with these ignored, and bash traps no signal that it began with ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Supervised:
    """``supervise`` with the launcher and the ranks above."""

    def __init__(self, sandbox: Any, *arguments: str) -> None:
        self.path = sandbox.path
        (self.path / "rank.py").write_text(RANK, encoding="utf-8")
        (self.path / "launcher").write_text(LAUNCHER, encoding="utf-8")
        environment = sandbox.environment({"RANK": "7", "WORLD_SIZE": "8"})  # left over in a user's shell
        python = environment["PYTHON"]
        self.process = subprocess.Popen(
            ["bash", "-c", SUPERVISE, "bash", python, "launcher", "rank.py", *arguments],
            cwd=self.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=_as_from_a_terminal,
        )  # fmt: skip
        wait_until(lambda: all((self.path / f"started_{rank}").exists() for rank in (0, 1)), 30)

    def result(self) -> tuple[int, str]:
        """Exit code, and the signal that supervise names."""
        output, _ = self.process.communicate(timeout=40)
        return self.process.returncode, output.strip()

    def processes(self) -> list[str]:
        """Command lines of living processes of this run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.path.resolve()):
                    found.append(" ".join(process.cmdline()))
        return [line for line in found if "rank.py" in line]


@pytest.fixture
def supervised(sandbox: Any) -> Iterator[Supervised]:
    run = Supervised(sandbox)
    yield run
    run.process.kill()
    run.process.communicate()


@pytest.mark.parametrize(("sent", "received"), [("TERM", "SIGTERM"), ("HUP", "SIGTERM"), ("USR1", "SIGUSR1")])
def test_a_signal_reaches_every_rank_and_no_loader(sent: str, received: str, supervised: Supervised) -> None:
    supervised.process.send_signal(signal.Signals[f"SIG{sent}"])
    code, named = supervised.result()
    assert (code, named) == (0, "TERM" if sent == "HUP" else sent)
    for rank in (0, 1):
        assert (supervised.path / f"stopped_{rank}").read_text() == received
    assert not (supervised.path / "loader_signalled").exists()
    assert supervised.processes() == []


def test_ctrl_c_saves(supervised: Supervised) -> None:
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.result() == (0, "INT")
    assert (supervised.path / "stopped_1").read_text() == "SIGTERM"


def test_a_second_ctrl_c_kills(sandbox: Any) -> None:
    run = Supervised(sandbox, "stubborn")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    code, _ = run.result()
    assert code != 0
    assert run.processes() == []


def test_a_killed_launcher_leaves_no_orphan(supervised: Supervised) -> None:
    os.kill(int((supervised.path / "launcher_pid").read_text()), signal.SIGKILL)
    code, _ = supervised.result()
    assert code == 137
    assert supervised.processes() == []


def test_the_exit_code_is_the_launchers(sandbox: Any) -> None:
    for code in (0, 1, 2, 77):
        result = sandbox.bash("-c", SUPERVISE, "bash", "bash", "-c", f"exit {code}")
        assert (result.returncode, result.stdout.strip()) == (code, "")


FAKE_PYTHON = '#!/bin/bash\nprintf "%s\\n" "$@" "RANK=$RANK LOCAL_RANK=$LOCAL_RANK WORLD_SIZE=$WORLD_SIZE" '
FAKE_PYTHON += '"MASTER=$MASTER_ADDR:$MASTER_PORT"\n'
FAKE_SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
    "--oneliner show node n1") echo "NodeName=n1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=host" ;;
    *) exit 1 ;;
esac
"""
STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODEID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
}  # fmt: skip


def _start_node(sandbox: Any, *arguments: str, **settings: str) -> Any:
    programs = sandbox.path / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("fake_python", FAKE_PYTHON), ("scontrol", FAKE_SCONTROL)):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    settings = {"PYTHON": str(programs / "fake_python"), "PATH": f"{programs}:{os.environ['PATH']}"} | settings
    return sandbox.bash("examples_training/launch.sh", *arguments, **settings)


def test_a_slurm_task_is_one_process(sandbox: Any) -> None:
    result = _start_node(sandbox, "pretrain_gpt.py", "--save", "a b", NUM_GPUS="4", **STEP)
    words = result.stdout.splitlines()
    assert words[:4] == ["-u", "pretrain_gpt.py", "--save", "a b"], result.stderr
    # The address is that of Slurm's record: the name n1 need not resolve.
    assert words[4:] == ["RANK=5 LOCAL_RANK=1 WORLD_SIZE=8", f"MASTER=10.1.2.3:{20000 + 4711}"]


def test_a_task_with_one_gpu_of_its_own_sees_it_as_number_0(sandbox: Any) -> None:
    result = _start_node(sandbox, "pretrain_gpt.py", NUM_GPUS="4", CUDA_VISIBLE_DEVICES="3", **STEP)
    assert "LOCAL_RANK=0 " in result.stdout


def test_a_task_on_the_cpu_sees_no_gpu_of_its_job(sandbox: Any) -> None:
    result = _start_node(sandbox, "pretrain_gpt.py", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="3", **STEP)
    assert "LOCAL_RANK=1 " in result.stdout  # with one visible GPU it would be 0


def test_a_slurm_task_a_node_starts_torchrun(sandbox: Any) -> None:
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    words = _start_node(sandbox, "pretrain_gpt.py", NUM_GPUS="4", MASTER_PORT="2", **step).stdout.splitlines()
    assert " ".join(words[:12]) == (
        "-m torch.distributed.run --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr 10.1.2.3 --master-port 2"
    )


def test_nodes_without_slurm(sandbox: Any) -> None:
    settings = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "host0", "MASTER_PORT": "1", "NUM_GPUS": "8"}
    words = _start_node(sandbox, "pretrain_gpt.py", "--lr", "1", **settings).stdout.splitlines()
    assert " ".join(words[:15]) == (
        "-m torch.distributed.run --nnodes 3 --node-rank 2 --nproc-per-node 8 --master-addr host0 --master-port 1 "
        "pretrain_gpt.py --lr 1"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "h"}, "NNODES=2 needs NODE_RANK, this node's number from 0 to 1"),
        ({"NUM_GPUS": "abc"}, "NUM_GPUS must be a whole number, not 'abc'"),
        ({"NNODES": "two"}, "NNODES must be a whole number, not 'two'"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT must be a whole number, not '-1'"),
        ({"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}, "this job has 2 nodes: start launch.sh on each of them with srun"),
    ],
)
def test_an_incomplete_rendezvous_is_named(settings: dict[str, str], message: str, sandbox: Any) -> None:
    result = _start_node(sandbox, "pretrain_gpt.py", **settings)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}")


def test_launch_sh_sets_no_nccl_variable_and_deletes_nothing(repository: Path) -> None:
    for name in ("launch.sh", "lib.sh", "checks.sh"):
        code = [
            line for line in (repository / "examples_training" / name).read_text(encoding="utf-8").splitlines()
            if not line.lstrip().startswith("#")
        ]  # fmt: skip
        assert not [line for line in code if re.search(r"NCCL|/dev/shm|(^|\s)rm\s", line)]


# --- what the scripts start ---


def _with_gpus(sandbox: Any, count: int) -> dict[str, str]:
    """An environment whose nvidia-smi lists ``count`` GPUs."""
    programs = sandbox.path / "bin"
    programs.mkdir(exist_ok=True)
    lines = "\n".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'" for i in range(count))
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    (programs / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "MASTER_PORT": "5"}


def test_deepspeed_uses_all_gpus_or_as_many_as_asked(sandbox: Any) -> None:
    gpus = _with_gpus(sandbox, 8)
    script = "mdm/example_training"
    assert sandbox.dry_run(script, **gpus).launch == ["deepspeed", "--num_gpus", "8", "--master_port", "5"]
    assert sandbox.dry_run(script, NUM_GPUS="2", **gpus).launch[:3] == ["deepspeed", "--num_gpus", "2"]
    # With --num_gpus deepspeed would ignore which ones are visible.
    assert sandbox.dry_run(script, CUDA_VISIBLE_DEVICES="4,5", **gpus).launch == ["deepspeed", "--master_port", "5"]
    too_many = sandbox.bash(f"examples_training/{script}.sh", DRY_RUN="1", NUM_GPUS="16", **gpus)
    assert too_many.stderr == "error: NUM_GPUS=16, but this machine shows 8 GPUs\n"
    names = sandbox.bash(f"examples_training/{script}.sh", DRY_RUN="1", CUDA_VISIBLE_DEVICES="GPU-a,GPU-b", **gpus)
    assert names.returncode == 2 and "use LAUNCHER=torchrun" in names.stderr


def test_a_part_of_the_visible_gpus(sandbox: Any) -> None:
    gpus = _with_gpus(sandbox, 8)
    probe = 'source examples_training/lib.sh; DRY_RUN=1; choose_devices; echo "$NUM_GPUS:$CUDA_VISIBLE_DEVICES"'
    result = sandbox.bash("-c", probe, CUDA_VISIBLE_DEVICES="4,5,7", NUM_GPUS="2", **gpus)
    assert result.stdout == "2:4,5\n", result.stderr


def test_torchrun_and_srun(sandbox: Any) -> None:
    gpus = _with_gpus(sandbox, 4)
    torchrun = sandbox.dry_run("mdm/example_training", LAUNCHER="torchrun", **gpus).launch
    assert " ".join(torchrun) == (
        "torchrun --nnodes 1 --node-rank 0 --nproc-per-node 4 --master-addr 127.0.0.1 --master-port 5"
    )
    slurm = {"SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "32"}
    assert " ".join(sandbox.dry_run("mdm/example_multi_node_training", **slurm, **gpus).launch) == (
        "srun --kill-on-bad-exit=1 --nodes 2 --ntasks 8 --ntasks-per-node 4 --cpus-per-task 8 "
        "bash examples_training/launch.sh"
    )


def test_several_nodes_without_slurm_use_torchrun(sandbox: Any) -> None:
    settings = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", **_with_gpus(sandbox, 8)}
    assert " ".join(sandbox.dry_run("arm/example_multi_node_training", **settings).launch) == (
        "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 5"
    )
    del settings["NODE_RANK"]
    result = sandbox.bash("examples_training/arm/example_multi_node_training.sh", DRY_RUN="1", **settings)
    assert result.returncode == 2 and result.stderr.startswith("error: NNODES=2 needs MASTER_ADDR and MASTER_PORT")
    one_node = sandbox.bash("examples_training/arm/example_training.sh", DRY_RUN="1", NNODES="2", LAUNCHER="deepspeed")
    assert one_node.stderr.startswith("error: LAUNCHER=deepspeed starts one node")


def test_the_cpu_run_of_a_gpu_machine_sees_no_gpu(sandbox: Any) -> None:
    gpus = _with_gpus(sandbox, 4)
    run = sandbox.dry_run("mdm/example_training", NUM_GPUS="0", **gpus)
    assert run.launch[0] == "torchrun"  # deepspeed would set CUDA_VISIBLE_DEVICES again
    assert "--bf16" not in run.arguments and "bf16" not in run.deepspeed


def test_precision(sandbox: Any) -> None:
    for precision in ("fp16", "fp32"):
        run = sandbox.dry_run("mdm/example_training", PRECISION=precision)
        assert [word for word in run.arguments if word in ("--bf16", "--fp16")] == ["--fp16"] * (precision == "fp16")
        assert run.deepspeed.get("fp16") == ({"enabled": True} if precision == "fp16" else None)
        assert "bf16" not in run.deepspeed


def test_ports_are_free_and_differ(sandbox: Any) -> None:
    result = sandbox.bash("-c", "source examples_training/launch.sh; for _ in {1..20}; do free_port; done")
    ports = [int(line) for line in result.stdout.split()]
    assert len(ports) == 20 and len(set(ports)) > 10
    assert all(20000 <= port < 32000 for port in ports)  # below the kernel's own
