"""FlashAttention: where it serves, what a model makes of it, and on a GPU the package itself against fp64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron.model import flash_attention as module
from megatron.model.flash_attention import VERSION, flash_attention, flash_obstacle
from megatron.model.packages import INSTALL
from megatron.model.rope import rotary_table, turn_heads
from megatron.model.sharding import SequentialGPT, compile_blocks, use_flash_attention
from tests.unit.model.conftest import plain_attention

INSTALLED: dict[str, Any] = {"package": "flash-attn-4", "version": VERSION}
Make = Callable[..., SequentialGPT]
BOTH = {"flash_attention", "flash_attention_gradient"}
USABLE: dict[str, Any] = {
    "device": torch.device("cuda"), "half_precision": True, "head_size": 128, "length": 2048, "dropout": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), [
    ({}, None),
    ({"head_size": 32}, None),
    ({"device": torch.device("cpu")}, "it needs a GPU"),
    ({"half_precision": False}, "it needs --bf16 or --fp16"),
    ({"dropout": 0.1}, "it has no dropout, and there is --attention-dropout 0.1"),
    ({"head_size": 16}, "it takes heads of 32 to 128 features in steps of 32, and these have 16"),
    ({"length": 64}, None),
    ({"length": 63}, "it is used from 64 positions on"),
    ({"head_size": 160}, "these have 160"),
    ({"head_size": 80}, "these have 80"),
])  # fmt: skip
def test_where_it_serves(hopper: Callable[..., None], changes: dict[str, Any], reason: str | None) -> None:
    hopper(**INSTALLED)
    obstacle = flash_obstacle(**(USABLE | changes))
    assert obstacle is None if reason is None else obstacle is not None and reason in obstacle


@pytest.mark.parametrize(("pretended", "reason"), [
    ({"capability": (8, 0)}, "compute capability 9.0 (Hopper), and NVIDIA Something has 8.0"),
    ({"capability": (10, 0)}, "NVIDIA Something has 10.0"),
    ({"version": None}, f"flash-attn-4 is not installed: {INSTALL}"),
    ({"version": "4.0.0b1"}, f"flash-attn-4 4.0.0b1 is installed, and {VERSION} is needed: {INSTALL}"),
])  # fmt: skip
def test_what_it_needs(hopper: Callable[..., None], pretended: dict[str, Any], reason: str) -> None:
    hopper(**(INSTALLED | pretended))
    assert reason in str(flash_obstacle(**USABLE))


@pytest.mark.parametrize(("error", "text"), [
    (ImportError("libcuda.so.1: cannot open\nand more"), "ImportError libcuda.so.1: cannot open and more"),
    (AttributeError("module 'cutlass' has no attribute 'x'"), "AttributeError module 'cutlass' has no attribute 'x'"),
    (ImportError(), "ImportError"),
])  # fmt: skip
def test_a_broken_package_is_an_obstacle(
    hopper: Callable[..., None], monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    hopper(**INSTALLED)

    def broken(name: str) -> None:
        assert name == "flash_attn.cute.interface"
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    assert flash_obstacle(**USABLE) == f"flash-attn-4 cannot be imported ({text}): {INSTALL}"


def test_the_package_is_the_one_that_is_pinned(repository: Any) -> None:
    assert f'"flash-attn-4[cu13]=={VERSION}"' in (repository / "pyproject.toml").read_text()
    assert f"flash-attn-4=={VERSION}\n" in (repository / "constraints.txt").read_text()


@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 2}, {"checkpoint_activations": True}, {"recompute_granularity": "selective"},
    {"use_rotary_position_embeddings": False},
], ids=["plain", "grouped heads", "recomputed", "selective", "no rotation"])  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
def test_a_model_trains_as_with_sdpa(
    make_model: Make, batch: dict[str, Tensor], flash_on_cpu: set[str], changes: dict[str, Any], causal: bool
) -> None:
    results = []
    for flash in (False, True):
        model = make_model(causal, torch.float64, **changes)
        if flash:
            use_flash_attention(model)
        assert not flash_on_cpu
        loss = model(**batch)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert flash_on_cpu == BOTH
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one)


def test_masks_and_measurements_go_past_it(
    make_model: Make, batch: dict[str, Tensor], flash_on_cpu: set[str]
) -> None:
    """A mask is for SDPA, and so is what nobody takes the gradient of."""
    model = make_model(False)
    use_flash_attention(model)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch, attention_mask=torch.ones(3, 1, 16, 16, dtype=torch.bool).tril()).backward()
    assert not flash_on_cpu


def test_the_compiler_knows_what_it_costs() -> None:
    """Two products of s x s x d for each query head, as of SDPA; the meta device calls no kernel."""
    heads = torch.empty(2, 64, 8, 16, device="meta")
    with FlopCounterMode(display=False) as counted:
        torch.ops.megatron.flash_attention(heads, 4, 2, True)
    assert counted.get_total_flops() == 2 * 2 * (2 * 4 * 64 * 64 * 16)


@pytest.fixture
def package() -> None:
    """Skip where FlashAttention cannot serve."""
    obstacle = flash_obstacle(**USABLE)
    if obstacle is not None:
        pytest.skip(obstacle)


@pytest.mark.gpu
@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "counts", "length", "size"), [
    (torch.bfloat16, (3, 3), 256, 128), (torch.float16, (10, 2), 100, 64), (torch.bfloat16, (4, 1), 333, 32),
    (torch.bfloat16, (3, 3), 64, 96), (torch.bfloat16, (1, 1), 64, 32), (torch.bfloat16, (6, 2), 200, 128),
])  # each is compiled anew, for some seconds
def test_the_package_equals_attention_written_out(
    dtype: torch.dtype, causal: bool, counts: tuple[int, int], length: int, size: int
) -> None:
    """Within half precision of fp64, as SDPA is; gradients of queries, keys and values in their places."""
    torch.manual_seed(0)
    heads = torch.randn(2, length, counts[0] + 2 * counts[1], size, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(2, length, counts[0], size, device="cuda").to(dtype)
    exact_heads = heads.detach().double().requires_grad_()
    exact = plain_attention(exact_heads, *counts, causal)[0]
    exact.backward(grad.double())
    found = flash_attention(heads, counts, causal)
    found.backward(grad)
    assert heads.grad is not None and exact_heads.grad is not None and heads.grad.is_contiguous()
    for part, exact_part in zip(
        (found, *heads.grad.split((counts[0], counts[1], counts[1]), dim=2)),
        (exact, *exact_heads.grad.split((counts[0], counts[1], counts[1]), dim=2)),
    ):
        assert (part.double() - exact_part).norm() < 2 * torch.finfo(dtype).eps * exact_part.norm()


@pytest.mark.gpu
@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("count", [3, 4])
def test_compiled_heads_turn_and_turn_back(count: int) -> None:
    """One rounding of fp64, both ways; what is not turned stays to the bit."""
    torch.compiler.reset()
    heads = torch.randn(2, 50, 5, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(heads)
    table = rotary_table(torch.randint(2048, (2, 50), device="cuda"), 64, 10000.0)
    found = torch.compile(turn_heads, fullgraph=True)(heads, count, table)
    (found_grad,) = torch.autograd.grad(found, heads, grad)
    exact_heads = heads.detach().double().requires_grad_()
    exact = turn_heads(exact_heads, count, table.double())
    (exact_grad,) = torch.autograd.grad(exact, exact_heads, grad.double())
    for one, other in ((found, exact), (found_grad, exact_grad)):
        assert ((one.double() - other).abs() <= torch.finfo(torch.bfloat16).eps / 2 * other.abs() + 1e-5).all()
    assert torch.equal(found[:, :, count:], heads[:, :, count:])
    assert torch.equal(found_grad[:, :, count:], grad[:, :, count:])


@pytest.mark.gpu
@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 2}, {"checkpoint_activations": True}, {"recompute_granularity": "selective"},
])  # fmt: skip
def test_compiled_model_is_within_bf16_noise(
    make_model: Make, batch: dict[str, Tensor], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far from fp32 as the compiled model with SDPA, loss and gradients, and without waiting for the GPU."""
    torch.compiler.reset()
    batch = {name: value.repeat(1, 4).cuda() for name, value in batch.items()}  # rows of 64 positions
    batch["positions"] = torch.arange(64, device="cuda").repeat(3, 1)
    batch["weights"].view(-1)[96:] = 0
    batch["scored"] = torch.arange(96, device="cuda")
    wide = {
        "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 192, "init_method_std": 0.05,
        "max_position_embeddings": 64,
    }  # fmt: skip
    calls: list[int] = []
    library = module._library()

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return library._flash_attn_bwd(*arguments, **options)

    # Beside the package, whose functions find what they have compiled by their own names.
    counting = SimpleNamespace(_flash_attn_fwd=library._flash_attn_fwd, _flash_attn_bwd=counted)
    monkeypatch.setattr(module, "_library", lambda: counting)
    results = []
    for dtype, flash in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = make_model(False, dtype, **wide, **changes).cuda()
        if flash:
            use_flash_attention(model)
        compile_blocks(model)
        for step in range(2):
            torch.cuda.set_sync_debug_mode("error" if flash and step else "default")
            try:
                loss = model(**batch)
                gradients = torch.autograd.grad(loss, list(model.parameters()))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert bool(calls) == flash
        results.append([loss.reshape(1).double(), torch.cat([g.double().flatten() for g in gradients])])
    for exact, sdpa, flash in zip(*results):
        assert (flash - exact).norm() < 2 * (sdpa - exact).norm() + 1e-3 * exact.norm()
        assert (flash - exact).norm() < 3e-2 * exact.norm()
