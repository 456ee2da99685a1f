"""Checkpoints that are complete or absent, whatever moment the run dies at.

DeepSpeed writes its rank files into ``.tmp-global_step{N}``; ``run.json`` (what the run was, and the size of every
file) joins them last; everything is flushed to disk; one rename makes it ``global_step{N}``; one replace makes
``latest`` name it. A crash leaves at most a hidden directory, which the next start finishes or removes. Every step is
agreed by all ranks: a failure on one of them is an error on all, and nothing is renamed.

The engine may copy its state instead of writing it: then a thread of each rank writes the copy while training goes on,
and what follows the writing is done once all ranks have. No collective call happens on that thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from megatron.checkpoint_directory import BEST_FILE, LATEST_FILE, TAG, Best, CheckpointDirectory, incomplete
from megatron.distributed.agreement import agree_on_error, gather_objects
from megatron.errors import UserError
from megatron.files import PROBE, TEMPORARY, describe, flush, read_text, remove, write_atomically, write_json
from megatron.rng_state import restore_rng, rng_state, save_rng
from megatron.run_metadata import METADATA_FILE, CheckpointMetadata, as_json

if TYPE_CHECKING:
    import torch

    from megatron.distributed.topology import Topology

__all__ = ["BEST_FILE", "LATEST_FILE", "Best", "CheckpointError", "CheckpointStore", "PendingSave", "restore_rng"]

_TRASH: Final = ".trash-"
_PATIENCE: Final = 10.0  # seconds until a file of another node must have shown up
_LEFTOVER: Final = re.compile(r"\.(tmp|trash)-global_step\d+|\.tmp-(latest|best\.json)|\.probe-[0-9a-f]{32}")

Result = TypeVar("Result")
# (directory, tag): write this rank's files into directory/tag, or copy what belongs into them and return the function
# that writes the copy and may run on another thread.
EngineSave = Callable[[Path, str], Callable[[], None] | None]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Earlier ones are untouched; the run ends with exit code 1."""


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint on its way: nothing but a hidden directory until :meth:`CheckpointStore.finish_save`."""

    metadata: CheckpointMetadata
    result: Future[tuple[list[str], float]]  # the files that this rank sees, and the seconds since the save began

    @property
    def written(self) -> bool:
        """Whether this rank's files are written, or could not be."""
        return self.result.done()

    @property
    def seconds(self) -> float:
        """From the begin of the save to the end of this rank's last file; waits for it."""
        return self.result.result()[1]


