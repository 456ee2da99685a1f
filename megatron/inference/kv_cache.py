"""A causal model read token by token: keys and values of what it has read are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.inference.forward import kernels_for_any_shape, places
from megatron.model.attention import Attention
from megatron.model.gpt import Block
from megatron.model.rope import split_heads
from megatron.model.sharding import SequentialGPT


class CachedModel:
    """A causal model and what it remembers of b sequences of at most ``capacity`` tokens.

    Rows may start late: ``valid`` [b, capacity] says which columns hold a token of the row and which are padding that
    no query may attend to. Memory: 2 x layers x b x capacity x kv heads x head size numbers of the model's dtype.
    """

    def __init__(self, model: SequentialGPT, batch_size: int, capacity: int) -> None:
        weight = next(model.parameters())
        config = model.config
        shape = (2, config.num_layers, batch_size, config.num_kv_heads, capacity, config.head_size)
        self.model = model
        self.length = 0
        self._cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._valid = torch.zeros(batch_size, capacity, dtype=torch.bool, device=weight.device)

    @torch.no_grad()
    def read(self, inputs: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """Read the next n tokens of every row: inputs, positions [b, n] int64, valid [b, n] bool (False: padding).

        Returns the final hidden states [b, n, h]; those of padding mean nothing.
        """
        start, stop = self.length, self.length + inputs.shape[1]
        self._valid[:, start:stop] = valid
        mask = self._mask(start, stop)
        embedding, *blocks, final_norm, _ = self.model.layers
        hidden, _ = embedding(inputs, positions)
        table = places(self.model, positions)
        for index, block in enumerate(blocks):
            assert isinstance(block, Block)
            attended = self._attend(block.self_attention, index, block.input_layernorm(hidden), table, mask)
            hidden = hidden + attended
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        self.length = stop
        final: Tensor = final_norm(hidden)[0]
        return final

    def keep(self, rows: Tensor) -> None:
        """Forget every sequence but ``rows`` [k] int64, which become rows 0 .. k-1."""
        self._cache = self._cache.index_select(2, rows)
        self._valid = self._valid.index_select(0, rows)

    def _mask(self, start: int, stop: int) -> Tensor:
        """[b, 1, n, stop]: a query attends to tokens up to itself; to itself even where it is padding, since a row of
        nothing but -inf has no softmax."""
        columns = torch.arange(stop, device=self._valid.device)
        queries = columns[start:stop, None]  # [n, 1]
        past = (columns <= queries) & self._valid[:, None, :stop]  # [b, n, stop]
        return (past | (columns == queries)).unsqueeze(1)

    def _attend(self, attention: Attention, index: int, hidden: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        """``Attention.forward`` over the cached and the new tokens: hidden [b, n, h] -> [b, n, h]."""
        batch, count, _ = hidden.shape
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        mixed = attention.query_key_value(hidden).view(batch, count, -1, attention.head_size)  # [b, n, q + 2 kv, d]
        query, key, value = split_heads(mixed, (heads, kv_heads), table if attention.rotary else None)
        stop = self.length + count
        keys, values = self._cache[0, index], self._cache[1, index]  # [b, kv, capacity, d]
        keys[:, :, self.length : stop] = key.transpose(1, 2)
        values[:, :, self.length : stop] = value.transpose(1, 2)
        keys, values = keys[:, :, :stop], values[:, :, :stop]
        if heads != kv_heads:  # the fused kernels that take a mask do not take grouped heads
            keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
        with kernels_for_any_shape():
            context = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
        attended: Tensor = attention.dense(context.transpose(1, 2).flatten(2))
        return attended
