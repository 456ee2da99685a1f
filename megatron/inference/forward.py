"""Running a model for its predictions: hidden states, logits at chosen positions, scores of targets."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.model.gpt import Head
from megatron.model.rope import rotary_table
from megatron.model.sharding import SequentialGPT, run_in_order

MAX_LOGITS = 2**27
"""Logits at once: 512 MB in fp32."""


def kernels_for_any_shape() -> AbstractContextManager[None]:
    """Attention without cuDNN's kernels, which PyTorch prefers on Hopper: they are planned anew for each new shape.

    Planning takes a tenth of a second and more, and here hardly two batches, and no two steps of a cache, have one
    shape. (A model that trains has a single one, and keeps cuDNN.)
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def final_hidden(
    model: SequentialGPT, inputs: Tensor, positions: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """What the head reads: inputs, positions [b, s] int64 -> [b, s, h].

    ``attention_mask`` bool, broadcastable to [b, 1, s, s], True where a query (dim 2) may attend to a key (dim 3);
    None: the past of a causal model, everything in a bidirectional one.
    """
    embedding, *rest, _ = model.layers
    hidden, _ = embedding(inputs, positions)
    mask = () if attention_mask is None else (attention_mask,)
    final: Tensor = run_in_order(rest, (hidden, places(model, positions), *mask))[0]
    return final


def places(model: SequentialGPT, positions: Tensor) -> Tensor:
    """What blocks are told of positions [b, s]: the rotary table [b, s, head_size], or the positions themselves."""
    config = model.config
    if not config.use_rotary_position_embeddings:
        return positions
    return rotary_table(positions, config.head_size, config.rope_theta)


def head_logits(model: SequentialGPT, hidden: Tensor) -> Tensor:
    """Logits [n, V] of final hidden states [n, h], -inf at ids that are no token."""
    logits: Tensor = model.layers[-1]((hidden,))
    return logits


def token_scores(model: SequentialGPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For final hidden states [n, h] and targets [n], each [n]: -log p(target), 1 where the target is the most probable
    token else 0, and the log probability of that token.

    Logits are made chunk by chunk; softmax and results are fp32 (fp64 for an fp64 model).
    """
    parts = []
    head = model.layers[-1]
    assert isinstance(head, Head)
    rows = max(1, MAX_LOGITS // len(head.weight))
    for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = head_logits(model, part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        normalizer = logits.logsumexp(dim=-1)
        best, mode = logits.max(dim=-1)
        nll = normalizer - logits.gather(1, target.unsqueeze(1)).squeeze(1)
        parts.append((nll, (mode == target).to(nll.dtype), best - normalizer))
    nlls, corrects, confidences = zip(*parts, strict=True)
    return torch.cat(nlls), torch.cat(corrects), torch.cat(confidences)


def padding_mask(lengths: Tensor, width: int) -> Tensor:
    """[b, 1, 1, width] bool, True at the first ``lengths`` [b] keys: padding is outside every query's attention."""
    return (torch.arange(width, device=lengths.device) < lengths.unsqueeze(1))[:, None, None, :]
