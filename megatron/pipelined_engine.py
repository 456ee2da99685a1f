"""Training and evaluation through a pipeline: :class:`megatron.engine.Engine` over DeepSpeed's pipeline engine.

All micro-batches of a step go through the stages one behind the other (1F1B, Narayanan et al., arXiv 2006.09503).
First and last stage each read the batches for themselves; the stages between read none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.config import ModelConfig, RunConfig
from megatron.distributed.topology import Topology
from megatron.engine import Engine, StepResult, import_deepspeed, quiet
from megatron.model.gpt import Recipe
from megatron.objectives.base import Batch

if TYPE_CHECKING:  # it imports DeepSpeed, which import_deepspeed must do
    from megatron.model.pipeline import PipelinedGPT


def build_pipeline(layers: Sequence[Recipe], config: ModelConfig, topology: Topology) -> PipelinedGPT:
    """This rank's stage of the model, weights uninitialised. A collective call."""
    import_deepspeed(topology.device)
    with quiet():
        from megatron.model.pipeline import PipelinedGPT

        return PipelinedGPT(layers, config, topology)


class PipelinedEngine(Engine):
    """A pipeline of stages, of which this process runs one."""

    def __init__(self, model: PipelinedGPT, config: RunConfig, topology: Topology, global_batch_size: int) -> None:
        super().__init__(model, config, topology, global_batch_size)
        self._trained_last = True  # the last call was train_batch

    def train_batch(
        self, batches: Iterator[Batch], micro_batches: int, learning_rate: float,
        meanwhile: Callable[[], None] = lambda: None, *, by_graphs: bool = True,
    ) -> StepResult:
        """Accumulate the gradient of ``micro_batches`` batches, clip it, and step with ``learning_rate``.

        ``loss`` of the result is known on every stage, ``counted`` on those that read batches (elsewhere 1).
        ``meanwhile`` is called first: DeepSpeed runs the whole step in one call. There are no graphs.
        """
        meanwhile()
        self._prepare_step(micro_batches, learning_rate)
        self._expect_shapes_of(training=True)
        feed = _Feed(batches, self.topology, self._engine.module)
        engine = self._engine
        with quiet():
            engine.train_batch(iter(feed))
        counted = torch.stack(feed.counted).mean() if feed.counted else torch.ones(())
        return self._result(engine.dp_group_loss, counted, engine.fwd_outputs, feed.sample_ids)

    @torch.no_grad()
    def eval_batches(self, batches: Iterator[Batch], count: int) -> list[Tensor]:
        """As :meth:`Engine.eval_batches`."""
        self._expect_shapes_of(training=False)
        engine = self._engine
        engine.total_loss = None  # what it sums over a call has another shape here than in training
        feed = iter(_Feed(batches, self.topology, self._engine.module))
        with quiet():
            rows = engine.eval_batch(feed, reduce_output=None, bcast_loss=False, num_micro_batches=count)
        return rows or []

    def _expect_shapes_of(self, training: bool) -> None:
        """Stages tell each other what they send once; training batches may have a mask where others have none."""
        if self._trained_last != training:
            self._engine.reset_activation_shape()
            self._trained_last = training


class _Feed:
    """Batches in the form of DeepSpeed's pipeline: (what the first stage reads, what the last one compares with).

    DeepSpeed runs a stage before it hands over what to compare with. But it asks for a batch right before it runs the
    last stage on it and takes the loss (in its schedules for training and for inference, a ``LoadMicroBatch`` stands
    before each ``ForwardPass`` there), so the stage is told then what is scored.
    """

    def __init__(self, batches: Iterator[Batch], topology: Topology, model: PipelinedGPT) -> None:
        self._batches = batches
        self._topology = topology
        self._model = model
        self.counted: list[Tensor] = []
        self.sample_ids: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        first = self._topology.pipeline_parallel_rank == 0
        for batch in self._batches:
            self.counted.append(batch.counted.sum() / batch.targets.numel())
            self.sample_ids.append(batch.sample_ids)
            if first:
                yield self._sent((batch.inputs, batch.positions, batch.attention_mask)), ()
            else:
                self._model.scored = None if batch.scored is None else self._sent((batch.scored,))[0]
                yield (), self._sent((batch.targets, batch.weights))

    def _sent(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Those that there are, on this rank's device."""
        return tuple(x.to(self._topology.device, non_blocking=True) for x in tensors if x is not None)
