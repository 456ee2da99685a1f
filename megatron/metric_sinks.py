"""Views of the metrics: the console, TensorBoard, Weights & Biases."""

from __future__ import annotations

import netrc
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlparse

from tqdm import tqdm

from megatron.config import LoggingConfig
from megatron.errors import UserError
from megatron.files import describe
from megatron.metric_records import ITERATION, Record, TrainRecord, ValidationRecord, scalars

_WANDB_URL: Final = "https://api.wandb.ai"


class Console:
    """A progress bar where standard error is a terminal; Megatron's lines on standard output elsewhere.

    With the bar on a terminal and standard output in a file both are written. tqdm's own environment variables hold
    (``TQDM_POSITION``, ``TQDM_DESC``, ``TQDM_DISABLE=1``, ...): two runs side by side set different positions.
    """

    def __init__(self, total_iterations: int, iteration: int = 0) -> None:
        self._bar: Any = None
        self._total = total_iterations
        self._valid = ""
        if total_iterations > 0 and sys.stderr.isatty():
            # Nothing else is passed, since an argument would win over its environment variable.
            bar = tqdm(total=total_iterations, initial=iteration, unit="step")
            self._bar = None if bar.disable else bar

    def progress(self, iteration: int) -> None:
        """Move the bar to ``iteration`` finished steps."""
        if self._bar is not None:
            self._bar.update(iteration - self._bar.n)

    def pause(self, seconds: float) -> None:
        """Leave the last ``seconds`` out of the bar's rate, from which it estimates what is left."""
        if self._bar is not None:
            # tqdm divides the steps since it last printed by the time since then.
            self._bar.last_print_t = min(self._bar.last_print_t + seconds, time.time())

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(text, flush=True)

    def write(self, record: Record, time: float) -> None:
        """Show a record."""
        if isinstance(record, ValidationRecord):
            self._valid = f", {record.kind} {record.loss:.3f}"
            self.log(validation_line(record))
            return
        if self._bar is not None:
            state = f"loss {record.loss:.3f}{self._valid}, lr {record.lr:.2e}, {record.tokens_per_second:,.0f} tokens/s"
            self._bar.set_postfix_str(state, refresh=False)
            self.progress(record.iteration)
        if self._bar is None or not sys.stdout.isatty():
            self.log(train_line(record))

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def train_line(record: TrainRecord) -> str:
    """Return Megatron's line of a training step; scripts that parse its log find the same fields."""
    parts = [
        f" iteration {record.iteration:8d}/{record.total_iterations:8d}",
        f"consumed samples: {record.samples:12d}",
        f"consumed tokens: {record.tokens:12d}",
        f"elapsed time per iteration (ms): {record.seconds_per_step * 1000:.1f}",
        f"learning rate: {record.lr:.3E}",
        f"global batch size: {record.batch_size:5d}",
        f"lm loss: {record.loss:.6E}",
        f"loss scale: {1.0 if record.loss_scale is None else record.loss_scale:.1f}",
    ]
    if record.grad_norm is not None:
        parts.append(f"grad norm: {record.grad_norm:.3f}")
    parts += [
        f"number of skipped iterations: {record.skipped_steps:3d}",
        f"number of nan iterations: {record.nan_steps:3d}",
        f"epoch: {record.epoch:.3f}",
        f"tokens per second: {record.tokens_per_second:.0f}",
    ]
    if record.tflops is not None:
        parts.append(f"TFLOPs: {record.tflops:.2f}")
    if record.mfu is not None:
        parts.append(f"MFU: {record.mfu:.1%}")
    if record.memory_gb is not None:
        parts.append(f"memory (GB): {record.memory_gb:.2f}")
    return " | ".join(parts) + " |"


def validation_line(record: ValidationRecord) -> str:
    """Return Megatron's line of a validation, with the standard error and bits per byte."""
    error = "" if record.stderr is None else f" +/- {record.stderr:.2E}"
    draws = f" x {record.num_mc} noise draws" if record.num_mc > 1 else ""
    name = "validation" if record.kind == "valid" else "test"
    best = " best so far" if record.is_best else ""
    return (
        f" {name} loss at iteration {record.iteration} | lm loss value: {record.loss:.6E}{error} "
        f"| lm loss PPL: {record.ppl:.6E} | bits per byte: {record.bits_per_byte:.4f} "
        f"| windows: {record.windows}{draws} | time (s): {record.seconds:.1f} |{best}"
    )


