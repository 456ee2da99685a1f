"""Adding what is dropped out: on a GPU the kernel, its randomness and its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.distributed.collectives import Ranks
from megatron.distributed.tensor_parallel import ALONE, TensorParallel
from megatron.model.dropout import add_dropped
from megatron.model.sharding import SequentialGPT, compile_blocks

Batch = dict[str, Tensor]
GPU = pytest.mark.gpu


def test_uncompiled_it_is_pytorch() -> None:
    hidden, x = torch.randn(4, 100), torch.randn(4, 100)
    torch.manual_seed(3)
    found = add_dropped(hidden, x, 0.3, True, ALONE)
    torch.manual_seed(3)
    assert torch.equal(found, hidden + torch.nn.functional.dropout(x, 0.3))
    for probability, training in ((0.3, False), (0.0, True)):
        assert torch.equal(add_dropped(hidden, x, probability, training, ALONE), hidden + x)


def kernel(hidden: Tensor | None, x: Tensor, seed: int, probability: float) -> Tensor:
    """The operator with a seed that is a number."""
    out: Tensor = torch.ops.megatron.add_dropped(hidden, x, torch.tensor([seed], device="cuda"), probability)
    return out


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(3, 5, 1280), (7, 13), (1000, 2048)])
def test_the_sum(dtype: torch.dtype, probability: float, shape: tuple[int, ...]) -> None:
    """Where the same seed keeps a 1, x / (1 - p) is added, rounded once; elsewhere hidden stays to the bit."""
    hidden, x = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    kept = kernel(None, torch.ones(shape, device="cuda"), 17, probability) != 0
    found = kernel(hidden, x, 17, probability)
    exact = hidden.double() + x.double() / (1 - probability)
    assert torch.equal(found[~kept], hidden[~kept])
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6)[kept].all()


@GPU
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_what_is_dropped_is_random(probability: float) -> None:
    """Shares of all, of each row and each column within five deviations; seeds and neighbours are independent."""
    rows, columns = 1024, 2048
    ones = torch.ones(rows, columns, device="cuda")
    one, other = (kernel(None, ones, seed, probability) == 0 for seed in (1, 2**40 + 1))
    both = probability**2
    pairs = {"seeds": one & other, "columns": one[:, 1:] & one[:, :-1], "rows": one[1:] & one[:-1],
             "quarters": one.view(-1)[512:] & one.view(-1)[:-512]}
    shares = {name: (pair.double().mean().item(), both, pair.numel()) for name, pair in pairs.items()}
    shares["all"] = (one.double().mean().item(), probability, one.numel())
    for name, (found, expected, count) in shares.items():
        assert abs(found - expected) < 5 * (expected * (1 - expected) / count) ** 0.5, name
    for dim, count in ((0, rows), (1, columns)):
        worst = (one.double().mean(dim=dim) - probability).abs().max().item()
        assert worst < 5.5 * (probability * (1 - probability) / count) ** 0.5


@GPU
def test_compiled_it_draws_anew_and_differentiates_what_it_drew() -> None:
    torch.compiler.reset()
    compiled = torch.compile(add_dropped, fullgraph=True)
    hidden, x = (torch.randn(300, 96, device="cuda", requires_grad=True) for _ in range(2))
    seen = []
    for _ in range(2):
        out = compiled(hidden, x, 0.25, True, ALONE)
        to_hidden, to_x = torch.autograd.grad(out, (hidden, x), torch.ones_like(out))
        assert (to_hidden == 1).all() and ((to_x == 0) | (to_x == torch.tensor(1 / 0.75, device="cuda"))).all()
        torch.testing.assert_close(out, hidden + x * to_x)
        seen.append(to_x)
    assert not torch.equal(*seen)
    torch.cuda.manual_seed(5)
    first = compiled(hidden, x, 0.25, True, ALONE)
    torch.cuda.manual_seed(5)
    assert torch.equal(first, compiled(hidden, x, 0.25, True, ALONE))


@GPU
def test_compiled_ranks_differ_where_their_tokens_do() -> None:
    """Ranks that hold the same tokens drop alike; sequence-parallel ones, seeded alike too, independently."""
    torch.compiler.reset()
    compiled = torch.compile(add_dropped, fullgraph=True)
    hidden, x = torch.zeros(1000, 96, device="cuda"), torch.ones(1000, 96, device="cuda")
    dropped = {}
    for sequence_parallel in (False, True):
        for rank in (0, 1):
            torch.cuda.manual_seed(5)
            tensor = TensorParallel(2, rank, Ranks("no group", 2), sequence_parallel)
            dropped[sequence_parallel, rank] = compiled(hidden, x, 0.25, True, tensor) == 0
    assert torch.equal(dropped[False, 0], dropped[False, 1])
    both = (dropped[True, 0] & dropped[True, 1]).double().mean().item()
    assert abs(both - 0.0625) < 5 * (0.0625 * 0.9375 / x.numel()) ** 0.5


@GPU
def test_recomputation_draws_the_same(make_model: Callable[..., SequentialGPT], batch: Batch) -> None:
    """Loss and gradients of compiled blocks with dropout, recomputed in the backward pass or not."""
    batch = {name: value.cuda() for name, value in batch.items()}
    results = []
    for changes in ({}, {"checkpoint_activations": True}):
        torch.compiler.reset()
        model = make_model(False, torch.bfloat16, hidden_dropout=0.3, **changes).cuda()
        compile_blocks(model, one_by_one=True)
        torch.manual_seed(4)
        loss = model(**batch)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)
    assert results[0][0] == results[1][0]
