"""A rank that dies or hangs ends the run with a line that names it, and costs nothing that was saved."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from training_faults import lose_rank
from training_runs import Corpus, Fault, Launcher, curve
from waiting import wait_until

pytestmark = pytest.mark.slow

SPLITS = {
    "dp2": (2, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2 dp2": (4, "--pipeline-model-parallel-size 2"),
    "zero 3": (2, "--zero-stage 3"),
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(("action", "lost", "name"), [
    ("die", 1, "dp2"), ("die", 0, "tp2"), ("die", 3, "pp2 dp2"), ("hang", 1, "zero 3"),
])  # fmt: skip
def test_the_lost_rank_is_named(
    corpus: Corpus, launch: Launcher, tmp_path: Path, action: str, lost: int, name: str
) -> None:
    """The others must end by themselves: no launcher is there to end them."""
    ranks, flags = SPLITS[name]
    argv = corpus.flags("--train-iters 9 --save-interval 1", f"--save {tmp_path} --load {tmp_path}", flags)
    faults: list[Fault | None] = [(lose_rank, ("", 0, 4.0))] * ranks
    faults[lost] = (lose_rank, (action, 4, 4.0))
    finished = launch.ranks("mdm", [argv] * ranks, faults, timeout=60)
    others = [one for rank, one in enumerate(finished) if rank != lost]
    assert [one.code for one in others] == [1] * (ranks - 1), [one.stderr for one in others]
    said = [line for one in others for line in one.stderr.splitlines() if line.startswith("error: ")]
    assert any(f": rank {lost} did not answer (" in line for line in said), said
    assert not any("Traceback" in one.stderr for one in others)
    assert (tmp_path / "latest").read_text() == "global_step3"
    again = launch.ranks("mdm", [argv] * ranks, [None] * ranks)
    assert [one.code for one in again] == [0] * ranks
    assert list(curve(tmp_path)) == list(range(1, 10))


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_killed_rank_ends_the_run_under_a_launcher(
    corpus: Corpus, repository: Path, tmp_path: Path, launcher: str
) -> None:
    """Non-zero within a minute, no process left, the last checkpoint valid."""
    port = free_port()
    start = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port],
    }[launcher]
    argv = corpus.flags(f"--train-iters 100000 --save-interval 5 --keep-last 1 --save {tmp_path / 'save'}")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *start, str(repository / "pretrain_gpt.py"), *argv], cwd=tmp_path, env=environment,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: (tmp_path / "save" / "latest").exists() or process.poll() is not None, 90)
        ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child)]
        assert len(ranks) == 2, (tmp_path / "log").read_text()[-3000:]
        ranks[1].kill()
        assert process.wait(timeout=60) != 0
        wait_until(lambda: not any(rank.is_running() for rank in ranks), 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    from megatron.checkpointing import CheckpointStore

    store = CheckpointStore(tmp_path / "save")
    assert store.resolve() is not None


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a rank of the run, not its launcher: launchers set RANK for them alone."""
    with contextlib.suppress(psutil.Error):
        launcher, _, rest = " ".join(process.cmdline()).partition("pretrain_gpt.py")
        return "RANK" in process.environ() and bool(rest) and "launch" not in launcher
    return False
