"""FlexAttention's kernels: as exact as SDPA with a dense mask, compiled once for all masks, never waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megatron.config import ModelConfig
from megatron.model.attention import Attention
from megatron.model.masks import block_mask, dense_mask
from megatron.model.sharding import SequentialGPT, compile_blocks, describe_masks

pytestmark = pytest.mark.gpu
Make = Callable[..., SequentialGPT]
CUDA = torch.device("cuda")
KINDS = pytest.mark.parametrize("kind", ["documents", "bool"])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
WIDE = {
    "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 192, "init_method_std": 0.05,
    "max_position_embeddings": 512,
}  # fmt: skip


def random_mask(kind: str, causal: bool, length: int, seed: int, rows: int = 2) -> Tensor:
    """Documents of mean length 50 [b, s], or half of all pairs [b, 1, s, s]."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "documents":
        mask = (torch.rand(rows, length, generator=generator) < 0.02).cumsum(dim=1, dtype=torch.int32)
    else:
        mask = torch.rand(rows, 1, length, length, generator=generator) < 0.5
        mask |= torch.eye(length, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    return mask.to(CUDA)


def a_batch() -> tuple[Tensor, ...]:
    """Inputs, positions, targets, weights of two rows of 512 positions."""
    tokens = torch.randint(0, 37, (2, 512), generator=torch.Generator().manual_seed(0))
    batch = (tokens, torch.arange(512).repeat(2, 1), tokens.flip(1), torch.full((2, 512), 1 / 1024))
    return tuple(tensor.to(CUDA) for tensor in batch)


@KINDS
@CAUSAL
@pytest.mark.parametrize(("heads", "kv_heads", "size", "length"), [
    (4, 4, 64, 512), (4, 2, 128, 512), (6, 2, 64, 300), (3, 3, 80, 256), (2, 1, 256, 200),
])  # fmt: skip
def test_as_exact_as_sdpa(
    make_config: Callable[..., ModelConfig], kind: str, causal: bool, heads: int, kv_heads: int, size: int, length: int
) -> None:
    """bf16: output and gradients of q, k, v are as far from fp64 through FlexAttention as through SDPA."""
    torch.compiler.reset()
    layer = Attention(
        make_config(num_attention_heads=heads, num_key_value_heads=kv_heads, kv_channels=size), causal=causal
    )
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, length, count, size, generator=generator).to(CUDA, torch.bfloat16)
               for count in (heads, kv_heads, kv_heads, heads)]  # fmt: skip
    mask = random_mask(kind, causal, length, seed=1)
    dense = dense_mask(mask, causal)
    forms = [(dense, torch.float64), (dense, torch.bfloat16), (block_mask(mask, causal), torch.bfloat16)]
    results = []
    for form, dtype in forms:
        *inputs, gradient = [x.detach().to(dtype).requires_grad_() for x in tensors]
        attend = torch.compile(layer._attend, dynamic=False) if isinstance(form, BlockMask) else layer._attend
        output = attend(*inputs, form)
        results.append([output, *torch.autograd.grad(output, inputs, gradient.flatten(2))])
    for name, exact, sdpa, flex in zip("oqkv", *results):
        assert flex.shape == exact.shape and flex.dtype == torch.bfloat16
        wrong, usual = (flex.double() - exact).norm(), (sdpa.double() - exact).norm()
        assert wrong < 2 * usual + 1e-3 * exact.norm(), (name, wrong / exact.norm(), usual / exact.norm())


@KINDS
@pytest.mark.parametrize(("changes", "one_by_one"), [
    ({}, False),
    ({}, True),
    ({"recompute_granularity": "selective"}, False),
    ({"recompute_granularity": "selective"}, True),
    ({"checkpoint_activations": True}, False),
    ({"hidden_dropout": 0.1}, False),
], ids=["one graph", "one by one", "selective", "selective one by one", "full", "hidden dropout"])  # fmt: skip
def test_new_masks_compile_nothing(make_model: Make, kind: str, changes: dict[str, Any], one_by_one: bool) -> None:
    """Training steps with other masks reuse the code of the first and never make the CPU wait; bf16 as dense masks."""
    torch.compiler.reset()
    causal = kind == "bool"
    sizes = WIDE | {"num_key_value_heads": 2} | changes
    exact, plain, model = (make_model(causal, dtype, **sizes).to(CUDA)
                           for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))  # fmt: skip
    compile_blocks(model, one_by_one=one_by_one)
    assert describe_masks(model, CUDA, 512, training=True) == "FlexAttention"
    batch = a_batch()
    for step in range(4):
        mask = random_mask(kind, causal, 512, seed=step)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                loss = model(*batch, mask)
                gradients = torch.autograd.grad(loss, list(model.parameters()))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if "hidden_dropout" in changes:
            continue
        errors = [torch.cat([g.double().flatten() for g in gradients])]
        for other in (plain, exact):
            wanted = torch.autograd.grad(other(*batch, mask), list(other.parameters()))
            errors.append(torch.cat([g.double().flatten() for g in wanted]))
        flex, sdpa, true = errors
        assert (flex - true).norm() < 2 * (sdpa - true).norm() + 1e-3 * true.norm()
        assert (flex - true).norm() < 3e-2 * true.norm()
    assert isinstance(model.layers[1].self_attention.prepare_mask(mask, torch.bfloat16), BlockMask)


def test_attention_dropout_trains_dense_and_validates_flex(make_model: Make) -> None:
    torch.compiler.reset()
    model, plain = (make_model(False, torch.bfloat16, attention_dropout=0.2, **WIDE).to(CUDA) for _ in range(2))
    compile_blocks(model)
    batch = a_batch()
    mask, attention = random_mask("documents", False, 512, seed=0), model.layers[1].self_attention
    first, second = model(*batch, mask), model(*batch, mask)
    assert isinstance(attention.prepare_mask(mask, torch.bfloat16), Tensor)
    assert first.isfinite() and first != second  # probabilities are dropped
    model.eval()
    plain.eval()
    assert isinstance(attention.prepare_mask(mask, torch.bfloat16), BlockMask)
    rows, expected = (one(*batch, mask, reduction="rows") for one in (model, plain))
    torch.testing.assert_close(rows, expected, rtol=1e-2, atol=0)


@KINDS
@CAUSAL
def test_compiled_block_masks_are_the_uncompiled(kind: str, causal: bool) -> None:
    torch.compiler.reset()
    make = torch.compile(create_block_mask, dynamic=False)
    for seed in range(3):
        mask = random_mask(kind, causal, 500, seed)
        made, expected = block_mask(mask, causal, make), block_mask(mask, causal)
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(made, name), getattr(expected, name)), name
        assert torch.equal(made.to_dense(), expected.to_dense())
