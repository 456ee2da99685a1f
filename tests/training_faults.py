"""What a test puts into a run's process: functions that it calls before its entry point."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def keep_weights(directory: Path) -> None:
    """At the end of training each rank writes its parameters to ``directory/rank<r>.pt``."""
    from megatron import training

    train = training.Loop.train

    def train_and_keep(loop: Any) -> None:
        train(loop)
        weights = {name: p.detach().clone() for name, p in loop.run.engine.model.named_parameters()}
        torch.save(weights, directory / f"rank{loop.topology.rank}.pt")

    training.Loop.train = train_and_keep  # type: ignore[method-assign]


def allow_fp8_on_a_cpu() -> None:
    """PyTorch computes the products of ``--fp8`` on a CPU too, too slowly to be of use to anyone but a test."""
    from megatron import run

    run.require_fp8 = lambda device: None


def record_file_events(marker: str, log: Path) -> None:
    """Append to ``log`` every operation on a file whose path contains ``marker``: where a process can be killed."""
    _on_file_event(marker, lambda event: log.open("a").write(event + "\n"))


def die_at_file_event(marker: str, number: int) -> None:
    """SIGKILL this process before its ``number``-th (from 1) operation on a file whose path contains ``marker``."""
    left = number

    def count(event: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _on_file_event(marker, count)


def _on_file_event(marker: str, action: Callable[[str], object]) -> None:
    """Call ``action`` before each operation that opens, makes, renames, lists or removes such a path."""
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or not (event == "open" or event.startswith(("os.", "shutil."))):
            return
        paths = [str(argument) for argument in arguments if isinstance(argument, str | Path)]
        if any(marker in path for path in paths):
            busy = True
            action(" ".join([event, *paths]))
            busy = False

    sys.addaudithook(hook)


def signal_after_step(step: int, number: int) -> None:
    """Send this process the signal ``number`` when step ``step`` is finished, before anything is logged or saved."""
    from megatron import training

    one_step = training.Loop.step

    def step_and_signal(loop: Any, batches: Any) -> None:
        one_step(loop, batches)
        if loop.progress.iteration == step:
            os.kill(os.getpid(), number)

    training.Loop.step = step_and_signal  # type: ignore[method-assign]


def raise_after_step(step: int) -> None:
    """A defect: an error that nobody expects, at the end of ``step``."""
    from megatron import training

    one_step = training.Loop.step

    def step_and_raise(loop: Any, batches: Any) -> None:
        one_step(loop, batches)
        if loop.progress.iteration == step:
            raise ZeroDivisionError("a defect")

    training.Loop.step = step_and_raise  # type: ignore[method-assign]


def hold_writes(then: tuple[Callable[..., object], tuple[Any, ...]] | None = None) -> None:
    """Let ``--async-save`` write a checkpoint only when the loop waits for it: training is then as far ahead of it as
    can be, and a run takes the same course every time. ``then`` is another fault.
    """
    from megatron import deepspeed_save, training

    awaited = threading.Event()
    write, finish = deepspeed_save._DeferredWriter.write_copies, training.Loop.finish_save

    def write_when_awaited(writer: Any) -> None:
        assert awaited.wait(60)
        write(writer)

    def say_and_finish(loop: Any) -> None:
        awaited.set()
        finish(loop)
        awaited.clear()

    deepspeed_save._DeferredWriter.write_copies = write_when_awaited  # type: ignore[method-assign]
    training.Loop.finish_save = say_and_finish  # type: ignore[method-assign]
    if then is not None:
        function, arguments = then
        function(*arguments)


def call_main_twice(objective: str, first: list[str], second: list[str]) -> None:
    """Call ``main`` with a wrong command line, ``first``, and ``second``, and end the process with their sum."""
    from megatron.entry import main

    kind: Any = objective
    refused = main(kind, [])
    assert refused == 2, refused
    sys.exit(main(kind, first) + main(kind, second))


def poison(samples: Sequence[int], value: float) -> None:
    """Give the training samples of these numbers the weight ``value`` (NaN or infinity) in the loss."""
    from megatron.objectives.autoregressive import Autoregressive
    from megatron.objectives.masked_diffusion import MaskedDiffusion

    for objective in (Autoregressive, MaskedDiffusion):
        make_batch = objective.make_batch

        def poisoned(
            self: Any, tokens: Any, sample_ids: Any, mc_ids: Any = None, make_batch: Any = make_batch
        ) -> Any:
            batch = make_batch(self, tokens, sample_ids, mc_ids)
            if mc_ids is None:  # training: windows of a validation have numbers of their own
                batch.weights[torch.isin(sample_ids, torch.tensor(samples))] = value
            return batch

        objective.make_batch = poisoned  # type: ignore[method-assign]


def other_noise(offset: int) -> None:
    """Corrupt each training sample as the one ``offset`` places on would be: what a rank with its own noise does."""
    from megatron.objectives.masked_diffusion import MaskedDiffusion

    make_batch = MaskedDiffusion.make_batch

    def shifted(self: Any, tokens: Any, sample_ids: Any, mc_ids: Any = None) -> Any:
        # Windows of a validation, which have noise draws, are as they were.
        return make_batch(self, tokens, sample_ids + (offset if mc_ids is None else 0), mc_ids)

    MaskedDiffusion.make_batch = shifted  # type: ignore[method-assign]


def lose_rank(action: str, iteration: int, timeout: float) -> None:
    """This process dies ("die") or stands still ("hang") before step ``iteration``; collectives wait ``timeout`` s.

    With action "" it only waits no longer than that for the others. One that hangs ends after the others have.
    """
    import datetime
    import functools
    import time

    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from megatron import entry, initialize, training

    limit = datetime.timedelta(seconds=timeout)
    _set_pg_timeout(limit, dist.group.WORLD)  # the test's rendezvous was there first, without a limit
    entry.roll_call = functools.partial(entry.roll_call, patience=timeout)
    build = initialize.build_topology
    initialize.build_topology = lambda tensor, pipeline, device, _: build(tensor, pipeline, device, limit)
    step = training.Loop.step

    def lost(loop: Any, batches: Any) -> None:
        if loop.progress.iteration + 1 == iteration:
            if action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif action == "hang":
                time.sleep(4 * timeout)
                os._exit(7)
        step(loop, batches)

    training.Loop.step = lost  # type: ignore[method-assign]


def small_disk(directory: Path, size: int, copy: Path) -> Callable[[], object]:
    """Let ``directory`` be a disk of ``size`` bytes that only this process sees; its content ends up in ``copy``.

    Raises OSError where this process may not mount (neither as root nor in a user namespace).
    """
    system, user = ctypes.CDLL(None, use_errno=True), os.getuid()
    new_mounts, new_user, private = 0x20000, 0x10000000, 0x44000  # CLONE_NEWNS, CLONE_NEWUSER, MS_REC | MS_PRIVATE
    if system.unshare(new_mounts) != 0:
        _check(system.unshare(new_mounts | new_user))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    _check(system.mount(b"none", b"/", None, private, None))
    _check(system.mount(b"tmpfs", str(directory).encode(), b"tmpfs", 0, f"size={size}".encode()))
    return lambda: shutil.copytree(directory, copy)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def small_files_after_step(step: int, size: int) -> None:
    """From the end of ``step`` on, the system refuses to write beyond the first ``size`` bytes of any file.

    A checkpoint that is being written then is first written to its end.
    """
    from megatron import training

    one_step = training.Loop.step

    def step_and_limit(loop: Any, batches: Any) -> None:
        one_step(loop, batches)
        if loop.progress.iteration == step:
            if loop.pending is not None:
                loop.pending[0].result.result()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    training.Loop.step = step_and_limit  # type: ignore[method-assign]


def no_compilation_after(step: int) -> None:
    """Let every later step fail in which torch.compile meets a shape or a value that it has no code for."""
    import torch

    from megatron import training

    one_step = training.Loop.step

    def strict_step(loop: Any, batches: Any) -> None:
        stance = "default" if loop.progress.iteration < step else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            one_step(loop, batches)

    training.Loop.step = strict_step  # type: ignore[method-assign]


def unmask_inputs() -> None:
    """Let the diffusion model see a quarter of the tokens that it is scored on: the mistake that an entropy finds."""
    from megatron.objectives.masked_diffusion import MaskedDiffusion

    make_batch = MaskedDiffusion.make_batch

    def leaking(self: Any, tokens: Any, sample_ids: Any, mc_ids: Any = None) -> Any:
        batch = make_batch(self, tokens, sample_ids, mc_ids)
        batch.inputs[:, ::4] = batch.targets[:, ::4]
        return batch

    MaskedDiffusion.make_batch = leaking  # type: ignore[method-assign]