class CheckpointStore(CheckpointDirectory):
    """A checkpoint directory to write to: :meth:`prepare` and the saves are collective calls."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        # Checkpoints that other runs left here: not ours to delete or to call best. Set by begin().
        self._foreign: frozenset[str] = frozenset()

    # ---- start of a run --------------------------------------------------------------------------

    def prepare(self, topology: Topology) -> None:
        """Create the directory, try that it can be written and that every rank sees it, clear what a crash left.

        Collective.

        Raises:
            UserError: on every rank, naming ``--save``.
        """
        probe = self.directory / f"{PROBE}{uuid.uuid4().hex}"
        with agree_on_error(topology):
            if topology.rank == 0:
                self._probe(probe)
                self._clear_leftovers(keep=probe.name)
        name = gather_objects(topology, probe.name)[0]
        try:
            with agree_on_error(topology):
                # Rank 0 alone renames: a directory that each node has for itself would lose the other nodes' files.
                if not _appears(self.directory, name):
                    raise UserError(f"--save {self.directory} is not shared by all nodes: use one that every rank sees")
        finally:
            if topology.rank == 0:
                remove(probe)

    def begin(self, resumed_iteration: int | None, topology: Topology) -> str | None:
        """Say which step this run continues from (None: from scratch); returns a remark to print, or None.

        Checkpoints of later steps that lie here already (all of them, for a fresh run) belong to another course of
        training: they stay out of this run's retention and of its best, and are overwritten only where this run
        reaches the same step.
        """
        start = -1 if resumed_iteration is None else resumed_iteration
        stored = self.stored()
        self._foreign = frozenset(m.tag for m in stored if m.iteration > start)
        if topology.rank == 0:
            # Also after a crash between `latest` and best.json.
            ranked = _by_validation([m for m in stored if m.tag not in self._foreign])
            best = self.best()
            if best is not None and best.iteration > start:
                remove(self.directory / BEST_FILE)
            if ranked:
                self._remember_if_best(ranked[0])
        if not self._foreign:
            return None
        tags = ", ".join(m.tag for m in stored if m.tag in self._foreign)
        return f"{self.directory} already holds {tags}: kept, but overwritten where this run saves the same step"

    def _probe(self, probe: Path) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
        except FileExistsError:
            raise UserError(f"--save {self.directory} is a file: name a directory") from None
        except OSError as error:
            raise UserError(f"--save {self.directory} cannot be written: {describe(error)}") from error

    def recover(self, topology: Topology) -> None:
        """Put back what ``latest`` names, if a crash interrupted its being saved over itself. For the run that saves
        here, before it loads from here; :meth:`prepare` does it, too. Collective."""
        with agree_on_error(topology):
            if topology.rank == 0 and self.directory.is_dir():  # what is none is loading's to say
                self._finish_commit()

    def _finish_commit(self) -> None:
        latest = read_text(self.directory / LATEST_FILE)
        tag = "" if latest is None else latest.strip()
        if TAG.fullmatch(tag) and not (self.directory / tag).exists():
            # A step was being saved over itself: the new copy, else the old one, is complete.
            for prefix in (TEMPORARY, _TRASH):
                if incomplete(self.directory / f"{prefix}{tag}") is None:
                    os.rename(self.directory / f"{prefix}{tag}", self.directory / tag)
                    break

    def _clear_leftovers(self, keep: str) -> None:
        """Finish what a crash interrupted where ``latest`` depends on it, and remove every other hidden remainder."""
        self._finish_commit()
        for path in self.directory.iterdir():
            if _LEFTOVER.fullmatch(path.name) and path.name != keep:
                remove(path)

    # ---- saving ----------------------------------------------------------------------------------

    def save(self, engine_save: EngineSave, metadata: CheckpointMetadata, topology: Topology) -> Path:
        """Write one checkpoint and make ``latest`` name it; returns its directory. A collective call.

        Raises CheckpointError as :meth:`start_save` and :meth:`finish_save` do.
        """
        return self.finish_save(self.start_save(engine_save, metadata, topology), topology)

    def start_save(self, engine_save: EngineSave, metadata: CheckpointMetadata, topology: Topology) -> PendingSave:
        """Write one checkpoint into a hidden directory, or begin to. A collective call.

        ``engine_save(directory, tag)`` must return or raise on every rank, even when another rank fails
        (:func:`megatron.deepspeed_save.save_engine` sees to that). What it returns runs on a thread. The generators of
        this rank, as they are now, are saved beside the engine's files. One save is finished before the next starts.

        Raises:
            CheckpointError: some rank could not write (disk full, ...): earlier checkpoints are as they were and the
                temporary directory is gone.
        """
        began = time.perf_counter()
        name = f"{TEMPORARY}{metadata.tag}"
        temporary = self.directory / name
        write: Callable[[], None] | None = None
        generators: dict[str, torch.Tensor] = {}

        def make_directory() -> None:
            if topology.rank == 0:
                remove(temporary)
                os.mkdir(temporary)

        def write_or_copy() -> None:
            nonlocal write, generators
            write, generators = engine_save(self.directory, name), rng_state(topology.device)

        def complete() -> tuple[list[str], float]:
            if write is not None:
                write()
            save_rng(temporary, generators, topology)
            files = [str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()]
            return files, time.perf_counter() - began

        self._agree(make_directory, temporary, topology)
        self._agree(write_or_copy, temporary, topology)
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # a process waits for it at its end
        result = executor.submit(complete)
        executor.shutdown(wait=False)
        return PendingSave(metadata, result)

    def finish_save(self, pending: PendingSave, topology: Topology) -> Path:
        """Wait for every rank's files, then make them a checkpoint, and ``latest`` name it; returns its directory.

        A collective call. Raises CheckpointError as :meth:`start_save`.
        """
        temporary = self.directory / f"{TEMPORARY}{pending.metadata.tag}"
        listings = self._agree(lambda: pending.result.result()[0], temporary, topology)
        # The union: on a network file system a node may not yet list what another one has just written.
        files = sorted(set().union(*listings))

        def commit() -> None:
            if topology.rank == 0:
                self._commit(temporary, pending.metadata, files)

        self._agree(commit, temporary, topology)
        return self.directory / pending.metadata.tag

    def _agree(self, action: Callable[[], Result], temporary: Path, topology: Topology) -> list[Result]:
        """Run ``action`` on every rank and return all results; if it fails on any, raise on every one."""
        failure: Exception | None = None
        result, reason = None, None
        try:
            result = action()
        except Exception as error:  # whatever it is, the other ranks must hear of it, or they wait for ever
            failure, reason = error, describe(error, self.directory)
        reports = gather_objects(topology, (result, reason))
        reasons = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text is not None]
        if not reasons:
            return [found for found, _ in reports]
        if topology.rank == 0:
            with contextlib.suppress(OSError):
                remove(temporary)
        if failure is not None and not isinstance(failure, OSError | RuntimeError):
            raise failure
        target = self.directory / temporary.name.removeprefix(TEMPORARY)
        message = reasons[0] if topology.world_size > 1 else reason
        raise CheckpointError(f"cannot save {target}: {message}; earlier checkpoints are untouched") from failure

    def _commit(self, temporary: Path, metadata: CheckpointMetadata, names: list[str]) -> None:
        """Rank 0, all files written: flush and describe them, rename, point ``latest`` at the result."""
        for name in names:
            flush(temporary / name)
        complete = replace(
            metadata,
            sequence=1 + max((m.sequence for m in self.stored()), default=0),
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            files={name: (temporary / name).stat().st_size for name in names},
        )
        write_json(temporary / METADATA_FILE, as_json(complete))
        for directory in {(temporary / name).parent for name in names} | {temporary}:
            flush(directory)
        target, trash = self.directory / complete.tag, self.directory / f"{_TRASH}{complete.tag}"
        if target.exists():
            # Between these renames the step is in neither place: recover() puts it back if `latest` needs it.
            remove(trash)
            os.rename(target, trash)
        try:
            os.rename(temporary, target)
        except OSError:
            if trash.exists():
                os.rename(trash, target)
            raise
        flush(self.directory)
        write_atomically(self.directory / LATEST_FILE, complete.tag)
        self._foreign -= {complete.tag}
        self._remember_if_best(complete)
        with contextlib.suppress(OSError):
            remove(trash)

    def _remember_if_best(self, metadata: CheckpointMetadata) -> None:
        validation, best = metadata.validation, self.best()
        if validation is None or (best is not None and best.loss <= validation.loss):
            return
        best = Best(metadata.tag, metadata.iteration, validation.loss, validation.stderr)
        write_atomically(self.directory / BEST_FILE, json.dumps(asdict(best)))

    def retain(self, keep_last: int, keep_best: int, topology: Topology) -> list[str]:
        """Delete this run's checkpoints but the ``keep_last`` newest and the ``keep_best`` of lowest validation loss.

        With ``keep_last`` 0 all stay. The newest and the one that ``latest`` names always stay. Rank 0 works; returns
        the tags it deleted. A checkpoint that cannot be deleted is left for the next time.
        """
        if topology.rank != 0 or keep_last == 0:
            return []
        own = [m for m in self.stored() if m.tag not in self._foreign]
        chosen = own[-keep_last:] + _by_validation(own)[:keep_best]
        kept = {m.tag for m in chosen} | {self.latest_tag()}
        deleted = []
        for tag in (m.tag for m in own if m.tag not in kept):
            with contextlib.suppress(OSError):
                # Renamed first: a half-deleted checkpoint must not look like one.
                os.rename(self.directory / tag, self.directory / f"{_TRASH}{tag}")
                deleted.append(tag)
                remove(self.directory / f"{_TRASH}{tag}")
        return deleted


def _by_validation(stored: list[CheckpointMetadata]) -> list[CheckpointMetadata]:
    """Checkpoints with a validation loss, lowest first; the earlier of two equals first."""
    measured = [(m.validation.loss, m) for m in stored if m.validation is not None]
    return [m for _, m in sorted(measured, key=lambda pair: pair[0])]


def _appears(directory: Path, name: str) -> bool:
    """Whether a file can be seen; a network file system shows another node's file after a while."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if name in os.listdir(directory):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
