"""DeepSpeed's ``save_checkpoint`` without its trap: a rank that cannot write leaves the others waiting at a barrier.

And without its writes, where they are to happen later, from a copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.async_save import HostCopies
from megatron.files import flush


class _DeferredWriter:
    """Stands in for DeepSpeed's checkpoint engine during one save: a failed write is kept for later instead of raised.

    DeepSpeed ends a save with a barrier. A rank that raised before it would leave the others there until the collective
    times out; so every rank reaches the barrier, and the error is raised behind it. Files are flushed by the rank that
    wrote them: on a network file system nobody else can.

    With ``copies`` it only copies what it is given; :meth:`write_copies` writes that, on any thread.
    """

    def __init__(self, inner: Any, copies: HostCopies | None) -> None:
        self._inner = inner
        self._copies = copies
        self._copied: list[tuple[Any, str]] = []  # (state, path)
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep the first OSError or RuntimeError raised inside."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.error = self.error or error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.deferred():
            self._inner.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is None:
            with self.deferred():
                if self._copies is None:
                    self._write(state_dict, path)
                else:
                    self._copied.append((self._copies.copy(state_dict), path))

    def write_copies(self) -> None:
        """Write what was copied, once; no collective call. Raises OSError or RuntimeError."""
        while self._copied:
            self._write(*self._copied.pop(0))

    def _write(self, state_dict: Any, path: str) -> None:
        self._inner.save(state_dict, path)
        flush(Path(path))


def save_engine(
    engine: Any,
    directory: Path,
    tag: str,
    client_state: Mapping[str, Any] | None = None,
    copies: HostCopies | None = None,
) -> Callable[[], None] | None:
    """Write this rank's DeepSpeed files into ``directory/tag``; a collective call that leaves no rank waiting.

    With ``copies`` it copies the state and returns the function that writes the files, which is not collective, may run
    on another thread, and must be done before the next call.

    Raises:
        OSError, RuntimeError: this rank's write (or copy) failed; raised after DeepSpeed's last barrier.
    """
    if copies is not None:
        copies.begin()
    inner, copy_scripts = engine.checkpoint_engine, engine._copy_recovery_script
    writer = _DeferredWriter(inner, copies)
    engine.checkpoint_engine = writer
    # DeepSpeed would lay zero_to_fp32.py and zero_to_torch.py beside the checkpoints, which cannot read bf16 ones.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(directory), tag=tag, client_state=dict(client_state or {}), save_latest=False)
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = inner, copy_scripts
    if writer.error is not None:
        raise writer.error
    return None if copies is None else writer.write_copies
