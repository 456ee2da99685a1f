"""Multi-head self-attention with grouped queries (Ainslie et al., arXiv 2305.13245), through PyTorch's fused SDPA.

Batches with masks go through FlexAttention where it can serve (see ``masks``); those without, in training, through
FlashAttention where a run chooses it (see ``flash_attention``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from megatron.config import ModelConfig
from megatron.distributed.collectives import gather_rows
from megatron.distributed.tensor_parallel import (
    ALONE,
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    differs_by_rank,
)
from megatron.model.flash_attention import flash_attention
from megatron.model.masks import BlockMaskMaker, Mask, block_mask, dense_mask, flex_obstacle
from megatron.model.rope import rotary_table, split_heads, turn_heads


class Attention(nn.Module):
    """Self-attention, causal or full.

    ``query_key_value.weight`` rows are [q; k; v], each ordered by head (the layout of published Megatron-DeepSpeed
    checkpoints); ``dense`` maps the concatenated heads back. No mask is materialised unless the batch brings one.

    Tensor parallelism gives every rank its share of the query heads and of the key/value heads. Where the latter do not
    divide (fewer heads than ranks), each rank projects an equal share of their features, all ranks put the heads
    together, and each keeps those that its query heads attend with.
    """

    def __init__(self, config: ModelConfig, causal: bool, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.causal = causal
        self.tensor = tensor
        self.head_size = config.head_size
        self.num_heads = tensor.share(config.num_attention_heads)
        self.group_size = config.num_attention_heads // config.num_kv_heads  # query heads of a key/value head
        self.shared_kv = config.num_kv_heads % tensor.size != 0
        self.num_kv_heads = self.num_heads if self.shared_kv else tensor.share(config.num_kv_heads)
        self.kv_features = tensor.share(config.num_kv_heads * config.head_size)
        self.rotary = config.use_rotary_position_embeddings
        self.theta = config.rope_theta
        self.dropout = config.attention_dropout
        self.recompute = config.recompute is not None and config.recompute[0] == "selective"
        self.make_block_mask: BlockMaskMaker | None = None  # compiled, once this layer is
        self.flash = False  # FlashAttention, where there is a backward pass and no mask
        bias = not config.disable_bias_linear
        projected = config.num_attention_heads * self.head_size
        features = projected + 2 * config.num_kv_heads * self.head_size
        self.query_key_value = ColumnParallelLinear(config.hidden_size, features, bias, tensor)
        self.dense = RowParallelLinear(projected, config.hidden_size, bias, tensor)

    def flex_obstacle(self, device: torch.device, dtype: torch.dtype, length: int, training: bool) -> str | None:
        """Why masks of ``length`` positions do not go through FlexAttention, in words; None if they do.

        ``dtype`` is that of the activations.
        """
        return flex_obstacle(
            compiled=self.make_block_mask is not None,
            device=device,
            dtype=dtype,
            head_size=self.head_size,
            length=length,
            dropout=self.dropout if training else 0.0,
        )

    def prepare_mask(self, mask: Tensor, dtype: torch.dtype) -> Mask:
        """A batch's mask (document numbers [b, s] or bool [b, 1, s, s]) as :meth:`forward` takes it, of any block.

        ``dtype`` is that of the activations.
        """
        obstacle = self.flex_obstacle(mask.device, dtype, mask.shape[-1], self.training)
        if obstacle is not None or self.make_block_mask is None:
            return dense_mask(mask, self.causal)
        return block_mask(mask, self.causal, self.make_block_mask)

    def forward(self, hidden: Tensor, places: Tensor, attention_mask: Mask | None = None) -> Tensor:
        """hidden [b, s, h] -> [b, s, h]; with sequence parallelism [own tokens, h], both.

        ``places`` are positions [b, s] int64, or already the rotary table [b, s, head_size] made from them;
        ``attention_mask`` [b, 1, s, s] bool, True where the query (dim 2) may attend to the key (dim 3), or the same
        for FlexAttention, replaces the causal or full pattern.
        """
        out: Tensor = self.dense(self.context(hidden, places, attention_mask))
        return out

    def context(self, hidden: Tensor, places: Tensor, attention_mask: Mask | None = None) -> Tensor:
        """All but the last product: arguments as :meth:`forward` -> [b, s, own heads * head_size]."""
        batch, length = places.shape[:2]
        projected = self.query_key_value(hidden)
        if self.shared_kv:
            projected = self._with_whole_kv_heads(projected.view(batch, length, -1))
        heads = projected.view(batch, length, -1, self.head_size)  # [b, s, q + 2 kv, head_size]
        table = None
        if self.rotary:
            table = places if places.is_floating_point() else rotary_table(places, self.head_size, self.theta)
        if self.flash and attention_mask is None and heads.requires_grad:
            turned = turn_heads(heads, self.num_heads + self.num_kv_heads, table)
            return self._maybe_recomputed(self._attend_flash, turned)
        parts = split_heads(heads, (self.num_heads, self.num_kv_heads), table)
        return self._maybe_recomputed(self._attend, *parts, attention_mask)

    def _maybe_recomputed(self, attend: Callable[..., Tensor], heads: Tensor, *others: Any) -> Tensor:
        if not (self.recompute and self.training and heads.requires_grad):
            return attend(heads, *others)
        context: Tensor = checkpoint(
            attend, heads, *others, use_reentrant=False, preserve_rng_state=self.dropout > 0
        )
        return context

    def _with_whole_kv_heads(self, projected: Tensor) -> Tensor:
        """[b, s, q d + 2 shares of kv d] -> [b, s, (q + 2 q) d]: a key and a value head for each query head."""
        query, shares = projected.split((self.num_heads * self.head_size, 2 * self.kv_features), dim=-1)
        batch, length = query.shape[:2]
        own = shares.reshape(1, batch, length, 2, self.kv_features)
        every = gather_rows(own, self.tensor.ranks)  # [ranks, b, s, 2, share of kv d]
        heads = every.permute(1, 2, 3, 0, 4).reshape(batch, length, 2, -1, self.head_size)  # [b, s, 2, kv, d]
        first = self.tensor.rank * self.num_heads
        needed = torch.arange(first, first + self.num_heads, device=heads.device) // self.group_size  # [q]
        return torch.cat((query, heads.index_select(3, needed).flatten(2)), dim=-1)

    def _attend_flash(self, heads: Tensor) -> Tensor:
        """[b, s, q + 2 kv, head_size] -> [b, s, q * head_size]."""
        return flash_attention(heads, (self.num_heads, self.num_kv_heads), self.causal).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask | None) -> Tensor:
        """[b, s, heads, head_size] each -> [b, s, heads * head_size]."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [b, heads, s, head_size]
        grouped = self.num_kv_heads != self.num_heads
        if isinstance(attention_mask, BlockMask):
            context = flex_attention(query, key, value, block_mask=attention_mask, enable_gqa=grouped)
            return context.transpose(1, 2).flatten(2)  # [b, s, heads * head_size]
        if grouped and attention_mask is not None:
            # The fused kernels that take a mask do not take grouped heads; without this SDPA falls back to s x s fp32.
            repeats = self.num_heads // self.num_kv_heads
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
            grouped = False
        dropout = self.dropout if self.training else 0.0

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value,
                attn_mask=attention_mask,
                dropout_p=dropout,
                is_causal=self.causal and attention_mask is None,
                enable_gqa=grouped,
            )

        # Each tensor-parallel rank has other heads: their dropout is its own.
        context = differs_by_rank(self.tensor, attend, query.device) if dropout > 0 else attend()
        return context.transpose(1, 2).flatten(2)  # [b, s, heads * head_size]
