"""Layers that are cut over tensor-parallel ranks: linear layers, the vocabulary's embedding, norms beside them.

Megatron's scheme (Shoeybi et al., arXiv 1909.08053, section 3): a column-parallel layer reads a hidden state that every
rank has and makes this rank's features; a row-parallel layer reads them and the ranks' results are summed. With
sequence parallelism (Korthikanti et al., arXiv 2205.05198) the hidden state between them is divided by tokens, so that
norms, dropout and the residual stream are computed and kept once instead of on every rank.

In a process alone every layer here is the plain layer, and draws no random numbers when it is built: a model of
billions of parameters would spend seconds on weights that are overwritten at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.collectives import (
    Ranks,
    copy_to_ranks,
    sum_and_scatter_rows,
    sum_over_ranks,
)
from megatron.distributed.fp8 import fp8_linear
from megatron.distributed.products import column_product, row_product
from megatron.distributed.topology import Topology


@dataclass(frozen=True)
class TensorParallel:
    """Over which ranks layers are cut, and which of them this is.

    ``sequence_parallel``: between the cut layers the hidden state is [tokens / size, h], this rank's share of the
    micro-batch's b * s tokens, instead of [b, s, h] on every rank.
    """

    size: int = 1
    rank: int = 0
    ranks: Ranks | None = None
    sequence_parallel: bool = False

    @property
    def token_ranks(self) -> Ranks | None:
        """The ranks over which tokens are divided; None where they are not."""
        return self.ranks if self.sequence_parallel else None

    def share(self, total: int) -> int:
        """``total`` / size, which must be whole."""
        assert total % self.size == 0, f"{total} over {self.size} tensor-parallel ranks"
        return total // self.size

    def own_tokens(self, x: Tensor) -> Tensor:
        """[b, s, ...] -> this rank's [b * s / size, ...]: the tokens whose hidden state it keeps."""
        return x.flatten(0, 1).chunk(self.size)[self.rank]


SEED_STEP = 0x9E3779B97F4A7C15
"""Times the rank, added to a seed that all ranks have drawn alike: a seed of this rank's own."""

ALONE = TensorParallel()
"""Layers that are not cut."""


def tensor_parallel(topology: Topology, sequence_parallel: bool) -> TensorParallel:
    """What the layers of this process need to know of ``topology``."""
    if topology.tensor_parallel_size == 1:
        return ALONE
    size = topology.tensor_parallel_size
    ranks = Ranks(topology.tensor_group.group_name, size)
    return TensorParallel(size, topology.tensor_parallel_rank, ranks, sequence_parallel)


class ColumnParallelLinear(nn.Module):
    """y = x W^T (+ bias), divided by outputs: ``weight`` [out / size, in], ``bias`` [out / size] or None."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tensor = tensor
        self.weight = _cut(nn.Parameter(torch.empty(tensor.share(out_features), in_features)), tensor)
        self.bias = _cut(nn.Parameter(torch.zeros(tensor.share(out_features))), tensor) if bias else None
        self.trains_in_fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], the same on every rank -> [..., out / size]; with sequence parallelism, [own tokens, in] ->
        [b * s, out / size]."""
        ranks = self.tensor.ranks
        if ranks is None or _multiplies_in_fp8(self):
            return _linear(self, copy_to_ranks(x, ranks), self.bias)
        y = column_product(x, self.weight, ranks, self.tensor.sequence_parallel)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return _sizes(self)


class RowParallelLinear(nn.Module):
    """y = x W^T (+ bias), divided by inputs: ``weight`` [out, in / size]; ``bias`` [out] or None, whole."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tensor = tensor
        self.weight = _cut(nn.Parameter(torch.empty(out_features, tensor.share(in_features))), tensor)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.trains_in_fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in / size] -> [..., out], the same on every rank; with sequence parallelism -> [own tokens, out]."""
        ranks = self.tensor.ranks
        if ranks is None:
            return _linear(self, x, self.bias)
        if _multiplies_in_fp8(self):
            y = sum_over_ranks(_linear(self, x, None), ranks)
        else:
            y = row_product(x, self.weight, ranks, self.tensor.sequence_parallel)
        return y if self.bias is None else y + copy_to_ranks(self.bias, self.tensor.token_ranks)

    @property
    def is_one_product(self) -> bool:
        """Whether x W^T, in the dtype of x, is all there is to do now."""
        return self.tensor.ranks is None and self.bias is None and not _multiplies_in_fp8(self)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return _sizes(self)


