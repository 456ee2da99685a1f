"""Blocks as they are compiled for a GPU, on a CPU: plain operators take the place of the kernels.

What is seen here is everything but the kernels themselves: which memory is written, and what the backward pass reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import _scoped_library

from megatron.model import kernels, norm, residual, rope, swiglu
from megatron.model.rope import rotate
from megatron.model.sharding import SequentialGPT, compile_blocks, use_flash_attention

Make = Callable[..., SequentialGPT]
SCHEMAS = {
    "rotate_heads_": "(Tensor(a!) heads, SymInt count, Tensor table, bool back) -> ()",
    "split_heads_gradient": "(Tensor query, Tensor key, Tensor value, Tensor table) -> Tensor",
    "row_norm": "(Tensor hidden, Tensor gain, float eps) -> (Tensor, Tensor)",
    "branch_gradient":
        "(Tensor normal, Tensor gain, Tensor scale, Tensor grad_kept, Tensor grad_normal) -> (Tensor, Tensor)",
    "swiglu_gradient": "(Tensor inner, Tensor grad) -> Tensor",
}


def opposite(table: Tensor) -> Tensor:
    """The table of minus its angles."""
    cos, sin = table.chunk(2, dim=-1)
    return torch.cat((cos, -sin), dim=-1)


def rotate_heads(heads: Tensor, count: int, table: Tensor, back: bool) -> None:
    """Turn the first heads in their place."""
    heads[:, :, :count] = rotate(heads[:, :, :count], opposite(table) if back else table)


def split_heads_gradient(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """Turned back by the opposite angles, side by side."""
    back = opposite(table)
    return torch.cat((rotate(query, back), rotate(key, back), value), dim=2)


def row_norm(hidden: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """PyTorch's, and the factor of each row."""
    scale = (hidden.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return torch.nn.functional.rms_norm(hidden, gain.shape, gain, eps), scale


def branch_gradient(
    normal: Tensor, gain: Tensor, scale: Tensor, grad_kept: Tensor, grad_normal: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula of RMSNorm's gradient, from the hidden state that normal is made of."""
    hidden = (normal / gain / scale).requires_grad_()  # the models here have next to no epsilon
    with torch.enable_grad():
        weight = gain.detach().requires_grad_()
        again = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt() * weight
        grad, grad_gain = torch.autograd.grad(again, (hidden, weight), grad_normal)
    return grad_kept + grad, grad_gain.unsqueeze(0)


def swiglu_gradient(inner: Tensor, grad: Tensor) -> Tensor:
    """PyTorch's."""
    with torch.enable_grad():
        inner = inner.detach().requires_grad_()
        gate, up = inner.chunk(2, dim=-1)
        return torch.autograd.grad(torch.nn.functional.silu(gate) * up, inner, grad)[0]


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "rotate_heads_": rotate_heads, "split_heads_gradient": split_heads_gradient,
    "row_norm": row_norm, "branch_gradient": branch_gradient, "swiglu_gradient": swiglu_gradient,
}  # fmt: skip
FAKES: dict[str, Callable[..., Any]] = {
    "rotate_heads_": lambda heads, count, table, back: None,
    "split_heads_gradient": lambda query, key, value, table: query.new_empty(
        *query.shape[:2], query.shape[2] + 2 * key.shape[2], query.shape[3]
    ),
    "row_norm": lambda hidden, *_: (
        torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32)
    ),
    "branch_gradient": lambda normal, gain, *_: (torch.empty_like(normal), gain.new_empty(1, *gain.shape)),
    "swiglu_gradient": lambda inner, grad: torch.empty_like(inner),
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The operators that compiled code has called; without Triton they do not exist but here."""
    names: set[str] = set()

    def recorded(name: str, *arguments: Any) -> Any:
        names.add(name)
        return IMPLEMENTATIONS[name](*arguments)

    with _scoped_library("megatron", "FRAGMENT") as library:
        for name, schema in SCHEMAS.items():
            library.define(name + schema)
            library.impl(name, functools.partial(recorded, name), "CPU")
            torch.library.register_fake(f"megatron::{name}", FAKES[name], lib=library)
        for module in (norm, residual, rope, swiglu):
            monkeypatch.setattr(module, "in_compiled_code", lambda x: torch.compiler.is_compiling())
        yield names
    torch.compiler.reset()  # nothing compiled here outlives the operators


@pytest.mark.skipif(kernels.TRITON, reason="the operators are the kernels here")
@pytest.mark.parametrize("scored", [None, 24])
@pytest.mark.parametrize("flash", [False, True], ids=["SDPA", "FlashAttention"])
@pytest.mark.parametrize(("changes", "one_by_one"), [
    ({}, False), ({}, True), ({"checkpoint_activations": True}, False), ({"num_key_value_heads": 2}, False),
    ({"recompute_granularity": "selective"}, False), ({"hidden_dropout": 1e-9}, True),
], ids=["one graph", "block by block", "recomputed", "grouped heads", "selective", "dropout"])
def test_loss_and_gradients_are_those_of_plain_blocks(
    make_model: Make, batch: dict[str, Tensor], called: set[str], flash_on_cpu: set[str], changes: dict[str, Any],
    one_by_one: bool, flash: bool, scored: int | None,
) -> None:  # fmt: skip
    torch.compiler.reset()
    if scored is not None:
        batch["weights"].view(-1)[scored:] = 0
    rows = None if scored is None else torch.arange(scored)
    results = []
    for compiled in (False, True):
        model = make_model(scored is None, num_layers=3, layernorm_epsilon=1e-12, **changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)))
        if compiled:
            if flash:
                use_flash_attention(model)
            compile_blocks(model, one_by_one=one_by_one)
        for _ in range(2):  # the second time from the same memory
            loss = model(**batch, scored=rows)
            found = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach(), *found])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-4, atol=2e-6)
    # FlashAttention's gradients are side by side already.
    assert called == set(SCHEMAS) - ({"split_heads_gradient"} if flash else set())
    assert flash_on_cpu == ({"flash_attention", "flash_attention_gradient"} if flash else set())
