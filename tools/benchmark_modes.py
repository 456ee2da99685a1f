"""Ways to run on several devices, and how such a run is started: for ``tools/benchmark.py parallel``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.errors import UserError
from tools.benchmark_runs import ENTRY_POINTS, ROOT, Finished, python, run_to_end

# Small parameters stay whole unless told otherwise, and everything is small where curves are compared.
_DIVIDE = {"stage3_param_persistence_threshold": 0}
_OFFLOAD = {
    "offload_param": {"device": "cpu", "pin_memory": True},
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
}


@dataclass(frozen=True)
class Mode:
    """A way to divide a run: flags, and what DeepSpeed's JSON adds to them (``zero``, in its ZeRO section)."""

    name: str
    flags: str = "--zero-stage 1"
    zero: dict[str, Any] = field(default_factory=dict)

    def arguments(self, directory: Path, *, divide_all: bool = False) -> list[str]:
        """Its flags; a JSON is written into ``directory``. ``divide_all``: ZeRO 3 divides small parameters too."""
        zero = self.zero | (_DIVIDE if divide_all and "--zero-stage 3" in self.flags else {})
        if not zero:
            return self.flags.split()
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        return [*self.flags.split(), "--deepspeed_config", str(path)]


ALONE = Mode("alone")
"""One process: what every mode is compared with."""


def available_modes(processes: int) -> dict[str, Mode]:
    """All modes of ``processes`` processes by name; what a mode leaves over is data parallel."""
    modes = [
        Mode("dp"),
        Mode("zero2", "--zero-stage 2"),
        Mode("zero3", "--zero-stage 3"),
        Mode("offload", "--zero-stage 1 --cpu-optimizer"),
        Mode("zero3-offload", "--zero-stage 3", _OFFLOAD),
    ]
    sizes = [size for size in (2, 4, 8) if processes % size == 0]
    for size in sizes:
        flags = f"--zero-stage 1 --tensor-model-parallel-size {size}"
        modes += [Mode(f"tp{size}", flags), Mode(f"tp{size}-sequence", f"{flags} --sequence-parallel")]
        modes.append(Mode(f"pp{size}", f"--zero-stage 1 --pipeline-model-parallel-size {size}"))
    if processes % 4 == 0:
        both = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
        modes.append(Mode("tp2-pp2", f"--zero-stage 1 {both}"))
    return {mode.name: mode for mode in modes}


@dataclass(frozen=True)
class Machine:
    """The devices that runs are started on, and until when they are (``time.monotonic()``)."""

    processes: int
    gpu: bool
    run_timeout: float
    deadline: float = float("inf")

    @property
    def out_of_time(self) -> bool:
        """Whether nothing more is to be started."""
        return time.monotonic() > self.deadline

    def environment(self, ranks: int, slot: int = 0) -> dict[str, str]:
        """Variables of a run: its share of the cores; alone, the GPU that ``slot`` falls on; on a CPU, no GPU."""
        variables = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
        if not self.gpu:
            return variables | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        if ranks == 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.processes)))
            devices = visible.split(",")
            variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return variables

    def run(self, objective: str, flags: Sequence[str], log: Path, *, alone: bool = False, slot: int = 0) -> Finished:
        """Run an entry point to its end: alone, or in all processes under torchrun."""
        entry = [str(ROOT / ENTRY_POINTS[objective]), *flags]
        command = python(*entry) if alone else torchrun(self.processes, entry)
        return run_to_end(command, log, self.run_timeout, self.environment(1 if alone else self.processes, slot))

    def start_ranks(self, objective: str, flags: Sequence[str], logs: Path) -> list[subprocess.Popen[bytes]]:
        """Start one process a rank without a launcher, each in a session of its own; their output goes to ``logs``."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        started = []
        for rank in range(self.processes):
            variables = self.environment(self.processes) | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            with open(logs / f"rank{rank}.log", "wb") as log:
                started.append(
                    subprocess.Popen(
                        python(str(ROOT / ENTRY_POINTS[objective]), *flags), stdout=log, stderr=subprocess.STDOUT,
                        cwd=ROOT, env={**os.environ, **variables}, start_new_session=True,
                    )
                )
        return started


def torchrun(processes: int, entry: Sequence[str]) -> list[str]:
    """The command line that runs ``entry`` in ``processes`` processes of this host."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *entry)


def machine_at_hand(processes: int | None, run_timeout: float, deadline: float | None) -> Machine:
    """The GPUs of this host (``processes`` of them), or ``processes`` processes on its CPU.

    Raises:
        UserError: less than two processes, or more than there are GPUs.
    """
    gpus = torch.cuda.device_count()
    count = gpus if processes is None else processes
    if count < 2:
        raise UserError(f"--processes: {count} is not several; this host has {gpus} GPUs (a CPU needs the flag)")
    if gpus and count > gpus:
        raise UserError(f"--processes {count}: this host has {gpus} GPUs")
    return Machine(count, gpus > 0, run_timeout, float("inf") if deadline is None else time.monotonic() + deadline)
