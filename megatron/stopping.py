"""When a run ends before its last sample: signals, the kill switch, ``--exit-interval``, ``--exit-duration-in-mins``.

Every rank asks once a step, at the step's end, and all get the same answer: one integer is maximised over the control
group, so nobody saves alone and nobody waits for a rank that has left. Only rank 0 reads the clock and looks for the
kill-switch file.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from megatron.config import CheckpointConfig
from megatron.distributed.agreement import agree_on_error, any_rank
from megatron.errors import UserError

if TYPE_CHECKING:
    from megatron.distributed.topology import Topology

# What the ranks agree on; the largest wins, so a signal outranks a schedule. A signal is its number above _SIGNAL.
_NOTHING: Final = 0
_EXIT_INTERVAL: Final = 1
_EXIT_DURATION: Final = 2
_KILL_SWITCH: Final = 3
_SIGNAL: Final = 100

_HANDLED: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher passes the terminal's Ctrl-C on, so one keystroke arrives twice within moments.
_SAME_KEYSTROKE_SECONDS: Final = 1.0


class StopController:
    """Decides, for all ranks alike, whether the run stops at this step boundary.

    A context manager: the handlers of SIGTERM, SIGUSR1 and SIGINT (with ``--exit-signal-handler`` only) are installed
    on entering, on the main thread, and the previous ones come back on leaving. A first Ctrl-C stops like SIGTERM, a
    second one kills at once. Without the flag signals keep their usual meaning.

    A kill-switch file that is there already when the run starts is obeyed at the first step boundary. The file is
    removed when the ranks have agreed to stop, so a requeued job goes on; one that has content then is no switch.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        topology: Topology,
        start_time: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``start_time`` is ``clock()`` at the start of the process: ``--exit-duration-in-mins`` counts from there."""
        self._config = config
        self._topology = topology
        self._start_time = start_time
        self._clock = clock
        self._signal: int | None = None
        self._interrupted_at: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopController:
        """Raises UserError, on every rank, if ``--kill-switch-file`` names what should not be removed."""
        path = self._config.kill_switch_file
        with agree_on_error(self._topology):
            if self._topology.rank == 0 and path is not None and not _is_a_switch(path):
                raise UserError(f"--kill-switch-file {path} is there and no empty file: name one that may be removed")
        if self._config.exit_signal_handler:
            for number in _HANDLED:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # A handler that was not installed from Python reads as None and can only be replaced by the default.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def should_stop(self, iteration: int) -> str | None:
        """Return why the run stops after step ``iteration`` (1-based), or None; the same on every rank.

        A collective call: every rank makes it after every step. The caller then saves, and exits with code 0.
        """
        code = any_rank(self._topology, self._own_code(iteration))
        if code == _NOTHING:
            return None
        path = self._config.kill_switch_file
        if self._topology.rank == 0 and path is not None and self._kill_switch_is_on():
            # Also when a signal won: a switch that outlived this stop would stop the requeued job at once.
            _remove(path)
        if code >= _SIGNAL:
            return f"received {signal.Signals(code - _SIGNAL).name}"
        return {
            _EXIT_INTERVAL: f"--exit-interval {self._config.exit_interval} reached",
            _EXIT_DURATION: f"--exit-duration-in-mins {self._config.exit_duration_in_mins} reached",
            _KILL_SWITCH: f"found --kill-switch-file {path}",
        }[code]

    def _own_code(self, iteration: int) -> int:
        """What this rank alone knows."""
        if self._signal is not None:
            return _SIGNAL + self._signal
        if self._topology.rank == 0:
            if self._kill_switch_is_on():
                return _KILL_SWITCH
            limit = self._config.exit_duration_in_mins
            if limit is not None and self._clock() - self._start_time >= limit * 60:
                return _EXIT_DURATION
        interval = self._config.exit_interval
        return _EXIT_INTERVAL if interval is not None and iteration % interval == 0 else _NOTHING

    def _kill_switch_is_on(self) -> bool:
        path = self._config.kill_switch_file
        return path is not None and os.path.lexists(path)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; the step boundary does the rest. A second Ctrl-C ends the process as if unhandled."""
        if number == signal.SIGINT:
            now = self._clock()
            if self._interrupted_at is None:
                self._interrupted_at = now
                # os.write: a print from a handler can meet a half-finished print.
                os.write(2, b"\nstopping after this step (Ctrl-C again kills)\n")
            elif now - self._interrupted_at > _SAME_KEYSTROKE_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
        self._signal = number if self._signal is None else self._signal


def _is_a_switch(path: str) -> bool:
    """Whether nobody loses anything if ``path`` is removed."""
    return not os.path.lexists(path) or (os.path.isfile(path) and os.path.getsize(path) == 0)


def _remove(path: str) -> None:
    """Remove the kill switch; one that cannot be removed is said, since it will stop the next job too."""
    try:
        os.unlink(path)
    except OSError as error:
        print(f"warning: --kill-switch-file {path} cannot be removed ({error.strerror}): remove it by hand", flush=True)
