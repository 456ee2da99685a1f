"""What a run reports: the writer that hands records to every sink, and the reader of what it wrote.

``metrics.jsonl`` is the record that everything else reads: one JSON object a line, ``kind`` train, valid, test or meta,
flushed line by line. TensorBoard, W&B and the console are views of it. A number that is not finite is ``null``. A run
that resumes moves the events after the resumed step to ``metrics.superseded.jsonl``, so that no curve goes back.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol

from megatron.config import CheckpointConfig, LoggingConfig
from megatron.errors import UserError
from megatron.files import describe, finite, write_atomically
from megatron.metric_records import Record, TrainRecord, ValidationRecord, from_event, to_event
from megatron.metric_sinks import Console, TensorBoard, WeightsAndBiases

if TYPE_CHECKING:
    from megatron.distributed.topology import Topology

__all__ = [
    "MetricsError", "MetricsWriter", "TrainRecord", "ValidationRecord", "metrics_path", "of_training",
    "on_last_windows", "read_metrics",
]  # fmt: skip

METRICS_FILE: Final = "metrics.jsonl"
KINDS: Final = ("train", "valid", "test", "meta")
_BEGIN: Final = '{"kind": "'
"""What every line that is written here begins with."""


class MetricsError(RuntimeError):
    """``metrics.jsonl`` cannot be written any more; the message names path and errno. The run ends with exit code 1."""


class Sink(Protocol):
    """Somewhere that records go."""

    def write(self, record: Record, time: float) -> None:
        """Take a record; ``time`` is its Unix time."""

    def close(self) -> None:
        """Write what is still held back."""


class MetricsWriter:
    """Hands every event to ``metrics.jsonl``, the console, TensorBoard and W&B. On other ranks than 0 it does nothing.

    A context manager. A file that cannot be written while the run goes on raises MetricsError.
    """

    def __init__(
        self,
        config: LoggingConfig,
        path: Path | None,
        topology: Topology,
        *,
        total_iterations: int,
        resumed_iteration: int | None = None,
        append: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the sinks; not a collective call, so wrap it in ``agree_on_error``.

        Args:
            path: ``metrics.jsonl``, None for none (see :func:`metrics_path`).
            total_iterations: length of the progress bar; 0 for a run that does not train.
            resumed_iteration: step that the run continues from, None for a fresh one: later events are superseded.
            append: keep all events: for a run that only validates.
            settings: the run's configuration, for W&B.

        Raises:
            UserError: ``--metrics-file`` or ``--tensorboard-dir`` cannot be written, or the old file is damaged.
        """
        self._file: _Lines | None = None
        self._console: Console | None = None
        self._sinks: list[Sink] = []
        if topology.rank != 0:
            return
        self._console = Console(total_iterations, resumed_iteration or 0)
        kept: list[dict[str, Any]] = []
        replay = False
        if path is not None:
            try:
                kept, superseded = _continue_file(path, resumed_iteration, append)
                self._file = _Lines(path)
            except OSError as error:
                raise UserError(f"--metrics-file {path} cannot be written: {describe(error)}") from error
            replay = bool(superseded)
        self._open_views(config, kept, replay, settings or {})
        if resumed_iteration is not None and not append:
            self.meta("resumed", resumed_iteration)

    def _open_views(
        self, config: LoggingConfig, kept: list[dict[str, Any]], replay: bool, settings: Mapping[str, Any]
    ) -> None:
        """Open TensorBoard and W&B; ``replay`` gives TensorBoard its curves anew, without the superseded points."""
        assert self._console is not None
        self._sinks.append(self._console)
        if config.tensorboard_dir is not None:
            if replay:
                TensorBoard.set_aside(Path(config.tensorboard_dir))
            board = TensorBoard(config, self._console.log)
            self._sinks.append(board)
            for event in kept if replay else ():
                record = from_event(event)
                if record is not None:
                    board.write(record, event.get("time", 0.0))
        if config.wandb_project is not None:
            ids = [event["id"] for event in kept if event["kind"] == "meta" and event.get("event") == "wandb"]
            wandb = WeightsAndBiases(config, settings, ids[-1] if ids else None, self._console.log)
            self._sinks.append(wandb)
            if wandb.run_id is not None:
                self.meta("wandb", kept[-1]["iteration"] if kept else 0, id=wandb.run_id)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def progress(self, iteration: int) -> None:
        """Say that ``iteration`` steps are finished; cheap, for every step."""
        if self._console is not None:
            self._console.progress(iteration)

    def pause(self, seconds: float) -> None:
        """Say that the last ``seconds`` were no training (a validation, a save): the bar's estimate leaves them out."""
        if self._console is not None:
            self._console.pause(seconds)

    def train(self, record: TrainRecord) -> None:
        """Write a training step."""
        self._write(record)

    def validation(self, record: ValidationRecord) -> None:
        """Write a validation or test measurement."""
        self._write(record)

    def meta(self, event: str, iteration: int, **fields: Any) -> None:
        """Write an event that is no measurement ("started", "saved", "stopped", ...); ``fields`` must be JSON."""
        if self._file is not None:
            self._file.write({"kind": "meta", "event": event, "iteration": iteration, "time": _now(), **fields})

    def log(self, text: str) -> None:
        """Print on the console, above the progress bar."""
        if self._console is not None:
            self._console.log(text)

    def close(self) -> None:
        """Close every sink; a second call does nothing."""
        for sink in self._sinks:
            sink.close()
        if self._file is not None:
            self._file.close()
        self._sinks, self._file = [], None

    def _write(self, record: Record) -> None:
        now = _now()
        if self._file is not None:
            self._file.write({**to_event(record), "time": now})
        for sink in self._sinks:
            sink.write(record, now)


