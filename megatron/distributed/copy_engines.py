"""Messages that GPUs of one host write into each other's memory by their copy engines.

Every rank has slots in its memory, into which the others write their part of a message, and after it a flag (PyTorch's
symmetric memory, ``torch.distributed._symmetric_memory``, on NVIDIA GPUs that reach each other's memory). All ranks of
a group send alike: the same messages in the same order. A message goes into the slot after the last one's, and

- a rank has at most two messages under way, and has used what it received, or copied it, before it starts the next but
  one (what uses it may still be waiting in the stream that computes: so does what starts the next).

Then nothing is overwritten that somebody still reads: a rank that starts message k + 4 has used all up to k + 2, so the
others have started theirs of number k + 2, and before that have used number k, in whose slot this one goes.
"""

from __future__ import annotations

import datetime
import itertools
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from megatron.distributed.agreement import first_said, gather_objects
from megatron.distributed.topology import Topology
from megatron.errors import one_line

SLOTS = 4
_ROUNDED_TO = 2**21  # bytes of a slot

Write = tuple[int, int, Tensor]
"""Rank, byte of its memory, contiguous tensor to put there."""
Place = tuple[str, str, tuple[str, ...]]
"""Of a rank: host, GPU, and the GPUs whose memory it reaches."""


class Memory(Protocol):
    """What :class:`Slots` need of memory that several ranks write to."""

    mine: Tensor
    """This rank's, uint8."""

    def start(self, writes: Sequence[Write], slot: int) -> Callable[[], None]:
        """Write all, and a flag of ``slot`` after what goes to another rank. What is returned waits until what was
        written may be changed, and until all others' flags of that slot are here, which it takes down."""


class Slots:
    """Messages between the ranks of one group through ``allocate(nbytes)``, the memory that all of them make at the
    same message: at the first, with room for messages of ``expected`` bytes, and at one that has no room in it."""

    def __init__(self, size: int, rank: int, expected: int, allocate: Callable[[int], Memory]) -> None:
        self.size, self.rank, self._allocate = size, rank, allocate
        self._memory: Memory | None = None
        self._expected, self._bytes, self._next = expected, 0, 0

    def start(self, parts: Sequence[Tensor], own: bool) -> Callable[[], Tensor]:
        """Send parts[r], all [n, ...] of one dtype and contiguous, to each rank r. What is returned waits and returns
        [ranks, n, ...], what this one got from each in their order; with its own part among them if ``own``, else
        without."""
        piece = parts[self.rank]
        places = self.size if own else self.size - 1
        memory = self._with_room_for(places * piece.nbytes)
        slot, self._next = self._next, (self._next + 1) % SLOTS
        begin = slot * self._bytes
        writes: list[Write] = []
        for step in range(1, self.size + own):  # each rank begins with another one
            to = (self.rank + step) % self.size
            place = self.rank if own or self.rank < to else self.rank - 1
            writes.append((to, begin + place * piece.nbytes, parts[to]))
        wait_for_all = memory.start(writes, slot)
        received = memory.mine[begin : begin + places * piece.nbytes].view(piece.dtype).view(places, *piece.shape)

        def wait() -> Tensor:
            wait_for_all()
            writes.clear()  # kept until here: memory that nobody holds is given to whatever is computed next
            return received

        return wait

    def _with_room_for(self, nbytes: int) -> Memory:
        if self._memory is None or nbytes > self._bytes:
            self._bytes, self._next = -(-max(nbytes, self._expected) // _ROUNDED_TO) * _ROUNDED_TO, 0
            self._memory = self._allocate(SLOTS * self._bytes)
        return self._memory

    def prove(self, device: torch.device) -> None:
        """Send numbers twice round all slots, two messages at a time.

        Raises:
            RuntimeError: others arrived; after the last turn, as the other ranks wait for all of them.
        """
        ranks, wrong = range(self.size), None

        def number(turn: int, sender: int, receiver: int) -> float:
            return float(100 * turn + 10 * sender + receiver)

        def send(turn: int) -> Callable[[], Tensor]:
            parts = [torch.full((4096,), number(turn, self.rank, to), device=device) for to in ranks]
            return self.start(parts, own=True)

        for first in range(0, 2 * SLOTS, 2):
            waits = {turn: send(turn) for turn in (first, first + 1)}
            for turn, wait in waits.items():
                found = wait().aminmax(dim=1)
                expected = [number(turn, sender, self.rank) for sender in ranks]
                if not found.min.tolist() == found.max.tolist() == expected:
                    wrong = wrong or f"{expected} were sent, and {found} arrived"
        if wrong is not None:
            raise RuntimeError(wrong)


class PeerMemory:
    """Symmetric memory of a group's GPUs, written to on a stream of its own."""

    def __init__(
        self, nbytes: int, device: torch.device, group: torch.distributed.ProcessGroup, timeout: datetime.timedelta
    ) -> None:
        torch.cuda.synchronize(device)  # whatever these ranks had under way in memory that this one takes the place of
        torch.cuda.empty_cache()  # symmetric memory is not PyTorch's allocator's, which would make room by itself
        self.mine = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self.mine, group)
        self._device, self._size, self._rank = device, group.size(), group.rank()
        self._others = [rank for rank in range(self._size) if rank != self._rank]
        self._theirs = {rank: self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in self._others}
        self._flags = {rank: self._handle.get_signal_pad(rank, dtype=torch.uint32) for rank in self._others}
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._timeout = int(timeout / datetime.timedelta(milliseconds=1))

    def start(self, writes: Sequence[Write], slot: int) -> Callable[[], None]:
        """See :class:`Memory`. The stream that is current now is the one that waits."""
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            for to, at, part in writes:
                memory = self.mine if to == self._rank else self._theirs[to]
                memory[at : at + part.nbytes].copy_(part.view(-1).view(torch.uint8))
                if to != self._rank:
                    # What wait_signal takes for its own rank's put_signal, which is a kernel and would wait for room.
                    flag = slot * self._size + self._rank
                    symmetric_memory._SymmetricMemory.stream_write_value32(self._flags[to], flag, 1)
            written = self._stream.record_event()

        def wait() -> None:
            computing.wait_event(written)
            for rank in self._others:
                self._handle.wait_signal(rank, slot, self._timeout)

        return wait


