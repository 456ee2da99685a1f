"""A tiny model trained by an engine with and without recordings of its micro-batches, for tests of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.batch_schedule import BatchSchedule
from megatron.cuda_graphs import Play, Record
from megatron.distributed.topology import Topology
from megatron.engine import Engine
from megatron.objectives import build_objective
from megatron.run import build_model
from megatron.tokenizer import build_vocabulary
from tests.unit.test_run_metadata import run_config

LENGTH, MICRO_BATCH, MICRO_BATCHES, STEPS = 16, 2, 4, 4
VOCABULARY = build_vocabulary(50, 8)


def record(function: Callable[[], Tensor]) -> tuple[Play, Tensor]:
    """As on a GPU, nothing is computed before it is played, and the result is always in the same place."""
    result = torch.full((), torch.nan)
    return lambda: result.copy_(function()), result


def train(topology: Topology, objective: str, dropout: float, graphs: Callable[[Engine], None]) -> list[Tensor]:
    """This replica's losses of all micro-batches, then the weights."""
    replicas = topology.data_parallel_size
    global_batch = MICRO_BATCH * MICRO_BATCHES * replicas
    config = run_config(
        bf16=True, objective=objective, hidden_dropout=dropout, attention_dropout=dropout, seq_length=LENGTH,
        max_position_embeddings=LENGTH, micro_batch_size=MICRO_BATCH, global_batch_size=global_batch,
        compile=topology.device.type == "cuda",
    )  # fmt: skip
    torch.manual_seed(0)
    made = build_objective(config.objective, VOCABULARY, 0, 1234, LENGTH, BatchSchedule(global_batch))
    engine = Engine(build_model(config, VOCABULARY, made.causal, topology), config, topology, global_batch)
    graphs(engine)
    size = (STEPS * MICRO_BATCHES, replicas, MICRO_BATCH)
    tokens = torch.randint(VOCABULARY.num_tokens, (*size, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(size[0] * size[1] * size[2]).view(size)
    own = topology.data_parallel_rank
    stream = map(made.make_batch, tokens[:, own], ids[:, own])
    results = [engine.train_batch(stream, MICRO_BATCHES, 1e-2) for _ in range(STEPS)]
    losses = [loss for result in results for loss in result.micro_losses]
    return [*losses, *(parameter.detach().clone() for parameter in engine.model.named_weights().values())]


def compare(topology: Topology, objective: str, dropout: float, recorder: Record | None) -> None:
    """Training with recordings and without, to the bit."""
    played: list[None] = []

    def use(engine: Engine) -> None:
        engine.use_graphs(recorder)
        assert engine._graphs is not None
        inner, optimizer = engine._graphs._record, engine._engine.optimizer

        def alone(function: Callable[[], Tensor]) -> tuple[Play, Tensor]:
            """Played on a CPU, too, without a trace in what DeepSpeed has noted."""
            play, result = inner(function)

            def only_the_device_s_part() -> None:
                played.append(None)
                noted = [list(group) for group in optimizer.fp32_groups_has_gradients]
                play()
                optimizer.fp32_groups_has_gradients = noted

            return only_the_device_s_part, result

        engine._graphs._record = alone

    expected = train(topology, objective, dropout, lambda engine: None)
    found = train(topology, objective, dropout, use)
    assert len(played) >= STEPS * MICRO_BATCHES / 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