class TensorBoard:
    """Event files in ``--tensorboard-dir``.

    A failure while running (a full disk) turns the sink off with a warning: metrics.jsonl has the same numbers.
    """

    def __init__(self, config: LoggingConfig, warn: Callable[[str], None]) -> None:
        assert config.tensorboard_dir is not None
        self._config, self._warn = config, warn
        self.directory = Path(config.tensorboard_dir)
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(config.tensorboard_dir, max_queue=config.tensorboard_queue_size)
        except ImportError as error:
            raise UserError(f"--tensorboard-dir: {error}; pip install tensorboard, or drop the flag") from error
        except OSError as error:
            raise UserError(f"--tensorboard-dir {self.directory} cannot be written: {describe(error)}") from error

    @staticmethod
    def set_aside(directory: Path) -> None:
        """Rename the event files of ``directory`` so that TensorBoard no longer shows them."""
        for path in directory.glob("*tfevents*") if directory.is_dir() else ():
            path.rename(path.with_name(path.name.replace("tfevents", "superseded")))

    def write(self, record: Record, time: float) -> None:
        """Write all curves of a record; ``time`` is its Unix time."""
        if self._writer is None:
            return
        try:
            for scalar in scalars(record, self._config):
                self._writer.add_scalar(scalar.tag, scalar.value, scalar.step, walltime=time)
            if isinstance(record, ValidationRecord):
                self._writer.flush()
        except (OSError, RuntimeError) as error:  # the writer's thread hands its error over
            self._writer = None
            self._warn(f"warning: TensorBoard is off from here on: {describe(error)}")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            try:
                self._writer.close()
            except (OSError, RuntimeError) as error:
                self._warn(f"warning: TensorBoard's last events are lost: {describe(error)}")
            self._writer = None


class WeightsAndBiases:
    """The run in W&B under the same names, each curve against its own axis.

    Online with a key (``WANDB_API_KEY`` or ``wandb login``) and a reachable server, offline otherwise; ``WANDB_MODE``
    wins. Whatever goes wrong in W&B becomes one warning, and the sink is off from there on.
    """

    def __init__(
        self, config: LoggingConfig, settings: Mapping[str, Any], run_id: str | None, warn: Callable[[str], None]
    ) -> None:
        """``settings`` is the run's configuration; ``run_id`` that of the run this one continues, None for none."""
        self._config, self._warn = config, warn
        self._run: Any = None
        self._known: set[str] = set()
        self._try(lambda: self._start(settings, run_id))

    @property
    def run_id(self) -> str | None:
        """W&B's id of the run; None when the sink is off."""
        return None if self._run is None else str(self._run.id)

    def write(self, record: Record, time: float) -> None:
        """Log all curves of a record."""
        if self._run is not None:
            self._try(lambda: self._log(record))

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._try(self._run.finish)
            self._run = None

    def _start(self, settings: Mapping[str, Any], run_id: str | None) -> None:
        config = self._config
        if config.wandb_save_dir is not None:
            Path(config.wandb_save_dir).mkdir(parents=True, exist_ok=True)
        import wandb

        self._run = wandb.init(
            project=config.wandb_project, name=config.wandb_exp_name, group=config.wandb_group,
            dir=config.wandb_save_dir, config=dict(settings), id=run_id, resume=None if run_id is None else "allow",
            mode=wandb_mode(os.environ),
            settings=wandb.Settings(quiet=True, console="off", init_timeout=60),
        )

    def _log(self, record: Record) -> None:
        points: dict[str, float] = {ITERATION: record.iteration}
        for scalar in scalars(record, self._config):
            if scalar.tag not in self._known:
                self._run.define_metric(scalar.tag, step_metric=scalar.axis)
                self._known.add(scalar.tag)
            points |= {scalar.axis: scalar.step, scalar.tag: scalar.value}
        self._run.log(points)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # W&B is never the reason a run fails
            self._run = None
            text = (str(error) or type(error).__name__).splitlines()[0]
            self._warn(f"warning: Weights & Biases is off from here on: {text}")


def wandb_mode(environment: Mapping[str, str]) -> Any:
    """Return "online" or "offline", None where ``WANDB_MODE`` decides."""
    if "WANDB_MODE" in environment:
        return None
    server = urlparse(environment.get("WANDB_BASE_URL", _WANDB_URL))
    host, port = server.hostname or "", server.port or 443
    if not environment.get("WANDB_API_KEY") and not _has_login(host):
        return "offline"
    if any(environment.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        return "online"
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return "offline"
    return "online"


def _has_login(host: str) -> bool:
    """Whether ``wandb login`` left a key in ~/.netrc."""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
