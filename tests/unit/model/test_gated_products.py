"""SwiGLU inside of products: values and gradients of the MLP written out; on a GPU the package itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron.model import mlp, residual
from megatron.model.gated_products import VERSION, apart, gated_mlp, gated_obstacle, interleaved
from megatron.model.packages import INSTALL
from megatron.model.sharding import SequentialGPT, use_gated_products
from tests.unit.model.conftest import operators_on_cpu

Make = Callable[..., SequentialGPT]


def written_out(x: Tensor, up_weight: Tensor, down_weight: Tensor, stream: Tensor | None) -> Tensor:
    gate, up = (x @ up_weight.t()).chunk(2, dim=-1)
    out = (F.silu(gate) * up) @ down_weight.t()
    return out if stream is None else stream + out


def plain_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What ``megatron::gated_product`` says it returns."""
    gate, up = (x @ weight.t()).chunk(2, dim=-1)
    return torch.stack((gate, up), dim=-1).flatten(-2), F.silu(gate) * up


def plain_gradient(grad: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """And ``megatron::gated_product_gradient``; by PyTorch's autograd."""
    with torch.enable_grad():
        inner = inner.detach().requires_grad_()
        gate, up = inner.unflatten(-1, (-1, 2)).unbind(-1)
        product = F.silu(gate) * up
        return torch.autograd.grad(product, inner, grad @ weight)[0], product.detach()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The operators on a CPU, in plain PyTorch, as if code were compiled for a GPU; the calls of them."""
    called: list[str] = []
    for module in (mlp, residual):
        monkeypatch.setattr(module, "in_compiled_code", lambda x: True)
    with operators_on_cpu(called.append, gated_product=plain_product, gated_product_gradient=plain_gradient):
        yield called


def inputs(dtype: torch.dtype, device: str = "cpu", shape: tuple[int, ...] = (2, 15, 24), ffn: int = 40) -> Any:
    """x, both weights, the residual stream."""
    width = shape[-1]
    shapes = (shape, (2 * ffn, width), (width, ffn), shape)
    return [(torch.randn(one, device=device, dtype=torch.float64) / scale).to(dtype).requires_grad_()
            for one, scale in zip(shapes, (1, width**0.5, ffn**0.5, 1))]  # fmt: skip


def test_rows_are_neighbours_and_apart_again() -> None:
    weight = torch.arange(12).view(6, 2)
    assert interleaved(weight)[:, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert torch.equal(apart(interleaved(weight)), weight)


@pytest.mark.parametrize("adds", [True, False])
def test_values_and_gradients(on_cpu: list[str], adds: bool) -> None:
    *rest, stream = inputs(torch.float64)
    arguments = [*rest, stream if adds else None]
    leaves = [one for one in arguments if one is not None]
    found, expected = gated_mlp(*arguments), written_out(*arguments)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for one, other in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(one, other)
    assert on_cpu == ["gated_product", "gated_product_gradient"]


@pytest.mark.parametrize(("changes", "calls"), [
    ({}, 2), ({"checkpoint_activations": True}, 4), ({"hidden_dropout": 1e-9}, 2), ({"disable_bias_linear": False}, 0),
    ({"swiglu": False}, 0),
], ids=["plain", "recomputed", "dropout", "bias", "GELU"])  # fmt: skip
def test_a_model_trains_as_without(
    make_model: Make, batch: dict[str, Tensor], on_cpu: list[str], changes: dict[str, Any], calls: int
) -> None:
    """And is measured without; only positions that are scored go through the last MLP."""
    batch["weights"].view(-1)[20:] = 0
    batch["scored"] = torch.arange(20)
    results = []
    for gated in (False, True):
        model = make_model(False, torch.float64, **changes)
        if gated:
            use_gated_products(model)
        assert not on_cpu
        loss = model(**batch)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert (on_cpu.count("gated_product"), on_cpu.count("gated_product_gradient")) == (calls, min(calls, 2))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one)
    on_cpu.clear()
    with torch.no_grad():
        model.eval()(**batch)
    assert not on_cpu


def test_the_compiler_knows_what_they_cost() -> None:
    x, weight = torch.empty(30, 24, device="meta"), torch.empty(80, 24, device="meta")
    with FlopCounterMode(display=False) as counted:
        inner, _ = torch.ops.megatron.gated_product(x, weight)
        torch.ops.megatron.gated_product_gradient(x, torch.empty(24, 40, device="meta"), inner)
    assert counted.get_total_flops() == 2 * 30 * 24 * (80 + 40)


SIZES: dict[str, Any] = {"half_precision": True, "hidden_size": 1024, "ffn_size": 2816}


@pytest.mark.parametrize(("changes", "version", "reason"), [
    ({}, VERSION, None),
    ({"half_precision": False}, VERSION, "it needs --bf16 or --fp16"),
    ({"hidden_size": 760}, VERSION, "it pays from --hidden-size 768 on"),
    ({"hidden_size": 768}, VERSION, None),
    ({"ffn_size": 1364}, VERSION, "it takes sizes that are multiples of 8, and these are 1024 and 1364"),
    ({"device": torch.device("cpu")}, VERSION, "it needs a GPU"),
    ({}, "0.6.4", f"quack-kernels 0.6.4 is installed, and 0.6.5 is needed: {INSTALL}"),
])  # fmt: skip
def test_where_it_serves(
    hopper: Callable[..., None], changes: dict[str, Any], version: str, reason: str | None
) -> None:
    hopper("quack-kernels", version)
    assert gated_obstacle(**({"device": torch.device("cuda")} | SIZES | changes)) == reason


def test_the_package_is_the_one_that_is_pinned(repository: Any) -> None:
    assert f'"quack-kernels=={VERSION}"' in (repository / "pyproject.toml").read_text()
    assert f"quack-kernels=={VERSION}\n" in (repository / "constraints.txt").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4096, 1000])
@pytest.mark.parametrize(("width", "ffn"), [(1280, 3392), (256, 704)])
def test_the_package_equals_the_mlp_written_out(rows: int, width: int, ffn: int) -> None:
    """As near to fp64 as PyTorch in bf16 is."""
    pytest.importorskip("quack")
    torch.manual_seed(0)
    arguments = inputs(torch.bfloat16, "cuda", (rows, width), ffn)
    wide = [one.detach().double().requires_grad_() for one in arguments]
    grad = torch.randn(rows, width, device="cuda").bfloat16()
    results = []
    for function, given in ((gated_mlp, arguments), (written_out, arguments), (written_out, wide)):
        out = function(*given)
        results.append([out, *torch.autograd.grad(out, given, grad.to(out.dtype))])
    for found, plain, exact in zip(*results, strict=True):
        assert (found - exact).norm() <= 1.1 * (plain - exact).norm() < 2e-2 * exact.norm()
