"""Feed-forward layer, with SwiGLU or GELU between its two products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.distributed.tensor_parallel import ALONE, ColumnParallelLinear, RowParallelLinear, TensorParallel
from megatron.model.kernels import in_compiled_code
from megatron.model.swiglu import swiglu


class MLP(nn.Module):
    """h -> ffn -> h. With ``--swiglu`` the rows of ``dense_h_to_4h.weight`` are [gate; up], one matrix product for
    both. Tensor parallelism gives every rank the same share of both halves.

    GELU is the tanh approximation (Hendrycks & Gimpel, arXiv 1606.08415, section 2): what GPT-2 was trained with and
    what Megatron's fused bias-GELU, its default, computes.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.swiglu = config.swiglu
        self.gated_products = False
        bias = not config.disable_bias_linear
        inner = config.ffn_size * (2 if self.swiglu else 1)
        self.dense_h_to_4h = ColumnParallelLinear(config.hidden_size, inner, bias, tensor)
        self.dense_4h_to_h = RowParallelLinear(config.ffn_size, config.hidden_size, bias, tensor)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [b, s, h] -> [b, s, h]; with sequence parallelism [own tokens, h], both."""
        out: Tensor = self.dense_4h_to_h(self.inner(hidden))
        return out

    def multiplies_gated(self, x: Tensor) -> bool:
        """Whether products with SwiGLU inside compute the whole layer now, forward and backward."""
        plain = self.dense_4h_to_h.is_one_product  # then dense_h_to_4h is: they are cut, biased and rounded alike
        return self.gated_products and self.training and plain and in_compiled_code(x)

    def inner(self, hidden: Tensor) -> Tensor:
        """All but the last product: hidden as :meth:`forward` takes it -> [b, s, ffn / ranks]."""
        inner = self.dense_h_to_4h(hidden)
        return swiglu(inner) if self.swiglu else F.gelu(inner, approximate="tanh")
