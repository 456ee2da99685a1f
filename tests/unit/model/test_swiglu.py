"""SwiGLU's own gradient: plain PyTorch's to the bit; compiled for a GPU, exact to its rounding; no break in a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model.swiglu import swiglu

HALF = [torch.bfloat16, torch.float16]
GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]


def plain(inner: Tensor) -> Tensor:
    """The formula, differentiated by PyTorch."""
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def result(function: Callable[[Tensor], Tensor], inner: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and gradient of ``inner``."""
    inner = inner.detach().clone().requires_grad_()
    out = function(inner)
    return out.detach(), torch.autograd.grad(out, inner, grad)[0]


def factors(dtype: torch.dtype, device: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Input [..., 2 ffn] and gradient of the result [..., ffn]; gates far enough from 0 to saturate."""
    generator = torch.Generator().manual_seed(0)
    inner = 4 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    return inner.to(device, dtype), torch.randn(shape, generator=generator).to(device, dtype)


def kernel(inner: Tensor, grad: Tensor) -> Tensor:
    """The gradient as compiled code on a GPU computes it."""
    out: Tensor = torch.ops.megatron.swiglu_gradient(inner, grad)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_equals_plain_pytorch_to_the_bit(dtype: torch.dtype) -> None:
    inner, grad = factors(dtype, "cpu", 3, 5, 24)
    for found, expected in zip(result(swiglu, inner, grad), result(plain, inner, grad), strict=True):
        assert found.dtype == dtype and torch.equal(found, expected)


def test_only_the_input_is_kept() -> None:
    inner = torch.randn(4, 6, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(inner)
    assert len(kept) == 1 and kept[0].data_ptr() == inner.data_ptr()


@pytest.mark.parametrize("device", ["cpu", *GPU])
def test_compiles_without_a_break(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    inner, grad = factors(torch.bfloat16, device, 8, 48)
    found, expected = result(compiled, inner, grad), result(plain, inner, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    if device == "cuda":
        assert torch.equal(found[1], kernel(inner, grad))
        assert not torch.equal(found[1], expected[1]), "which rounds in between"


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(3, 5, 3392), (7, 341), (2, 9, 17), (4, 4096), (3, 13653), (70000, 8)])
def test_the_kernel_rounds_once(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Against fp64: off by half a unit in the last place, which is eps / 2 of a number, and fp32's own noise."""
    inner, grad = factors(dtype, device, *shape)
    exact = result(plain, inner.double(), grad.double())[1]
    error = (kernel(inner, grad).double() - exact).abs()
    limit = torch.finfo(dtype)
    # fp32 arithmetic before the rounding: a few of its units, of the largest term of 1 + gate (1 - sigmoid).
    bound = limit.eps / 2 * exact.abs() + 1e-5 * exact.abs() + limit.smallest_normal * limit.eps + 1e-6
    assert (error <= bound).all(), float((error / bound).max())


@pytest.mark.parametrize("device", GPU)
def test_any_layout_of_the_gradient(device: str) -> None:
    inner, grad = factors(torch.float32, device, 6, 10)
    turned = grad.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(kernel(inner, turned), kernel(inner, grad))
