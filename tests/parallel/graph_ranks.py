"""One of two replicas that train with and without recordings of micro-batches. See ``test_cuda_graphs``."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.initialize import initialize
from tests.graph_training import compare, record


def main(rendezvous: str, report: str) -> None:
    """Compare with a recorder of functions on CPUs, with the real one on GPUs."""
    gpus = torch.cuda.is_available()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if gpus else "gloo", f"file://{rendezvous}", rank=rank, world_size=ranks)
    topology = initialize(ParallelConfig())
    for objective in ("mdm", "ar"):
        compare(topology, objective, 0.0, None if gpus else record)
    torch.save(topology.data_parallel_size, report)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
