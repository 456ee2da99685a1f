"""What a split of a run needs of each GPU: an estimate of the allocator's peak, part by part.

Parameters are counted on the layers themselves (built without memory), on the fullest pipeline stage. What DeepSpeed
0.19.8 keeps of them follows its code; what autograd keeps of a block follows ``megatron.model``, in units of one number
a token. CUDA's own context (0.5 to 1 GB) is outside the allocator and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.config import ModelConfig
from megatron.distributed.collectives import Ranks
from megatron.distributed.tensor_parallel import TensorParallel
from megatron.model.cross_entropy import MAX_CHUNK_ELEMENTS
from megatron.model.gated_products import size_obstacle
from megatron.model.gpt import recipes
from megatron.model.sharding import stage_bounds

BUCKET = 5 * 10**8
"""Elements that DeepSpeed reduces or gathers at once, unless its JSON says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a run is split, by the names of its flags; ``half`` is --bf16 or --fp16, ``gated`` SwiGLU inside of products
    where they can have it."""

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 1
    offload: bool = False
    sequence_parallel: bool = False
    half: bool = True
    fp8: bool = False
    gated: bool = False

    @property
    def data(self) -> int:
        """Replicas."""
        return self.gpus // (self.tensor * self.pipeline)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, and on the host for each GPU."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    head: float
    host: float

    @property
    def gpu(self) -> float:
        """All of it that lies on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.activations + self.head


def estimate(
    model: ModelConfig, split: Split, *, vocabulary: int, micro_batch_size: int, seq_length: int, micro_batches: int = 1
) -> Memory:
    """Memory of the pipeline stage that needs most.

    ``vocabulary``: padded rows. ``micro_batches``: of one replica in a step; a pipeline keeps several at a time.
    """
    counts = _layer_parameters(model, split.tensor, vocabulary)
    bounds = stage_bounds(model.num_layers, split.pipeline)
    tokens = micro_batch_size * seq_length
    stages = []
    for stage in range(split.pipeline):
        own = counts[bounds[stage] : bounds[stage + 1]]
        last = stage == split.pipeline - 1
        tied_head = last and split.pipeline == 1 and not model.untie_embeddings_and_output_weights
        parameters = sum(own) - (counts[-1] if tied_head else 0)
        blocks = len(own) - (stage == 0) - 2 * last
        in_flight = min(split.pipeline - stage, micro_batches)
        stages.append(
            Memory(
                *_states(parameters, split),
                activations=_activations(model, split, blocks, tokens, in_flight),
                head=_head(model, split, vocabulary, tokens) if last else 0.0,
                host=_host(parameters, split, micro_batches),
            )
        )
    return max(stages, key=lambda memory: memory.gpu)


def _layer_parameters(model: ModelConfig, tensor: int, vocabulary: int) -> list[int]:
    """Parameters that a tensor-parallel rank has of each layer, the head counted as if it were not tied."""
    part = TensorParallel(size=tensor, rank=0, ranks=Ranks("no group", tensor) if tensor > 1 else None)
    layers = recipes(model, vocabulary, vocabulary, True, part)
    with torch.device("meta"):
        different = [layers[0].build(), layers[1].build(), layers[-2].build(), layers[-1].build()]
    embedding, block, norm, head = (sum(p.numel() for p in layer.parameters()) for layer in different)
    return [embedding, *([block] * model.num_layers), norm, head]


def _states(parameters: int, split: Split) -> tuple[float, float, float, float]:
    """(parameters, gradients, optimizer, buffers) in bytes."""
    width = 2 if split.half else 4
    shares = [1 / split.data if split.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    # fp32 master weights and two moments.
    optimizer = 0.0 if split.offload else 12.0 * parameters * shares[0]
    gradients = 4.0 * parameters * shares[1]  # accumulated in fp32
    buffers = 0.0
    if split.zero_stage >= 2:
        buffers += BUCKET * width
    elif split.data > 1 or (split.offload and split.half):
        buffers += min(BUCKET, parameters) * 4.0
    if split.zero_stage == 3:
        buffers += min(2 * BUCKET, parameters) * width  # parameters gathered at a time
    return width * parameters * shares[2], gradients, optimizer, buffers


def _host(parameters: int, split: Split, micro_batches: int) -> float:
    """Pinned memory of an offloaded optimizer: master weights, moments, gradient, and what accumulates it."""
    if not split.offload:
        return 0.0
    accumulated = 4 if micro_batches > 1 and split.zero_stage >= 2 else 0
    return (12.0 + 4.0 + accumulated) * parameters / split.data


def _activations(model: ModelConfig, split: Split, blocks: int, tokens: int, in_flight: int) -> float:
    """Bytes that ``blocks`` keep for the backward pass, of all micro-batches in flight."""
    width, h = 2 if split.half else 4, model.hidden_size
    stream = h / (split.tensor if split.sequence_parallel else 1)  # one residual stream
    query, key = model.num_attention_heads * model.head_size, model.num_kv_heads * model.head_size
    attention = (query + 2 * key) + query  # the projection, whose queries and keys rotate in place, and the context
    inner = (3 if model.swiglu else 2) * model.ffn_size
    # Outputs of the two norms besides, of which RMSNorm's backward pass makes its inputs again (in fp16 it does not).
    norms = 2 if model.normalization == "rmsnorm" else 4
    kept = norms * stream + (attention + inner) / split.tensor
    fits = model.swiglu and split.tensor == 1 and size_obstacle(h, model.ffn_size) is None
    if split.fp8 or (split.gated and fits):
        # The factor of the MLP's last product is made again out of its first product: rounded by compiled code, or by
        # the product of the backward pass that has SwiGLU inside.
        kept -= model.ffn_size / split.tensor
    if split.fp8 and norms == 4 and split.tensor == 1:
        kept -= 2 * stream  # compiled code rounds LayerNorm's inputs again, where no collective is in between
    if model.hidden_dropout > 0 and split.tensor > 1:
        kept += 2 * stream / width  # a byte a number: the masks, which compiled code draws again if the layer is whole
    plan = model.recompute
    if plan is None or plan[0] == "selective":
        held, working = blocks * kept, 0.0
    elif plan[1] == "block":
        recomputed = min(plan[2], blocks)
        held, working = recomputed * stream + (blocks - recomputed) * kept, kept if recomputed else 0.0
    else:
        held, working = -(-blocks // plan[2]) * stream, min(plan[2], blocks) * kept
    # Besides the kept tensors: the gradients of one block while it is being computed.
    transient = 2 * stream + inner / split.tensor
    return width * tokens * (in_flight * (held + stream) + working + transient)


def _head(model: ModelConfig, split: Split, vocabulary: int, tokens: int) -> float:
    """Bytes of final norm, head and loss: one chunk of logits, whose gradient takes their place, and the head's fp32
    gradient.

    Tensor-parallel ranks have fp32 copies between the two. Narrow heads in compiled code keep no logits
    (``narrow_head``): theirs is an upper bound.
    """
    width, h, rows = 2 if split.half else 4, model.hidden_size, vocabulary / split.tensor
    chunk = min(MAX_CHUNK_ELEMENTS, tokens * rows)
    logit = 2 * width + 4 if split.tensor > 1 and split.half else width
    return width * 4 * tokens * h + chunk * logit + 4 * rows * h
