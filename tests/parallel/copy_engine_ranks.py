"""One of two processes, each on a GPU of its own; messages by copy engines. See ``test_copy_engines_on_gpu``."""

from __future__ import annotations

import datetime
import os
import random
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.copy_engines import Slots, open_slots
from megatron.distributed.messages import use_slots
from megatron.distributed.products import column_product, row_product
from megatron.distributed.tensor_parallel import TensorParallel, tensor_parallel
from megatron.distributed.topology import build_topology

ROWS, WIDTH, INNER = 16384, 2560, 3840  # sums in halves; products that fill a GPU
SETS, ROUNDS = 3, 30


def inputs(number: int, tensor: TensorParallel) -> list[Tensor]:
    """Hidden states and their gradient, the weights of a column-parallel and a row-parallel layer: this rank's."""
    generator = torch.Generator("cuda").manual_seed(number)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device="cuda", generator=generator)).bfloat16()

    x, grad = draw(ROWS, WIDTH), draw(ROWS, WIDTH)
    up, down = draw(2 * INNER, WIDTH, scale=0.02), draw(WIDTH, 2 * INNER, scale=0.02)
    if tensor.sequence_parallel:
        x, grad = (whole.chunk(2)[tensor.rank] for whole in (x, grad))
    return [x, grad, up.chunk(2)[tensor.rank], down.chunk(2, dim=1)[tensor.rank].contiguous()]


def block(tensor: TensorParallel, x: Tensor, grad: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """Both layers with a GELU between them: result and gradients."""
    assert tensor.ranks is not None
    leaves = [leaf.detach().requires_grad_() for leaf in (x, up, down)]
    inner = torch.nn.functional.gelu(column_product(leaves[0], leaves[1], tensor.ranks, tensor.sequence_parallel))
    out = row_product(inner, leaves[2], tensor.ranks, tensor.sequence_parallel)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def compare(sequence_parallel: bool) -> dict[str, float]:
    """Distance from collectives, relative, and how many of many rounds differ from the first one to the bit."""
    topology = build_topology(2, 1, torch.device("cuda", torch.cuda.current_device()))
    tensor = tensor_parallel(topology, sequence_parallel)
    sets = [inputs(number, tensor) for number in range(SETS)]
    name = topology.tensor_group.group_name
    expected = [block(tensor, *one) for one in sets]
    slots = open_slots(topology, ROWS * WIDTH * 2, datetime.timedelta(seconds=60))
    assert isinstance(slots, Slots), slots
    use_slots(name, slots)
    first = [block(tensor, *one) for one in sets]
    distances = [float((a - b).float().norm() / b.float().norm()) for found, known in zip(first, expected)
                 for a, b in zip(found, known)]  # fmt: skip
    order, unlike = random.Random(5), 0
    for _ in range(ROUNDS):
        chosen = [order.randrange(SETS) for _ in range(4)]  # back to back: nothing waits for the GPU between them
        found = [block(tensor, *sets[number]) for number in chosen]
        unlike += sum(not torch.equal(a, b) for number, one in zip(chosen, found) for a, b in zip(one, first[number]))
    use_slots(name, None)
    return {"distance": max(distances), "unlike": unlike}


def main(store: str, report: str) -> None:
    """Join, compare, report."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=120),
        device_id=torch.device("cuda", rank),
    )  # fmt: skip
    found: Any = {sequence_parallel: compare(sequence_parallel) for sequence_parallel in (False, True)}
    torch.save(found, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
