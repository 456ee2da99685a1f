"""Groups of real processes over gloo. Starting one costs seconds, so each group goes through many cases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import corpus, launch

__all__ = ["corpus", "launch"]

TIMEOUT = 300  # seconds for everything that one group does


@pytest.fixture(scope="session")
def spawn(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Callable[..., list[Any]]:
    """``spawn(script, ranks, *arguments)`` runs ``script`` of this folder in ``ranks`` processes, which see GPUs only
    with ``gpus=True``.

    Returns their reports. Each process gets RANK and WORLD_SIZE, and arguments: a file for the rendezvous, a file for
    its report (written with ``torch.save``), and ``arguments``. If one fails, the others are ended and its output is
    shown.
    """

    def run(script: str, ranks: int, *arguments: str, gpus: bool = False) -> list[Any]:
        folder = tmp_path_factory.mktemp(script.removesuffix(".py"))
        path = Path(__file__).with_name(script)
        processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
            } | ({} if gpus else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})  # fmt: skip
            command = [sys.executable, path, folder / "rendezvous", folder / f"report{rank}.pt", *arguments]
            with open(folder / f"log{rank}.txt", "w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        _wait(processes, folder)
        return [torch.load(folder / f"report{rank}.pt", weights_only=False) for rank in range(ranks)]

    return run


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait for all; when one fails or time is up, kill the rest and fail with the logs' ends."""
    try:
        for _ in range(TIMEOUT * 10):
            codes = [process.poll() for process in processes]
            if all(code == 0 for code in codes):
                return
            if any(code not in (None, 0) for code in codes):
                break
            for process in processes:
                if process.poll() is None:
                    try:
                        process.wait(timeout=0.1)
                    except subprocess.TimeoutExpired:
                        break
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [f"--- rank {r}\n" + (folder / f"log{r}.txt").read_text()[-4000:] for r in range(len(processes))]
    pytest.fail(f"exit codes {[process.returncode for process in processes]}\n" + "\n".join(logs))
