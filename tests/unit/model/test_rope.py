"""Rotary positions against rotations written as complex numbers; on a GPU, the kernel of their gradient in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.model.rope import Heads, rotary_table, rotate, split_heads


def test_rotation_is_a_complex_product() -> None:
    """Feature i and feature i + d/2 are real and imaginary part; position p turns them by p * theta^(-2i/d)."""
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.randint(0, 100, (2, 5))
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(2, 5, 4, dtype=torch.float64), positions.unsqueeze(-1) * frequencies)
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn.unsqueeze(2)
    result = rotate(x, rotary_table(positions, 8, 10000.0))
    torch.testing.assert_close(result, torch.cat((expected.real, expected.imag), dim=-1), rtol=0, atol=5e-5)


def test_only_distances_matter() -> None:
    query, key = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(at: int, to: int) -> torch.Tensor:
        turned = [rotate(x, rotary_table(torch.tensor([[p]]), 64, 10000.0)) for x, p in ((query, at), (key, to))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(1907, 1903), rtol=0, atol=5e-3)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-2


def test_angles_are_fp32_and_the_result_keeps_its_dtype() -> None:
    table = rotary_table(torch.tensor([[2047]]), 64, 10000.0)
    assert table.dtype == torch.float32
    expected = torch.tensor(2047.0, dtype=torch.float64).cos()
    torch.testing.assert_close(table[0, 0, 0].double(), expected, rtol=0, atol=1e-6)
    assert rotate(torch.randn(1, 1, 2, 64, dtype=torch.bfloat16), table).dtype == torch.bfloat16


def test_heads_are_told_apart() -> None:
    """Three query heads and two of keys and values: queries and keys are turned, values are not."""
    heads = torch.randn(2, 5, 7, 8)
    table = rotary_table(torch.arange(5).repeat(2, 1), 8, 10000.0)
    plain = split_heads(heads, (3, 2), None)
    assert all(torch.equal(x, y) for x, y in zip(plain, (heads[:, :, :3], heads[:, :, 3:5], heads[:, :, 5:])))
    query, key, value = split_heads(heads, (3, 2), table)
    assert torch.equal(query, rotate(plain[0], table)) and torch.equal(key, rotate(plain[1], table))
    assert torch.equal(value, plain[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [(3, 3), (10, 10), (4, 1)])
@pytest.mark.parametrize("size", [128, 12])
def test_compiled_gradient(dtype: torch.dtype, counts: tuple[int, int], size: int) -> None:
    """One rounding of what fp64 says; gradients come as attention lays them out, heads before positions."""
    torch.compiler.reset()
    query, key = counts
    heads = torch.randn(2, 50, query + 2 * key, size, device="cuda").to(dtype).requires_grad_()
    table = rotary_table(torch.randint(2048, (2, 50), device="cuda"), size, 10000.0)
    grads = [torch.randn(2, n, 50, size, device="cuda").to(dtype).transpose(1, 2) for n in (query, key, key)]

    def gradient(heads: Tensor, function: Callable[..., Heads], table: Tensor) -> tuple[Tensor, ...]:
        results = function(heads, counts, table)
        wide = [grad.to(heads.dtype) for grad in grads]
        return *(x.detach() for x in results), *torch.autograd.grad(results, heads, wide)

    exact = gradient(heads.detach().double().requires_grad_(), split_heads, table.double())
    found = gradient(heads, torch.compile(split_heads, fullgraph=True), table)
    for one, other in zip(found, exact, strict=True):
        assert ((one.double() - other).abs() <= torch.finfo(dtype).eps / 2 * other.abs() + 1e-5).all()
    direct = torch.ops.megatron.split_heads_gradient(*grads, table)
    assert torch.equal(found[-1], direct), "compiled code uses the kernel"
