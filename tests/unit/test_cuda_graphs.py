"""Micro-batches played from recordings: as computed one by one, to the bit. Recordings are functions here, but for the
GPU's own at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron import backends
from megatron.cuda_graphs import MOST, MicroBatchGraphs, Play
from megatron.distributed.topology import Topology, single_process_topology
from megatron.engine import Engine
from megatron.errors import UserError
from megatron.objectives.base import Batch
from megatron.run import build_model
from tests.graph_training import VOCABULARY, compare, record
from tests.unit.test_run_metadata import run_config

CPU = torch.device("cpu")
ON_GPU = replace(single_process_topology(), device=torch.device("cuda"))


def make_batch(scored: int | None, value: float) -> Batch:
    """Two rows of three positions."""
    numbers = torch.full((2, 3), value)
    indices = numbers.long()
    chosen = None if scored is None else torch.arange(scored)
    return Batch(indices, indices, numbers, indices, torch.ones(2), torch.zeros(2, dtype=torch.long), None, chosen)


def test_each_size_is_recorded_at_its_second_batch() -> None:
    def compute(batch: Batch, divisor: int) -> Tensor:
        chosen = 6 if batch.scored is None else len(batch.scored)
        return batch.weights.sum() * chosen / divisor

    recorded: list[None] = []

    def counted(function: Callable[[], Tensor]) -> tuple[Play, Tensor]:
        recorded.append(None)
        return record(function)

    graphs = MicroBatchGraphs(compute, CPU, counted)
    given = [(4, 1.0, 2), (2, 1.0, 2), (4, 2.0, 2), (4, 3.0, 2), (2, 5.0, 2), (None, 1.0, 2), (4, 7.0, 3), (4, 9.0, 3)]
    batches = [make_batch(scored, value) for scored, value, _ in given]
    found = [graphs(batch, divisor) for batch, (_, _, divisor) in zip(batches, given, strict=True)]
    expected = [6 * value * (6 if scored is None else scored) / divisor for scored, value, divisor in given]
    assert [loss.item() for loss in found] == expected, "each loss is its own, also after others were played"
    assert len(recorded) == 3
    assert [batch.weights[0, 0].item() for batch in batches] == [value for _, value, _ in given]


def test_only_so_many_sizes_are_recorded() -> None:
    recorded: list[None] = []

    def counted(function: Callable[[], Tensor]) -> tuple[Play, Tensor]:
        recorded.append(None)
        return record(function)

    graphs = MicroBatchGraphs(lambda batch, divisor: batch.weights.sum(), CPU, counted)
    for value in (1.0, 2.0, 3.0):
        for scored in range(MOST + 3):
            assert graphs(make_batch(scored, value), 2).item() == 6 * value
    assert len(recorded) == MOST


def test_a_mask_is_nothing_for_them() -> None:
    graphs = MicroBatchGraphs(lambda batch, divisor: batch.weights.sum(), CPU, record)
    with pytest.raises(AssertionError, match="a mask"):
        graphs(replace(make_batch(2, 1.0), attention_mask=torch.zeros(2, 3, dtype=torch.int32)), 2)


@pytest.mark.parametrize("objective", ["mdm", "ar"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_engine_trains_as_without(topology: Topology, objective: str, dropout: float) -> None:
    compare(topology, objective, dropout, record)


def test_no_gradient_is_added_up_on_a_stream_of_before(topology: Topology) -> None:
    """What adds up a parameter's gradient remembers the stream on which it was made, and must be made anew in each
    pass: nothing may keep it in between, as DeepSpeed's flat weights would."""
    config = run_config(bf16=True)
    engine = Engine(build_model(config, VOCABULARY, True, topology), config, topology, 4)
    kept: list[None] = []
    for parameter in engine.model.named_weights().values():
        _see_whether_kept(parameter, kept)
    assert not kept
    flat = torch.cat([parameter.view(-1) for parameter in engine.model.named_weights().values()])
    for parameter in engine.model.named_weights().values():
        _see_whether_kept(parameter, kept)
    assert len(kept) == len(engine.model.named_weights()) and flat.grad_fn is not None, "this would be seen"


def _see_whether_kept(parameter: torch.nn.Parameter, kept: list[None]) -> None:
    """Append to ``kept`` if the node that adds up the parameter's gradient outlives what asked for it."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    node.register_prehook(lambda gradients: kept.append(None))
    del node
    parameter.float().sum().backward()
    parameter.grad = None


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["mdm", "ar"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_engine_trains_as_without_on_a_gpu(topology: Topology, objective: str, dropout: float) -> None:
    compare(topology, objective, dropout, None)


NARROW: dict[str, Any] = {"bf16": True}


@pytest.mark.parametrize(("changes", "sums_in_place", "said"), [
    ({}, True, "CUDA graphs: one a micro-batch"),
    ({"enable_cuda_graph": False}, True, "CUDA graphs: none (--no-enable-cuda-graph)"),
    ({"compile": False}, True, "CUDA graphs: none (they are for compiled code, and there is --no-compile)"),
    ({"tensor_model_parallel_size": 2}, True, "CUDA graphs: none (they are for data parallelism alone)"),
    ({}, False, "CUDA graphs: none (they need --bf16, --zero-stage 1, no offloading, bf16.immediate_grad_update)"),
    ({"fp8": True}, True, "CUDA graphs: none (they have not been tried with --fp8)"),
    ({"checkpoint_activations": True}, True, "CUDA graphs: none (they have no recomputation)"),
    ({"hidden_size": 640}, True, "CUDA graphs: none (they pay up to --hidden-size 576)"),
    ({"hidden_size": 640, "enable_cuda_graph": True}, True, "CUDA graphs: one a micro-batch"),
])  # fmt: skip
def test_a_run_on_a_gpu_says_whether(changes: dict[str, Any], sums_in_place: bool, said: str) -> None:
    config = run_config(**(NARROW | changes))
    obstacle = backends.graph_obstacle_of(config, ON_GPU, sums_in_place)
    assert backends.on_graphs(config, ON_GPU, obstacle) == [said]


def test_several_gpus_have_them_if_they_are_asked_for() -> None:
    several = replace(ON_GPU, grid=replace(ON_GPU.grid, data_size=2))
    obstacle = backends._own_graph_obstacle(run_config(**NARROW), several, True)
    assert obstacle == "several GPUs have not run them yet; --enable-cuda-graph asks for them"
    assert backends._own_graph_obstacle(run_config(**NARROW, enable_cuda_graph=True), several, True) is None


def test_batches_with_masks_have_none() -> None:
    config = run_config(**NARROW)
    config = replace(config, objective=replace(config.objective, reset_attention_mask=True))
    obstacle = backends.graph_obstacle_of(config, ON_GPU, True)
    assert obstacle == "they have no masks, and --reset-attention-mask gives every batch one"


def test_who_asks_for_them_is_told_why_not() -> None:
    config = run_config(**NARROW, enable_cuda_graph=True)
    with pytest.raises(UserError) as error:
        backends.graph_obstacle_of(config, single_process_topology(), True)
    assert str(error.value) == "--enable-cuda-graph: they need a GPU; drop it"


def test_on_a_cpu_nothing_is_said() -> None:
    topology = single_process_topology()
    obstacle = backends.graph_obstacle_of(run_config(**NARROW), topology, True)
    assert obstacle == "they need a GPU" and backends.on_graphs(run_config(**NARROW), topology, obstacle) == []
