"""The copy that a checkpoint is written from: the same bytes in the file, whatever training does since."""

from __future__ import annotations

import io
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.async_save import HostCopies

CPU = torch.device("cpu")


def a_state(device: str = "cpu") -> dict[str, Any]:
    """What DeepSpeed saves: views of flat buffers, parameters, scalars, objects that change, nothing at all."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(1000, generator=generator).to(device)
    return {
        "views": OrderedDict(a=flat[:600].view(30, 20), b=flat[600:], every_third=flat[::3]),
        "groups": [{"params": [0, 1], "lr": 0.5, "betas": (0.9, 0.95)}],
        "parameter": torch.nn.Parameter(torch.randn(33, generator=generator).to(device)),
        "half": torch.randn(77, generator=generator).to(device, torch.bfloat16),
        "step": torch.tensor(4.0),
        "empty": torch.empty(0, device=device),
        "ids": torch.arange(5, device=device),
        "scaler": SimpleNamespace(scale=65536.0),
        "dtype": torch.float16,
        "none": None,
    }


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def go_on(state: dict[str, Any]) -> None:
    """What a step does: tensors change in place, and so do objects."""
    with torch.no_grad():
        for tensor in (state["views"]["a"], state["views"]["b"], state["parameter"], state["half"], state["step"]):
            tensor.add_(1)
    state["groups"][0]["lr"] = 0.25
    state["scaler"].scale /= 2


def test_the_copy_is_saved_as_the_original_was() -> None:
    state, copies = a_state(), HostCopies(CPU)
    expected = saved(state)
    copies.begin()
    copy = copies.copy(state)
    go_on(state)
    assert saved(copy) == expected != saved(state)
    assert isinstance(copy["parameter"], torch.nn.Parameter) and copy["groups"][0]["lr"] == 0.5
    copy["views"]["a"][0, 0] = 7  # memory that was shared still is
    assert copy["views"]["every_third"][0] == 7


def test_memory_is_used_again_by_the_next_save_and_not_before() -> None:
    state, copies = a_state(), HostCopies(CPU)

    def places(*found: dict[str, Any]) -> set[int]:
        return {copy[name].untyped_storage().data_ptr() for copy in found for name in ("half", "parameter", "ids")}

    copies.begin()
    first, second = copies.copy(state), copies.copy(state)  # two files of one save
    assert len(places(first, second)) == 6
    before = places(first, second)
    go_on(state)
    copies.begin()
    expected = saved(state)
    third, fourth = copies.copy(state), copies.copy(state)
    assert saved(third) == saved(fourth) == expected
    assert places(third, fourth) == before
    copies.begin()
    smaller = copies.copy({"half": torch.ones(3)})
    assert smaller["half"].tolist() == [1, 1, 1] and smaller["half"].untyped_storage().nbytes() == 12


@pytest.mark.parametrize("chunk", [1, 64, 4000, 1 << 20])
def test_chunks_cover_every_byte_once(chunk: int) -> None:
    sources = [torch.arange(1000.0), torch.empty(0), torch.arange(7, dtype=torch.int16)]
    pairs = [(s.untyped_storage(), torch.zeros_like(s).untyped_storage()) for s in sources]
    pieces = list(HostCopies(CPU, chunk)._chunks(pairs))
    assert sum(source.numel() for source, _ in pieces) == 4000 + 14
    assert all(source.numel() == target.numel() <= chunk for source, target in pieces)
    for source, target in pieces:
        target.add_(source)
    assert all(list(source) == list(target) for source, target in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [100, 4096, 64 << 20])
def test_a_copy_from_the_gpu_is_of_the_moment(chunk: int) -> None:
    """Kernels that were queued before the copy are in it, those queued after it are not."""
    device = torch.device("cuda", torch.cuda.current_device())
    state, copies = a_state("cuda"), HostCopies(device, chunk)
    expected = a_state()
    busy = torch.randn(2048, 2048, device=device)
    for _ in range(3):
        for _ in range(20):
            busy = busy @ busy / 50
        go_on(state)
        copies.begin()
        copy = copies.copy(state)
        go_on(expected)
        frozen = saved(expected)
        go_on(state)
        go_on(expected)
        torch.cuda.synchronize(device)
        assert saved(copy) == frozen
    assert copy["views"]["a"].device.type == "cpu"


@pytest.mark.gpu
def test_a_large_copy_from_the_gpu() -> None:
    """More than two chunks' worth, as one storage, next to one on the CPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    weights = torch.randn(50_000_003, device=device)
    moments = torch.randn(1000)
    expected = weights.cpu()
    copies = HostCopies(device)
    for _ in range(2):
        copies.begin()
        copy = copies.copy({"weights": weights, "moments": moments})
        weights.mul_(2)
        assert torch.equal(copy["weights"], expected) and torch.equal(copy["moments"], moments)
        assert copy["moments"].data_ptr() != moments.data_ptr()
        expected = expected * 2
