"""The list of layers over pipeline stages: DeepSpeed's PipelineModule of it. The only model file that knows DeepSpeed.

What travels between stages is the layers' own state: hidden, positions, and the attention mask where there is one. The
first stage is fed inputs, positions and mask; the last one targets, weights and scored positions, and computes its last
MLP at these and the head where it needs the loss, so that nothing of unscored positions exists here that does not in
one process. Both load the same batch, because noise is a pure function of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.distributed.topology import Topology
from megatron.model.gpt import Head, Recipe, State, named_parameters
from megatron.model.sharding import Runner, run_in_order, run_layers, stage_bounds

TIED = "embedding"
"""Under this key first and last stage share the embedding: they sum its gradient and count it once."""


class PipelinedGPT(PipelineModule):
    """This rank's stage of the model. ``loss`` and evaluation are :class:`SequentialGPT`'s, cut in two."""

    def __init__(self, layers: Sequence[Recipe], config: ModelConfig, topology: Topology) -> None:
        self.config = config
        self.run_blocks: Runner = run_in_order
        self.scored: Tensor | None = None
        """On the last stage: ``Batch.scored`` of the batch at hand, which whoever feeds it sets."""
        grid = topology.grid
        with topology.device:
            super().__init__(
                _specifications(layers, config),
                topology=PipeModelDataParallelTopology(grid.pipeline_size, grid.tensor_size, grid.data_size),
                loss_fn=self.loss,
            )

    def _partition_layers(self, method: str = "uniform") -> None:
        """Called by DeepSpeed's constructor: which layers are this rank's."""
        self.parts = stage_bounds(len(self._layer_specs) - 3, self.num_stages)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of this stage, in order."""
        return self.forward_funcs

    @property
    def first_layer(self) -> int:
        """Index in the whole model of the first of them."""
        return self._local_start

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Parameters of this stage by the names that they have in the whole model (see ``gpt``)."""
        return named_parameters(self.layers, self.config, self.first_layer)

    def forward(self, state: State) -> State:
        """What the previous stage sent (or inputs, positions[, mask]) -> what the next stage, or the head, reads."""
        body = [layer for layer in self.layers if not isinstance(layer, Head)]
        return run_layers(body, state, self.config, self.training, self.run_blocks, self.scored)

    def loss(self, state: State, labels: tuple[Tensor, ...]) -> Tensor:
        """On the last stage: ``sum(nll * weights)``, a scalar; in evaluation its sums over rows [b].

        ``labels`` are targets [b, s] int64 and weights [b, s] fp32.
        """
        targets, weights = labels
        loss: Tensor = self.layers[-1](state, targets, weights, self.scored, "sum" if self.training else "rows")
        return loss


def _specifications(layers: Sequence[Recipe], config: ModelConfig) -> list[LayerSpec]:
    """DeepSpeed's form of the list, which builds only the layers of its own stage."""
    specifications = [LayerSpec(recipe.kind, *recipe.arguments) for recipe in layers]
    if not config.untie_embeddings_and_output_weights:
        # The same key on both stages, but each builds its own layer around the weight.
        ends = ((0, "word_embeddings.weight"), (-1, "weight"))
        for place, weight in ends:
            recipe = layers[place]
            specifications[place] = TiedLayerSpec(TIED, recipe.kind, *recipe.arguments, tied_weight_attr=weight)
    return specifications
