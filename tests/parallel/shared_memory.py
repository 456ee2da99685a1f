"""Memory that processes of one host share, in the place of that of their GPUs (``copy_engines.Memory``)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.copy_engines import SLOTS, Slots, Write


class SharedMemory:
    """Files that all ranks of a group map. Another thread writes, in order and as late as it likes."""

    made = 0

    def __init__(self, nbytes: int, folder: Path, group: dist.ProcessGroup) -> None:
        SharedMemory.made += 1
        self._size, self._rank = group.size(), group.rank()
        names = [folder / f"{group.group_name}-{SharedMemory.made}-{rank}" for rank in range(self._size)]
        dist.barrier(group)
        all_bytes = [_shared(name, nbytes, torch.uint8) for name in names]
        self._flags = [_shared(name.with_suffix(".flags"), SLOTS * self._size, torch.int32) for name in names]
        dist.barrier(group)
        self._memory, self.mine = all_bytes, all_bytes[self._rank]
        self._writer = ThreadPoolExecutor(1)

    def start(self, writes: Sequence[Write], slot: int) -> Callable[[], None]:
        """As copy engines would."""

        def write() -> None:
            for to, at, part in writes:
                time.sleep(random.random() / 2000)
                self._memory[to][at : at + part.nbytes].copy_(part.view(-1).view(torch.uint8))
                if to != self._rank:
                    assert self._flags[to][slot * self._size + self._rank] == 0, "a flag that nobody has seen yet"
                    self._flags[to][slot * self._size + self._rank] = 1

        written = self._writer.submit(write)

        def wait() -> None:
            written.result()
            for rank in range(self._size):
                while rank != self._rank and self._flags[self._rank][slot * self._size + rank] == 0:
                    time.sleep(1e-5)
                self._flags[self._rank][slot * self._size + rank] = 0

        return wait


def _shared(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def shared_slots(folder: Path, group: Any) -> Slots:
    """Slots for a group whose processes see ``folder``."""
    return Slots(group.size(), group.rank(), 0, lambda nbytes: SharedMemory(nbytes, folder, group))
