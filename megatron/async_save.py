"""A copy in host memory of what a checkpoint will hold, so that training goes on while the copy is written.

The copy is all that training waits for. From a GPU it goes through two small page-locked chunks in turn, one filled by
the GPU while the other is emptied into ordinary memory. Page-locked memory for the whole state would be copied into
faster, but locking several GB costs seconds in the first save, PyTorch rounds each piece up to a power of two, and the
pages are lost to everything else on the node.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, UntypedStorage

CHUNK: Final = 64 << 20  # bytes of each page-locked chunk


class HostCopies:
    """Copies of nested objects with tensors, in host memory that is used again by each save.

    Fresh memory costs a page fault every 4 KiB, so buffers are kept; a run's saves are all of the same sizes.
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK) -> None:
        self._device = device
        self._chunk = chunk  # bytes
        self._stages: list[Tensor] = []
        self._free: dict[int, list[UntypedStorage]] = {}  # by their bytes
        self._taken: list[UntypedStorage] = []

    def begin(self) -> None:
        """Start a save: wait for the device, and use the memory of the last save's copies again.

        Nothing may read those any more.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._free = {}
        for storage in self._taken:
            self._free.setdefault(storage.nbytes(), []).append(storage)
        self._taken = []

    def copy(self, state: Any) -> Any:
        """Return ``state`` (picklable) as it is now, its tensors on the CPU; tensors that share memory still do.

        Whatever ``torch.save`` would write of ``state`` it writes of the copy, but for the name of the device.
        """
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(state)
        pairs = [(storage, self._take(storage.nbytes())) for storage in pickler.storages]
        for source, target in pairs:
            if source.device.type == "cpu":
                target.copy_(source)
        self._fetch((source, target) for source, target in pairs if source.device.type != "cpu")
        file.seek(0)
        return _Unpickler(file, [target for _, target in pairs]).load()

    def _take(self, nbytes: int) -> UntypedStorage:
        free = self._free.get(nbytes)
        storage = free.pop() if free else UntypedStorage(nbytes)
        self._taken.append(storage)
        return storage

    def _fetch(self, pairs: Iterable[tuple[UntypedStorage, UntypedStorage]]) -> None:
        """Copy storages of the GPU into storages of the host."""
        flight: tuple[torch.cuda.Event, Tensor, Tensor] | None = None
        for number, (source, target) in enumerate(self._chunks(pairs)):
            if not self._stages:
                self._stages = [torch.empty(self._chunk, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            stage = self._stages[number % 2][: source.numel()]  # emptied in the last round but one
            stage.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            if flight is not None:
                _land(*flight)
            flight = event, stage, target
        if flight is not None:
            _land(*flight)

    def _chunks(self, pairs: Iterable[tuple[UntypedStorage, UntypedStorage]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same bytes in pieces that fit a chunk: uint8 views ``[n]``."""
        for source, target in pairs:
            pieces = (_bytes(storage).split(self._chunk) for storage in (source, target) if storage.nbytes())
            yield from zip(*pieces, strict=True)


def _land(event: torch.cuda.Event, stage: Tensor, target: Tensor) -> None:
    event.synchronize()
    target.copy_(stage)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Pickler(pickle.Pickler):
    """Pickles everything but the memory of tensors, which it collects: ``torch.save`` divides its work alike."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.storages: list[UntypedStorage] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype | None] | None:
        """(index of the storage, its type of elements or None for bytes), None for all that is no storage."""
        if isinstance(value, torch.TypedStorage):
            return self._place(value._untyped_storage), value.dtype
        return (self._place(value), None) if isinstance(value, UntypedStorage) else None

    def _place(self, storage: UntypedStorage) -> int:
        index = self._index.setdefault(storage._cdata, len(self.storages))
        if index == len(self.storages):
            self.storages.append(storage)
        return index


class _Unpickler(pickle.Unpickler):
    """Puts it together again around the copied storages."""

    def __init__(self, file: io.BytesIO, storages: list[UntypedStorage]) -> None:
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, identity: tuple[int, torch.dtype | None]) -> UntypedStorage | torch.TypedStorage:
        index, dtype = identity
        storage = self._storages[index]
        return storage if dtype is None else torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