def metrics_path(logging: LoggingConfig, checkpoint: CheckpointConfig) -> Path | None:
    """Return where ``metrics.jsonl`` goes: ``--metrics-file``, else into ``--save``; None without both."""
    if logging.metrics_file is not None:
        return Path(logging.metrics_file)
    return None if checkpoint.save is None else Path(checkpoint.save) / METRICS_FILE


def of_training(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``events`` without those of ``--skip-train`` runs, which measure into the file of the run that trained."""
    kept, trains = [], True
    for event in events:
        if event["kind"] == "meta" and event.get("event") == "start":
            trains = event.get("tokens_per_epoch") != 0
        if trains:
            kept.append(event)
    return kept


def on_last_windows(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The validation events that have a loss, of the windows that were measured last: no others compare with them."""
    windows: str | None = None
    found: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "meta" and event.get("event") == "start" and event.get("valid_windows") != windows:
            windows, found = event.get("valid_windows"), []
        if event["kind"] == "valid" and event.get("loss") is not None:
            found.append(event)
    return found


def read_metrics(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a ``metrics.jsonl`` in the order of writing, of one ``kind`` if given.

    A last line without its end, left by a run that was killed while writing, is ignored.

    Raises:
        UserError: the file is missing, or another line is no event; the message names file and line.
    """
    assert kind is None or kind in KINDS, kind
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics: {describe(error)}") from error
    lines = text.split("\n")
    events = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line feed is torn, or empty
        try:
            event = json.loads(line)
            if event["kind"] not in KINDS or not isinstance(event["iteration"], int):
                raise ValueError("unknown kind or iteration")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not an event of metrics.jsonl ({error})") from error
        events.append(event)
    torn = lines[-1]
    if torn and not (torn.startswith(_BEGIN) or _BEGIN.startswith(torn)):
        raise UserError(f"{path}, line {len(lines)}: not an event of metrics.jsonl")
    return [event for event in events if kind is None or event["kind"] == kind]


def _continue_file(
    path: Path, resumed_iteration: int | None, append: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Leave in ``path`` only the events that the run to come continues; return them and those moved away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return [], []
    kept: list[dict[str, Any]] = []
    superseded: list[dict[str, Any]] = []
    for event in read_metrics(path):
        stays = append or (resumed_iteration is not None and event["iteration"] <= resumed_iteration)
        (kept if stays else superseded).append(event)
    if superseded:
        # Before the rewrite: a crash in between leaves them twice rather than never.
        with open(path.with_name(f"{path.stem}.superseded{path.suffix}"), "a", encoding="utf-8") as file:
            file.write("".join(map(_line, superseded)))
    write_atomically(path, "".join(map(_line, kept)))
    return kept, superseded


class _Lines:
    """A file of JSON lines, each of them in the operating system's hands when ``write`` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, event: Mapping[str, Any]) -> None:
        try:
            self._file.write(_line(event))
            self._file.flush()
        except OSError as error:
            raise MetricsError(f"cannot write {self._path}: {describe(error)}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every line was flushed, or its error raised, by write()
            self._file.close()


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(finite(event), allow_nan=False) + "\n"


def _now() -> float:
    return round(time.time(), 3)