class VocabularyParallelEmbedding(nn.Module):
    """Embedding divided by ids: ``weight`` [V / size, h], ids ``rank * V / size`` and the following."""

    def __init__(self, vocabulary_size: int, width: int, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tensor = tensor
        self.weight = _cut(nn.Parameter(torch.empty(tensor.share(vocabulary_size), width)), tensor)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [b, s] int64 -> [b, s, h]; with sequence parallelism [own tokens, h]."""
        if self.tensor.ranks is None:
            return F.embedding(ids, self.weight)
        rows = len(self.weight)
        local = ids - self.tensor.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        embedded = F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return reduce_to_residual(embedded, self.tensor)


class PositionEmbedding(nn.Module):
    """Learned positions: ``weight`` [positions, h], whole; of sequence-parallel ranks each adds those of its tokens."""

    def __init__(self, rows: int, width: int, tensor: TensorParallel) -> None:
        super().__init__()
        self.tensor = tensor
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, positions: Tensor) -> Tensor:
        """positions [b, s] int64 -> [b, s, h]; with sequence parallelism [own tokens, h]."""
        if self.tensor.sequence_parallel:
            positions = self.tensor.own_tokens(positions)
        return F.embedding(positions, copy_to_ranks(self.weight, self.tensor.token_ranks))


class TokenParallelLayerNorm(nn.LayerNorm):
    """LayerNorm of hidden states that are divided by tokens: gain and bias get the gradient of all tokens."""

    def __init__(self, width: int, eps: float, tensor: TensorParallel) -> None:
        super().__init__(width, eps=eps)
        self.tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [own tokens, h] -> the same, normalised."""
        weight, bias = (copy_to_ranks(p, self.tensor.token_ranks) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class TokenParallelRMSNorm(nn.RMSNorm):
    """RMSNorm of hidden states that are divided by tokens: the gain gets the gradient of all tokens."""

    def __init__(self, width: int, eps: float, tensor: TensorParallel) -> None:
        super().__init__(width, eps=eps)
        self.tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [own tokens, h] -> the same, normalised."""
        return F.rms_norm(x, self.normalized_shape, self.gain(), self.eps)

    def gain(self) -> Tensor:
        """The gain [h], of which every rank gets the gradient of all tokens."""
        return copy_to_ranks(self.weight, self.tensor.token_ranks)


def reduce_to_residual(partial: Tensor, tensor: TensorParallel) -> Tensor:
    """Sum the ranks' ``partial`` [..., h] into the form of the residual stream: whole, or [own tokens, h]."""
    if tensor.sequence_parallel:
        return sum_and_scatter_rows(partial.flatten(0, -2), tensor.ranks)
    return sum_over_ranks(partial, tensor.ranks)


def differs_by_rank(tensor: TensorParallel, draw: Callable[[], Tensor], device: torch.device) -> Tensor:
    """``draw()`` with random numbers of this tensor-parallel rank's own; the default generators move on alike on all.

    Where each rank works on its own heads or its own tokens, dropout must be independent; elsewhere all ranks must
    draw the same. The generator for the former is seeded by a number from the latter: nothing is stored beside torch's
    own generators, so recomputation and resumption, which restore those, restore these.
    """
    if tensor.ranks is None:
        return draw()
    return _with_own_generator(tensor, draw, device)


@torch.compiler.disable
def _with_own_generator(tensor: TensorParallel, draw: Callable[[], Tensor], device: torch.device) -> Tensor:
    # From the CPU's generator on every device: no wait for a GPU.
    common = int(torch.randint(2**62, ()))
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed((common + tensor.rank * SEED_STEP) % 2**63)
    try:
        return draw()
    finally:
        generator.set_state(state)


def _cut(parameter: nn.Parameter, tensor: TensorParallel) -> nn.Parameter:
    """Mark a parameter of which every rank has another part: gradient norms count all of them (DeepSpeed reads it)."""
    if tensor.size > 1:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def train_in_fp8(model: nn.Module) -> None:
    """Let the linear layers of ``model``'s blocks multiply in fp8 while it trains; its evaluation stays as it is.

    Embedding and head are no such layers: nothing is lost where the loss is made, and little time is spent there.
    """
    for layer in model.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            layer.trains_in_fp8 = True


def _multiplies_in_fp8(layer: ColumnParallelLinear | RowParallelLinear) -> bool:
    return layer.trains_in_fp8 and layer.training


def _linear(layer: ColumnParallelLinear | RowParallelLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T (+ bias)`` by this rank's part of ``layer``, in the dtype of x or in fp8."""
    if not _multiplies_in_fp8(layer):
        return F.linear(x, layer.weight, bias)
    y = fp8_linear(x, layer.weight)
    return y if bias is None else y + bias


def _sizes(layer: ColumnParallelLinear | RowParallelLinear) -> str:
    rows, columns = getattr(layer.weight, "ds_shape", layer.weight.shape)  # ZeRO 3 shows a divided one as empty
    return f"{columns} -> {rows}, bias={layer.bias is not None}, rank {layer.tensor.rank} of {layer.tensor.size}"
