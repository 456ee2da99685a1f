"""Adding gradients to their sums, and scaling them: PyTorch's own to the bit, on a CPU and by the kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron.model.kernels import add_to, scaled


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (7, 1001), (1280, 3840), (2**21 + 1,)])
def test_sums_are_pytorchs(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The sum lies within a larger buffer, at an odd place: what is around it stays."""
    x = torch.randn(shape, device=device).to(dtype)
    buffer = torch.randn(x.numel() + 20, device=device)
    expected = buffer.clone()
    expected[3:-17] += x.flatten()
    add_to(buffer[3:-17].view(shape), x)
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_others_go_to_pytorch(device: str) -> None:
    """What does not lie in one piece, and double precision."""
    total, x = torch.randn(6, 8, device=device), torch.randn(8, 6, device=device)
    expected = total + x.t()
    add_to(total, x.t())
    assert torch.equal(total, expected)
    wide = torch.randn(5, device=device, dtype=torch.float64)
    expected = wide + wide.float()
    add_to(wide, wide.float())
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1001), (1280, 1700), (2**21 + 1,)])
def test_products_are_pytorchs(device: str, dtype: torch.dtype, wide: torch.dtype, shape: tuple[int, ...]) -> None:
    """Infinities and zeros among them; multiplied in fp32, rounded once."""
    x = torch.randn(shape, device=device).to(wide)
    x.view(-1)[:2] = torch.tensor([torch.inf, 0.0])
    scale = torch.tensor([1.7e-5], device=device)
    found = scaled(x, scale, dtype)
    assert found.dtype == dtype and found.shape == x.shape
    assert torch.equal(found, (x.float() * scale).to(dtype))


def test_double_precision_stays() -> None:
    x, scale = torch.randn(5, dtype=torch.float64), torch.tensor([1.7e-5], dtype=torch.float64)
    assert torch.equal(scaled(x, scale, torch.float64), x * scale)