def copy_obstacle(places: Sequence[Place], ranks: Sequence[int]) -> str | None:
    """Why copy engines cannot carry messages among ``ranks``, in words; None if they can.

    ``places``: of all ranks.
    """
    if any(places[rank][1] == "" for rank in ranks):
        return "it needs GPUs"
    for rank, other in itertools.permutations(ranks, 2):
        host, _, reached = places[rank]
        other_host, other_gpu, _ = places[other]
        if other_host != host:
            return f"ranks {rank} and {other} are on different hosts"
        if other_gpu not in reached:
            return f"the GPU of rank {rank} does not reach the memory of that of rank {other}"
    return None


def open_slots(topology: Topology, expected: int, timeout: datetime.timedelta) -> Slots | str:
    """Slots for this process's tensor-parallel group, whose messages have arrived as they were sent; or, on all
    processes alike, why there are none. Collective.

    ``expected``: bytes of the largest message in training. One that takes longer than ``timeout`` ends the process.
    """
    places = gather_objects(topology, _place(topology.device))
    groups = topology.grid.tensor_groups()
    obstacle = next(filter(None, (copy_obstacle(places, ranks) for ranks in groups)), None)
    if obstacle is not None:
        return obstacle
    slots = Slots(
        topology.tensor_parallel_size,
        topology.tensor_parallel_rank,
        expected,
        lambda nbytes: PeerMemory(nbytes, topology.device, topology.tensor_group, timeout),
    )
    # A rank that has no such memory says so before the others wait for it.
    room = SLOTS * expected
    obstacle = _tried(topology, lambda: symmetric_memory.empty(room, dtype=torch.uint8, device=topology.device))
    if obstacle is None:
        obstacle = _tried(topology, lambda: slots.prove(topology.device))
    return slots if obstacle is None else obstacle


def _tried(topology: Topology, attempt: Callable[[], Any]) -> str | None:
    """What the first rank says on which ``attempt`` raises, on all; None if it does on none. Collective."""
    own = None
    try:
        attempt()
    except Exception as error:  # whatever a driver says, or a release of PyTorch in which a name is another
        own = f"symmetric memory failed on rank {topology.rank}: {one_line(error)[:300]}"
    return first_said(topology, own)


def _place(device: torch.device) -> Place:
    if device.type != "cuda":
        return socket.gethostname(), "", ()
    count, here = torch.cuda.device_count(), device.index
    gpus = [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
    reached = (index for index in range(count) if index != here and torch.cuda.can_device_access_peer(here, index))
    return socket.gethostname(), gpus[here], tuple(gpus[index] for index in reached)
