"""The GPT as ONE list of layers: Embedding, blocks, final norm, head. ``sharding`` makes a model of the list.

Every layer takes ``hidden, places[, attention_mask]`` and returns them as a tuple (the head ends the list with its loss
or its logits), so the list can be cut anywhere. ``places`` are positions [b, s] int64; whoever owns a run of blocks may
replace them once by the rotary table [b, s, head_size] fp32, which each block would else compute itself, and replaces
the batch's mask once by what attention computes with (see ``masks``). With sequence parallelism the hidden state
between layers is [own tokens, h] (see ``distributed.tensor_parallel``).

Parameter names, for blocks i = 1 .. L (``.bias`` beside ``.weight`` where a linear layer or a LayerNorm has one), and
their whole shapes, of which each tensor-parallel rank has the part that ``partition`` says:

    layers.0.word_embeddings.weight                   [V, h]
    layers.0.position_embeddings.weight               [max positions, h], with learned positions
    layers.i.input_layernorm.weight                   [h]
    layers.i.self_attention.query_key_value.weight    [(q + 2 kv) d, h], rows [q; k; v]
    layers.i.self_attention.dense.weight              [h, q d]
    layers.i.post_attention_layernorm.weight          [h]
    layers.i.mlp.dense_h_to_4h.weight                 [2 ffn, h], rows [gate; up]; [ffn, h] with GELU
    layers.i.mlp.dense_4h_to_h.weight                 [h, ffn]
    layers.(L+1).final_layernorm.weight               [h]
    layers.(L+2).weight                               [V, h]: the head; tied, it IS layers.0.word_embeddings.weight
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.distributed.collectives import copy_to_ranks, gather_rows
from megatron.distributed.tensor_parallel import (
    ALONE,
    PositionEmbedding,
    TensorParallel,
    VocabularyParallelEmbedding,
)
from megatron.model.attention import Attention
from megatron.model.cross_entropy import AtOnce, Terms, chunk_terms, linear_cross_entropy, weighted_nll
from megatron.model.dropout import dropout
from megatron.model.masks import Mask
from megatron.model.mlp import MLP
from megatron.model.norm import branch, build_norm, last_norm
from megatron.model.partition import cut_of
from megatron.model.residual import join, join_mlp, joins_alone

State = tuple[Any, ...]  # tensors; a mask may be FlexAttention's while it is among blocks
Reduction = Literal["sum", "rows"]


class Embedding(nn.Module):
    """Token embedding, plus learned positions unless positions are rotary, then dropout."""

    def __init__(self, config: ModelConfig, vocabulary_size: int, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.tensor = tensor
        self.word_embeddings = VocabularyParallelEmbedding(vocabulary_size, config.hidden_size, tensor)
        learned = not config.use_rotary_position_embeddings
        places = config.max_position_embeddings
        self.position_embeddings = PositionEmbedding(places, config.hidden_size, tensor) if learned else None

    def forward(self, inputs: Tensor, positions: Tensor, *mask: Tensor) -> State:
        """inputs [b, s] int64, positions [b, s] int64[, mask] -> (hidden [b, s, h], positions[, mask])."""
        hidden = self.word_embeddings(inputs)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(positions)
        return dropout(hidden, self.dropout, self.training, self.tensor), positions, *mask


class Block(nn.Module):
    """Pre-norm transformer block: x + dropout(attention(norm(x))), then the same with the MLP."""

    def __init__(self, config: ModelConfig, causal: bool, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.tensor = tensor
        self.input_layernorm = build_norm(config, tensor)
        self.self_attention = Attention(config, causal, tensor)
        self.post_attention_layernorm = build_norm(config, tensor)
        self.mlp = MLP(config, tensor)

    def forward(self, hidden: Tensor, places: Tensor, *mask: Mask, chosen: Tensor | None = None) -> State:
        """hidden [b, s, h], places[, mask] -> the same with the next hidden.

        With ``chosen`` [n] int64, distinct indices into b*s, that is [n, h], and the MLP computes these positions only:
        for the last block, where others are not scored. Not with sequence parallelism.
        """
        alone = joins_alone(self.mlp.dense_4h_to_h, self.dropout, self.training)
        hidden, normal = branch(self.input_layernorm, hidden, alone)
        context = self.self_attention.context(normal, places, *mask)
        hidden = join(hidden, self.self_attention.dense, context, self.dropout, self.training)
        if chosen is not None:
            hidden = choose_rows(hidden.flatten(0, 1), chosen)
        hidden, normal = branch(self.post_attention_layernorm, hidden, alone)
        hidden = join_mlp(hidden, self.mlp, normal, self.dropout, self.training)
        return hidden, places, *mask


class FinalNorm(nn.Module):
    """Normalisation after the last block."""

    def __init__(self, config: ModelConfig, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.final_layernorm = build_norm(config, tensor)
        self.by_kernels = False  # beside compiled blocks

    def forward(self, hidden: Tensor, *rest: Tensor | Mask) -> State:
        """hidden [b, s, h], ... -> the same, normalised."""
        norm = self.final_layernorm
        return last_norm(norm, hidden) if self.by_kernels else norm(hidden), *rest


class Head(nn.Module):
    """Output projection, with the loss inside: logits of all positions need never exist (see ``cross_entropy``).

    Divided over tensor-parallel ranks by ids, as the embedding; they exchange sums of exponentials, never logits.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int, num_tokens: int, tensor: TensorParallel) -> None:
        super().__init__()
        self.weight = VocabularyParallelEmbedding(vocabulary_size, config.hidden_size, tensor).weight
        self.num_tokens = num_tokens
        self.tensor = tensor
        self.terms: Terms = chunk_terms
        self.at_once: AtOnce | None = None

    def forward(self, state: State, targets: Tensor | None = None, weights: Tensor | None = None,
                scored: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Loss, or logits when there are no targets.

        hidden first in ``state``, [b, s, h] or already [capacity, h]; targets [b, s] int64; weights [b, s] fp32; scored
        [capacity] int64, distinct indices into b*s that hold every non-zero weight (None: all). Returns
        ``sum(nll * weights)`` as a scalar ("sum"), or its sums over each row [b] without gradients ("rows"), fp32; or
        logits [b, s, V], -inf at ids that are no token.
        """
        hidden = state[0]
        if targets is None or weights is None:
            assert self.tensor.size == 1, "logits are for tools, which run in one process"
            logits = F.linear(hidden, self.weight)
            logits[..., self.num_tokens:] = -torch.inf
            return logits
        batch, length = targets.shape
        # With sequence parallelism each rank has only its own tokens, of which others may be the scored ones.
        hidden = gather_rows(hidden, self.tensor.token_ranks)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        targets, weights = targets.reshape(-1), weights.reshape(-1)
        if scored is not None:
            targets, weights = targets.index_select(0, scored), weights.index_select(0, scored)
            if len(hidden) == batch * length:
                hidden = choose_rows(hidden, scored)
        if reduction == "sum":
            if not self.tensor.sequence_parallel:
                hidden = copy_to_ranks(hidden, self.tensor.ranks)
            return linear_cross_entropy(
                hidden, self.weight, targets, weights, self.num_tokens, self.terms, self.tensor, self.at_once
            )
        terms = weighted_nll(hidden, self.weight, targets, weights, self.num_tokens, self.tensor)
        if scored is not None:
            terms = terms.new_zeros(batch * length).index_copy_(0, scored, terms)
        return terms.view(batch, length).sum(dim=1)


def choose_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [n, h], distinct indices ``rows`` [m] int64 -> [m, h]."""
    out: Tensor = _ChooseRows.apply(x, rows)
    return out


class _ChooseRows(torch.autograd.Function):
    """``index_select``, whose own gradient would add up: here no two rows go to the same place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy(0, rows, grad), None


class Recipe(NamedTuple):
    """A layer that is not built yet."""

    kind: type[nn.Module]
    arguments: tuple[Any, ...]

    def build(self) -> nn.Module:
        """The layer, weights uninitialised, on the default device."""
        return self.kind(*self.arguments)


def recipes(
    config: ModelConfig, vocabulary_size: int, num_tokens: int, causal: bool, tensor: TensorParallel = ALONE
) -> list[Recipe]:
    """The list of layers: [Embedding, Block x L, FinalNorm, Head].

    ``vocabulary_size`` counts the padded rows of the embedding (mask id included), ``num_tokens`` the real tokens,
    which alone can be predicted. ``causal``: each position attends to its past (AR), or to everything (MDM).
    ``tensor``: this process's part of every layer.
    """
    assert 0 < num_tokens <= vocabulary_size
    embedding = Recipe(Embedding, (config, vocabulary_size, tensor))
    blocks = [Recipe(Block, (config, causal, tensor)) for _ in range(config.num_layers)]
    head = Recipe(Head, (config, vocabulary_size, num_tokens, tensor))
    return [embedding, *blocks, Recipe(FinalNorm, (config, tensor)), head]


def build_layers(
    config: ModelConfig, vocabulary_size: int, num_tokens: int, causal: bool, tensor: TensorParallel = ALONE
) -> list[nn.Module]:
    """The whole list of layers, built; arguments as :func:`recipes`. Tied, the head has the embedding's weight."""
    layers = [recipe.build() for recipe in recipes(config, vocabulary_size, num_tokens, causal, tensor)]
    embedding, head = layers[0], layers[-1]
    assert isinstance(embedding, Embedding) and isinstance(head, Head)
    if not config.untie_embeddings_and_output_weights:
        head.weight = embedding.word_embeddings.weight
    return layers


def decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter called ``name``: to matrices (embeddings and head included, as in
    Megatron), not to norms and biases. By name, since ZeRO 3 shows every parameter as one-dimensional."""
    return name.endswith(".weight") and "norm" not in name


def named_parameters(layers: Sequence[nn.Module], config: ModelConfig, first: int) -> dict[str, nn.Parameter]:
    """Parameters of ``layers`` (layer ``first`` of the model and the following) by their names within the whole model.

    Each parameter once, under its first name: a tied head, alone on the last pipeline stage too, is the embedding.
    """
    found: dict[str, nn.Parameter] = {}
    for index, layer in enumerate(layers, start=first):
        tied = isinstance(layer, Head) and not config.untie_embeddings_and_output_weights
        for name, parameter in layer.named_parameters():
            found.setdefault("layers.0.word_embeddings.weight" if tied else f"layers.{index}.{name}", parameter)
    return found


Access = Callable[[nn.Parameter], AbstractContextManager[bool]]
"""Makes a parameter whole while its value is set; tells whether this process is to set it."""


def initialize_weights(
    layers: Sequence[nn.Module], config: ModelConfig, seed: int, first: int = 0, access: Access | None = None
) -> None:
    """Fill the parameters of ``layers`` (layer ``first`` of the model and the following): norms 1, biases 0, matrices
    N(0, init_method_std), and those that write to the residual stream N(0, init_method_std / sqrt(2 L))
    (Radford et al. 2019, section 2.3).

    Each matrix is drawn whole, in fp32 on the CPU, from a generator of its own seeded by (seed, parameter name): any
    process can make any matrix, and cut its part of it, and gets the same numbers whatever the topology, device and
    dtype. ``access`` serves parameters that ZeRO 3 has divided (``engine.whole_parameter``).
    """
    tensor = next((layer.tensor for layer in layers if isinstance(layer, Embedding | Block | Head)), ALONE)
    parameters = list(named_parameters(layers, config, first).items())

    def draw(item: tuple[str, nn.Parameter]) -> Tensor:
        shape = getattr(item[1], "ds_shape", item[1].shape)  # a divided parameter looks empty
        return initial_weight(item[0], shape, config, seed, tensor)

    # Generators are independent, so matrices can be drawn side by side: 16 cores fill the 425M model in under a second.
    threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, torch.no_grad():
        for start in range(0, len(parameters), threads):  # never more of them at a time than threads
            some = parameters[start : start + threads]
            if access is None:
                for (_, parameter), value in zip(some, pool.map(draw, some)):
                    parameter.copy_(value)
                continue
            for item in some:
                with access(item[1]) as mine:
                    if mine:
                        item[1].copy_(draw(item))


def initial_weight(
    name: str, shape: torch.Size, config: ModelConfig, seed: int, tensor: TensorParallel = ALONE
) -> Tensor:
    """First value, fp32 on the CPU, of the part with ``shape`` of parameter ``name`` that this rank has."""
    if name.endswith(".bias"):
        return torch.zeros(shape, device="cpu")
    if not decayed(name):
        return torch.ones(shape, device="cpu")
    std = config.init_method_std
    if name.endswith(("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    cut = cut_of(name, config, shape[0] * tensor.size) if tensor.size > 1 else None
    whole = shape if cut is None else cut.whole_shape(shape)
    values = torch.empty(whole, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
    return values if cut is None else cut.part(values, tensor.rank, tensor.size)
