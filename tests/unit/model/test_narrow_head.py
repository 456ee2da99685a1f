"""Head and loss of narrow models without logits in memory, against plain PyTorch in fp64. The kernels need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model import head_kernels, sharding
from megatron.model.head_kernels import MOST_PARTS, narrow_head, parts_of
from megatron.model.sharding import SequentialGPT, compile_blocks

GPU = pytest.mark.gpu
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(rows: int, width: int, vocabulary: int, tokens: int, dtype: torch.dtype, device: str = "cuda") -> Problem:
    """hidden, head, targets, weights: among the rows a sure one, a surprising one and one that does not count."""
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width, device=device)
    head = torch.randn(vocabulary, width, device=device) * 2 / width**0.5
    targets = torch.randint(tokens, (rows,), device=device)
    weights = torch.rand(rows, device=device)
    hidden[0], hidden[1] = 20 * head[targets[0]], -20 * head[targets[1]]
    weights[2] = 0
    return hidden.to(dtype), head.to(dtype), targets, weights


def exact(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """nll and both gradients in fp64."""
    hidden, head = (x.double().requires_grad_() for x in (hidden, head))
    nll = F.cross_entropy(hidden @ head[:tokens].t(), targets, reduction="none")
    return nll.detach(), *torch.autograd.grad((nll * weights.double()).sum(), (hidden, head))


def test_elsewhere_the_plain_code_is_used() -> None:
    assert narrow_head(*problem(5, 16, 40, 37, torch.bfloat16, "cpu"), 37) is None


def test_parts_of_a_width() -> None:
    assert parts_of(224) == ((128, 64, 32), (128, 64, 32)) and parts_of(288) == ((256, 32), (256, 32))
    assert parts_of(96) == ((96,), (128,)) and parts_of(8) == ((8,), (16,))
    assert parts_of(248) == ((248,), (256,)), "which 128 + 64 + 64 would be, too"
    for width in range(8, 321, 8):
        sizes, parts = parts_of(width)
        assert sum(sizes) == width and len(sizes) == len(parts) <= MOST_PARTS
        assert all(0 < size <= part and part in (16, 32, 64, 128, 256) for size, part in zip(sizes, parts))


def test_gpus_before_hopper_use_the_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the shared memory, but none of the units that the kernels let copy tiles."""
    a100 = SimpleNamespace(major=8, shared_memory_per_block_optin=166912)
    monkeypatch.setattr(head_kernels, "takes", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: a100)
    assert narrow_head(*problem(5, 16, 40, 37, torch.bfloat16, "cpu"), 37) is None


@GPU
def test_what_it_takes() -> None:
    for width, dtype in ((328, torch.bfloat16), (130, torch.bfloat16), (128, torch.float32), (128, torch.float64)):
        assert narrow_head(*problem(5, width, 40, 37, dtype), 37) is None
    hidden, head, targets, weights = problem(5, 128, 40, 37, torch.bfloat16)
    assert narrow_head(hidden, head.t().contiguous().t(), targets, weights, 37) is None
    off = torch.empty(40 * 128 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(40, 128).copy_(head)
    assert narrow_head(hidden, off, targets, weights, 37) is None
    assert narrow_head(hidden, head, targets, weights, 37) is not None


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(700, 128, 50304, 50258), (333, 224, 5000, 4999), (5, 16, 40, 37),
                                   (64, 128, 128, 128), (130, 256, 640, 513), (200, 288, 1000, 990),
                                   (70, 320, 300, 290), (100, 200, 700, 650), (100, 96, 700, 650)])  # fmt: skip
def test_nll_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """nll to fp32's precision; gradients to that of the dtype, each row by itself: a sure row's are small."""
    tokens = shape[3]
    batch = problem(*shape, dtype)
    expected = exact(*batch, tokens)
    found = narrow_head(*batch, tokens)
    assert found is not None
    nll, grad_hidden, grad_head = found
    assert nll.dtype == grad_head.dtype == torch.float32 and grad_hidden.dtype == dtype
    torch.testing.assert_close(nll.double(), expected[0], rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    off = (grad_hidden.double() - expected[1]).norm(dim=1)
    assert (off <= 2 * eps * expected[1].norm(dim=1) + 1e-5).all()
    assert (grad_head - expected[2]).norm() <= eps * expected[2].norm()
    assert (grad_hidden[2] == 0).all() and (grad_head[tokens:] == 0).all()


@GPU
def test_what_is_not_finite_stays_so_and_a_target_that_is_no_token_has_no_probability() -> None:
    hidden, head, targets, weights = problem(70, 64, 80, 70, torch.bfloat16)
    hidden[3, 5], hidden[4, 5] = torch.nan, torch.inf
    targets[5] = 75
    found = narrow_head(hidden, head, targets, weights, 70)
    assert found is not None
    nll, grad_hidden, grad_head = found
    assert nll[3].isnan() and not nll[4].isfinite() and nll[5] == torch.inf
    rest = [row for row in range(70) if row not in (3, 4, 5)]
    assert nll[rest].isfinite().all() and grad_hidden[rest].isfinite().all()
    assert grad_hidden[3].isnan().all() and not grad_head.isfinite().all()


@GPU
def test_a_compiled_model_uses_it(
    make_model: Callable[..., SequentialGPT], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of a whole model as without it, within bf16 noise."""
    calls: list[torch.Size] = []

    def note(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        calls.append(hidden.shape)
        return narrow_head(hidden, *rest)

    monkeypatch.setattr(sharding, "narrow_head", note)
    model = make_model(False, torch.bfloat16).cuda()
    compile_blocks(model)
    batch = {name: value.cuda() for name, value in batch.items()}
    results = []
    for at_once in (model.layers[-1].at_once, None):
        model.layers[-1].at_once = at_once
        loss = model(**batch)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(calls) == 1
    for one, other in zip(*results):
        assert (one - other).float().norm() <= 0.02 * other.float().norm() + 1e-6
