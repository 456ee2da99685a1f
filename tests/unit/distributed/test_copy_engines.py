"""Messages by copy engines: who can have them, where each part goes, and that they are tried before they are used.

Groups of processes that compute with them: ``tests/parallel/test_tensor_parallel.py``."""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.distributed import agreement, copy_engines
from megatron.distributed.copy_engines import SLOTS, Slots, Write, copy_obstacle, open_slots
from megatron.distributed.topology import Grid, Topology, single_process_topology

A, B, C, D = "gpu-a", "gpu-b", "gpu-c", "gpu-d"
HOST = [("one", A, (B, C)), ("one", B, (A, C)), ("one", C, (A, B)), ("two", D, ())]


@pytest.mark.parametrize(("places", "ranks", "reason"), [
    (HOST, [0, 1], None),
    (HOST, [2, 0, 1], None),
    (HOST, [0, 3], "ranks 0 and 3 are on different hosts"),
    ([("one", A, (B,)), ("one", B, ())], [0, 1], "the GPU of rank 1 does not reach the memory of that of rank 0"),
    ([("one", A, ()), ("one", B, (A,))], [0, 1], "the GPU of rank 0 does not reach the memory of that of rank 1"),
    ([("one", "", ()), ("one", "", ())], [0, 1], "it needs GPUs"),
    ([("one", A, (B,)), ("one", A, (B,))], [0, 1], "the GPU of rank 0 does not reach the memory of that of rank 1"),
])  # fmt: skip
def test_who_can_have_them(places: Any, ranks: Sequence[int], reason: str | None) -> None:
    assert copy_obstacle(places, ranks) == reason


class Noted:
    """Memory of one rank, to which nobody else writes; what would be written elsewhere is noted."""

    def __init__(self, nbytes: int) -> None:
        self.mine = torch.zeros(nbytes, dtype=torch.uint8)
        self.started: list[tuple[list[tuple[int, int, int]], int]] = []

    def start(self, writes: Sequence[Write], slot: int) -> Callable[[], None]:
        self.started.append(([(to, at, int(part.view(-1)[0])) for to, at, part in writes], slot))
        return lambda: None


def slots_of(rank: int, size: int, expected: int = 0) -> tuple[Slots, list[Noted]]:
    """Slots of one of ``size`` ranks, and each memory that they asked for."""
    made: list[Noted] = []

    def allocate(nbytes: int) -> Noted:
        made.append(Noted(nbytes))
        return made[-1]

    return Slots(size, rank, expected, allocate), made


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_part_has_a_place_of_its_own_in_the_order_of_ranks(size: int, own: bool) -> None:
    """Two messages from each rank, as each of them writes and as the receiving one reads."""
    ranks = [slots_of(rank, size) for rank in range(size)]
    waits = []
    for message in range(2):
        for rank, (slots, _) in enumerate(ranks):
            parts = [torch.full((2, 3), 100 * message + 10 * rank + to) for to in range(size)]
            waits.append(slots.start(parts, own))
    memories = [made[0] for _, made in ranks]
    for memory, (slots, _) in zip(memories, ranks):
        for writes, slot in memory.started:
            assert [to for to, _, _ in writes] == [(slots.rank + 1 + i) % size for i in range(size - 1 + own)]
            for to, at, first in writes:
                memories[to].mine[at : at + 48].view(torch.int64).fill_(first)
            assert slot in (0, 1)
    for message in range(2):
        for rank in range(size):
            found = waits[message * size + rank]()
            senders = [sender for sender in range(size) if own or sender != rank]
            assert found.shape == (len(senders), 2, 3) and found.dtype == torch.int64
            assert found[:, 0, 0].tolist() == [100 * message + 10 * sender + rank for sender in senders]
            assert (found == found[:, :1, :1]).all()


def test_slots_take_turns_and_grow() -> None:
    slots, made = slots_of(1, 2)
    small, large = [torch.ones(4)] * 2, [torch.ones(2**20)] * 2
    for parts in (*[small] * (SLOTS + 1), large, small):
        slots.start(parts, own=False)
    assert [memory.mine.nbytes for memory in made] == [SLOTS * 2**21, SLOTS * 2**22]
    assert [slot for _, slot in made[0].started] == [*range(SLOTS), 0]
    assert [slot for _, slot in made[1].started] == [0, 1]
    assert [writes[0][1] for writes, _ in made[0].started] == [0, 2**21, 2 * 2**21, 3 * 2**21, 0]


