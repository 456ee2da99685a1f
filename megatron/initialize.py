"""Process group, device and topology of this process. Everything is returned; nothing is stored."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.distributed.topology import Topology, build_topology
from megatron.errors import OneRankError, UserError


def initialize(config: ParallelConfig) -> Topology:
    """Join the run's process group and return where this process stands in it.

    Reads the launcher's ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` (``deepspeed``,
    ``torchrun`` and ``examples_training/launch.sh`` set them). Without ``WORLD_SIZE`` the run is one process and
    needs no port at all.

    Raises:
        UserError: incomplete or wrong launcher variables, more local ranks than GPUs, or a world size the parallel
        sizes do not divide.
    """
    device = _device(config)
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    if not dist.is_initialized():
        if _number("WORLD_SIZE", "1", 1) == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            _require_rendezvous()
            dist.init_process_group(
                backend,
                timeout=timeout,
                device_id=device if backend == "nccl" else None,
            )
    return build_topology(config.tensor_model_parallel_size, config.pipeline_model_parallel_size, device, timeout)


def shut_down() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with ``code``, skipping the interpreter's own shutdown.

    A thread of torch that wants the GIL while Python shuts down aborts the process (seen: "terminate called without an
    active exception", exit code -6), and a launcher would report that instead of ``code``.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _device(config: ParallelConfig) -> torch.device:
    """The GPU of this local rank, or the CPU."""
    if not torch.cuda.is_available():
        if config.distributed_backend == "nccl":
            raise UserError("--distributed-backend nccl: no GPU is visible; use gloo")
        return torch.device("cpu")
    local_rank = _number("LOCAL_RANK", str(config.local_rank or 0), 0)
    if local_rank >= torch.cuda.device_count():
        raise OneRankError(
            f"local rank {local_rank}, but only {torch.cuda.device_count()} GPUs are visible on this node: "
            "start fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _require_rendezvous() -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set but {', '.join(missing)} is not: start the run with deepspeed, torchrun or launch.sh"
        )
    rank, size = _number("RANK", "", 0), _number("WORLD_SIZE", "", 1)
    if rank >= size:
        raise OneRankError(f"RANK is {rank}, and WORLD_SIZE {size}: ranks are 0 to {size - 1}")
    _number("MASTER_PORT", "", 1, 65535)


def _number(name: str, default: str, smallest: int, largest: int = 2**31 - 1) -> int:
    """A whole number from the launcher's environment."""
    text = os.environ.get(name, default)
    if not (text.isdecimal() and smallest <= int(text) <= largest):
        raise OneRankError(f"{name}={text} in the environment: it must be a whole number from {smallest} to {largest}")
    return int(text)
