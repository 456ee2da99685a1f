"""How an engine sees the list of layers: as one module, or (``pipeline``) as the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

from megatron.config import ModelConfig
from megatron.model.attention import Attention
from megatron.model.cross_entropy import Terms, chunk_terms
from megatron.model.gpt import Block, FinalNorm, Head, Reduction, State, named_parameters
from megatron.model.head_kernels import has_softmax_terms, narrow_head, softmax_terms
from megatron.model.mlp import MLP
from megatron.model.rope import rotary_table

BLOCKS_IN_ONE_GRAPH = 12
"""Up to this many blocks are compiled as one graph: kernels join across blocks, and a small model waits less for Python
(7M, three blocks: 17 % faster than one by one; 57M, nine: 3 %). Deeper models would wait longer for the compiler."""

Runner = Callable[[Sequence[nn.Module], State, Tensor | None], State]
"""Applies consecutive layers, the last of them at chosen positions (see :class:`Block`) unless they are None."""


def run_in_order(layers: Sequence[nn.Module], state: State, chosen: Tensor | None = None) -> State:
    """The state behind the last of ``layers``, a block if positions are ``chosen``."""
    for layer in layers:
        at_all = chosen is None or layer is not layers[-1]
        state = layer(*state) if at_all else layer(*state, chosen=chosen)
    return state


class SequentialGPT(nn.Module):
    """The layers one after the other, in one process. Parameters are called ``layers.<i>.<name>`` (see ``gpt``)."""

    def __init__(self, layers: Sequence[nn.Module], config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.config = config
        self.run_blocks: Runner = run_in_order

    @property
    def first_layer(self) -> int:
        """Index in the whole model of the first layer here."""
        return 0

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Parameters by name, each once (see ``gpt``)."""
        return named_parameters(list(self.layers), self.config, 0)

    def forward(self, inputs: Tensor, positions: Tensor, targets: Tensor, weights: Tensor,
                attention_mask: Tensor | None = None, scored: Tensor | None = None,
                reduction: Reduction = "sum") -> Tensor:
        """Loss of one batch: ``sum(nll * weights)`` as a scalar, or each row's sum [b] without gradients ("rows").

        inputs, positions, targets [b, s] int64; weights [b, s] fp32; attention_mask None, documents [b, s] int32 or
        [b, 1, s, s] bool (see ``masks``); scored [capacity] int64 or None: the positions to compute the head at. fp32
        whatever the parameters' dtype.
        """
        state = self._hidden(inputs, positions, attention_mask, scored)
        loss: Tensor = self.layers[-1](state, targets, weights, scored, reduction)
        return loss

    def logits(self, inputs: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [b, s, V] of every position, -inf at ids that are no token (mask, padding)."""
        logits: Tensor = self.layers[-1](self._hidden(inputs, positions, attention_mask))
        return logits

    def _hidden(
        self, inputs: Tensor, positions: Tensor, attention_mask: Tensor | None, scored: Tensor | None = None
    ) -> State:
        """Everything but the head: (final hidden [b, s, h], ...); [capacity, h] where that is all that is needed."""
        state = (inputs, positions) if attention_mask is None else (inputs, positions, attention_mask)
        return run_layers(list(self.layers[:-1]), state, self.config, self.training, self.run_blocks, scored)


def run_layers(
    layers: Sequence[nn.Module],
    state: State,
    config: ModelConfig,
    training: bool,
    run_blocks: Runner = run_in_order,
    scored: Tensor | None = None,
) -> State:
    """Apply consecutive layers of the model, without the head: all of them, or those of a pipeline stage.

    Takes and returns positions as ``places``, and a mask as the batch has it. Recomputes activations as ``config``
    says, where ``--recompute-method block`` counts from the first block among ``layers``, as in Megatron.
    ``run_blocks`` applies a run of blocks. If the last block is the model's last one, it needs to compute its MLP at
    the positions ``scored`` [capacity] only, and leaves hidden as [capacity, h]; with sequence parallelism it does not,
    since each rank has tokens of its own.
    """
    positions, *masks = state[1:]
    blocks = [layer for layer in layers if isinstance(layer, Block)]
    before = 0 if blocks and layers[0] is blocks[0] else 1
    state = run_in_order(layers[:before], state)
    if config.use_rotary_position_embeddings:
        # Once for all blocks; a block that is handed positions would make the table itself.
        state = (state[0], rotary_table(positions, config.head_size, config.rope_theta), *state[2:])
    if masks and blocks:
        # Once for all blocks, too; what travels to the next stage stays as small as the batch has it.
        attention = blocks[0].self_attention
        state = (*state[:2], attention.prepare_mask(masks[0], state[0].dtype))
    recompute = training and torch.is_grad_enabled()
    has_dropout = max(config.hidden_dropout, config.attention_dropout) > 0
    if blocks and blocks[-1].tensor.sequence_parallel:
        scored = None
    for run, recomputed in plan_recomputation(config, blocks):
        chosen = scored if run[-1:] == blocks[-1:] else None
        if recompute and recomputed:
            state = checkpoint(run_blocks, run, state, chosen, use_reentrant=False, preserve_rng_state=has_dropout)
        else:
            state = run_blocks(run, state, chosen)
    state = run_in_order(layers[before + len(blocks) :], state)
    return state[0], positions, *masks


def plan_recomputation(config: ModelConfig, blocks: Sequence[nn.Module]) -> list[tuple[Sequence[nn.Module], bool]]:
    """Cut ``blocks`` into runs, each with whether its activations are recomputed in the backward pass.

    ``--recompute-granularity full`` with method ``uniform``: runs of ``recompute_num_layers`` blocks, all recomputed
    (only the input of a run is kept); with ``block``: the first ``recompute_num_layers`` blocks, one by one, and the
    rest not at all. ``selective`` is done inside the attention.
    """
    if config.recompute is None or config.recompute[0] != "full":
        return [(blocks, False)]
    _, method, count = config.recompute
    if method == "block":
        return [([block], True) for block in blocks[:count]] + [(blocks[count:], False)]
    return [(blocks[start : start + count], True) for start in range(0, len(blocks), count)]


def stage_bounds(num_blocks: int, stages: int) -> list[int]:
    """First layer of every stage, and the number of layers behind the last: blocks as even as they divide.

    The embedding is on the first stage, final norm and head on the last. Blocks left over go to the middle stages
    first, then to the first one: the last has the head's work besides.
    """
    assert num_blocks >= stages, f"{num_blocks} blocks on {stages} stages"
    blocks = [num_blocks // stages] * stages
    for stage in [*range(1, stages - 1), 0][: num_blocks % stages]:
        blocks[stage] += 1
    bounds = [0]
    for stage, count in enumerate(blocks):
        bounds.append(bounds[-1] + count + (1 if stage == 0 else 0) + (2 if stage == stages - 1 else 0))
    return bounds


class Runs(Protocol):
    """A model, or a stage of one, whose blocks :func:`run_layers` applies through ``run_blocks``."""

    config: ModelConfig
    run_blocks: Runner

    def modules(self) -> Iterator[nn.Module]:
        """Every module, layers included."""


def compile_blocks(
    model: Runs,
    backend: str | Callable[..., Any] = "inductor",
    *,
    one_by_one: bool = False,
    memory_budget: float | None = None,
) -> None:
    """``torch.compile`` the blocks and the pointwise part of the loss, in place: parameter names stay. Attention masks
    can then go through FlexAttention, which is compiled into the block.

    The blocks of a deep model share one graph of a single block, so that it compiles as fast as a shallow one; those of
    a shallow one (up to ``BLOCKS_IN_ONE_GRAPH``) form one graph together, unless whole blocks are recomputed or are to
    be called ``one_by_one``, as ZeRO 3 needs. Shapes of blocks are static but for the number of scored positions: the
    last block's MLP and the loss may see another one in each batch. Call it before DeepSpeed wraps the model: what it
    hooks to a block runs outside the compiled code.

    ``memory_budget``, in 0 .. 1: of the bytes between keeping a block's inputs only (0) and all that its backward pass
    would read (1), the share that may be kept; the compiler recomputes what is cheapest for its size.
    """
    if memory_budget is not None:
        torch._functorch.config.activation_memory_budget = memory_budget  # read at the first pass; the only door to it
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    recomputed = model.config.recompute is not None and model.config.recompute[0] == "full"
    if len(blocks) <= BLOCKS_IN_ONE_GRAPH and not recomputed and not one_by_one:
        model.run_blocks = _with_any_rows(torch.compile(run_in_order, backend=backend, dynamic=False))
    else:
        model.run_blocks = _with_any_rows(run_in_order)
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=backend, dynamic=False)  # type: ignore[method-assign]
    make_block_mask = torch.compile(create_block_mask, backend=backend, dynamic=False)
    for block in blocks:
        block.self_attention.make_block_mask = make_block_mask
    for module in model.modules():
        if isinstance(module, Head):
            module.terms = _terms_of_any_rows(torch.compile(chunk_terms, backend=backend))
            module.at_once = narrow_head
        elif isinstance(module, FinalNorm):
            module.by_kernels = True


def use_flash_attention(model: Runs) -> None:
    """Let attention go through FlashAttention where there is a backward pass and no mask. Call it before
    :func:`compile_blocks`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.flash = True


def use_gated_products(model: Runs) -> None:
    """Let products of MLPs have SwiGLU inside where there is a backward pass. Call it before :func:`compile_blocks`."""
    for module in model.modules():
        if isinstance(module, MLP):
            module.gated_products = module.swiglu


def describe_masks(model: Runs, device: torch.device, length: int, training: bool) -> str:
    """Which attention a batch's masks of ``length`` positions go through, and why not the faster one."""
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    obstacle = attention.flex_obstacle(device, attention.dense.weight.dtype, length, training)
    return "FlexAttention" if obstacle is None else f"dense masks through SDPA ({obstacle})"


def _with_any_rows(runner: Runner) -> Runner:
    """``runner``, whose compiled blocks are told from their first call on that the number of chosen positions will
    change: no other size compiles again."""

    def run_blocks(blocks: Sequence[nn.Module], state: State, chosen: Tensor | None = None) -> State:
        if chosen is not None:
            torch._dynamo.maybe_mark_dynamic(chosen, 0)
        return runner(blocks, state, chosen)

    return run_blocks


def _terms_of_any_rows(compiled: Terms) -> Terms:
    """The loss's own kernel where it has one, else ``compiled``, told as above."""

    def terms(logits: Tensor, targets: Tensor, weights: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        if has_softmax_terms(logits):
            return softmax_terms(logits, targets, weights, num_tokens)
        for tensor in (logits, targets, weights):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, targets, weights, num_tokens)

    return terms