def test_room_is_made_at_once_for_what_is_expected() -> None:
    slots, made = slots_of(0, 2, expected=5 * 2**20)
    for size in (4, 2**20, 3 * 2**18):
        slots.start([torch.ones(size)] * 2, own=False)
    assert [memory.mine.nbytes for memory in made] == [SLOTS * 6 * 2**20]


def test_what_is_sent_is_held_until_it_has_arrived() -> None:
    """Memory of a tensor that nobody holds may be written to by what is computed next."""
    slots, _ = slots_of(0, 2)
    sent = torch.ones(8)
    held = weakref.ref(sent)
    wait = slots.start([sent, sent], own=True)
    del sent
    assert held() is not None
    wait()
    assert held() is None


def topology() -> Topology:
    """The first of two tensor-parallel ranks, as far as its arithmetic goes."""
    return replace(single_process_topology(), grid=Grid(1, 1, 2))


def opened(monkeypatch: pytest.MonkeyPatch, allocate: Callable[..., Any], others: str | None = None) -> Slots | str:
    """What ``open_slots`` says where the other rank reaches this one and then says ``others``."""
    said = iter([None, others])
    monkeypatch.setattr(copy_engines, "gather_objects", lambda topology, own: [("one", A, (B,)), ("one", B, (A,))])
    monkeypatch.setattr(agreement, "gather_objects", lambda topology, own: [own, next(said)])
    monkeypatch.setattr(copy_engines, "PeerMemory", allocate)
    monkeypatch.setattr(copy_engines.symmetric_memory, "empty", torch.empty)
    return open_slots(topology(), 1000, datetime.timedelta(minutes=1))


def test_memory_where_nothing_arrives_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(monkeypatch, lambda nbytes, *_: Noted(nbytes))
    assert isinstance(found, str) and "rank 0: RuntimeError [0.0, 10.0] were sent" in found


def test_memory_that_cannot_be_had_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Noted:
        raise RuntimeError("CUDA driver error:\n  not permitted")

    expected = "symmetric memory failed on rank 0: RuntimeError CUDA driver error: not permitted"
    assert opened(monkeypatch, refuse) == expected
    assert opened(monkeypatch, refuse, "symmetric memory failed on rank 1: too") == expected


def test_a_rank_without_such_memory_says_so_before_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_engines, "gather_objects", lambda topology, own: [own, None])
    monkeypatch.setattr(agreement, "gather_objects", lambda topology, own: [own, None])
    monkeypatch.setattr(copy_engines, "copy_obstacle", lambda places, ranks: None)
    monkeypatch.setattr(copy_engines, "PeerMemory", lambda *_: pytest.fail("nobody meets here"))
    monkeypatch.delattr(copy_engines.symmetric_memory, "empty")
    found = open_slots(topology(), 1000, datetime.timedelta(minutes=1))
    assert isinstance(found, str) and "rank 0: AttributeError module" in found and "'empty'" in found


class Looped(Noted):
    """As if the other rank sent what this one does, but for the sender's number."""

    def start(self, writes: Sequence[Write], slot: int) -> Callable[[], None]:
        for to, at, part in writes:
            if to == 0:
                self.mine[at : at + part.nbytes] = part.view(-1).view(torch.uint8)
            else:
                self.mine[at + part.nbytes : at + 2 * part.nbytes] = (part + 10 - 1).view(-1).view(torch.uint8)
        return lambda: None


def test_what_fails_on_one_rank_is_used_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(nbytes: int, *_: Any) -> Looped:
        return Looped(nbytes)

    assert isinstance(opened(monkeypatch, loop), Slots)
    assert opened(monkeypatch, loop, "not here") == "not here"


def test_without_gpus_nothing_is_tried() -> None:
    alone = replace(single_process_topology(), grid=Grid(1, 1, 1))
    assert open_slots(alone, 1000, datetime.timedelta(minutes=1)) == "it needs GPUs"
