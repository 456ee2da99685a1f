"""Metrics: every line and tag read back, resumes without going back, and W&B that cannot make a run fail."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron import metric_sinks
from megatron.config import CheckpointConfig, LoggingConfig
from megatron.distributed.topology import Grid, Topology, single_process_topology
from megatron.errors import UserError
from megatron.metric_records import from_event, to_event
from megatron.metric_sinks import train_line, validation_line, wandb_mode
from megatron.metrics import MetricsWriter, TrainRecord, ValidationRecord, metrics_path, read_metrics

ALONE = single_process_topology()


def train_record(iteration: int, **changes: Any) -> TrainRecord:
    """Step ``iteration`` of a run with 8 samples of 64 tokens a step."""
    fields: dict[str, Any] = dict(
        iteration=iteration, total_iterations=100, samples=8 * iteration, tokens=512 * iteration, epoch=0.5 * iteration,
        flops=9e9 * iteration, flops_no_embeddings=6e9 * iteration, loss=4.0 - iteration / 100, lr=1e-3 * iteration,
        grad_norm=1.25, batch_size=8, loss_scale=None, seconds_per_step=0.25, tokens_per_second=2048.0, tflops=0.036,
        mfu=None, memory_gb=None, skipped_steps=0, nan_steps=0,
    )
    return TrainRecord(**(fields | changes))


def validation_record(iteration: int, **changes: Any) -> ValidationRecord:
    fields: dict[str, Any] = dict(
        iteration=iteration, samples=8 * iteration, tokens=512 * iteration, epoch=0.5 * iteration,
        flops=9e9 * iteration, flops_no_embeddings=6e9 * iteration, kind="valid", loss=3.5, stderr=0.02,
        ppl=math.exp(3.5), bits_per_byte=1.25, windows=120, num_mc=4, seconds=1.5, is_best=True,
    )
    return ValidationRecord(**(fields | changes))


def writer(folder: Path, *, topology: Topology = ALONE, **arguments: Any) -> MetricsWriter:
    """A writer into ``folder``; arguments that LoggingConfig knows go there."""
    known = {field.name for field in dataclasses.fields(LoggingConfig)}
    logging = LoggingConfig(**{name: value for name, value in arguments.items() if name in known})
    rest = {name: value for name, value in arguments.items() if name not in known}
    return MetricsWriter(logging, folder / "metrics.jsonl", topology, total_iterations=100, **rest)


def run(folder: Path, steps: range, **arguments: Any) -> None:
    """Train over ``steps``, with a validation after every fifth."""
    with writer(folder, **arguments) as metrics:
        for iteration in steps:
            metrics.progress(iteration)
            metrics.train(train_record(iteration))
            if iteration % 5 == 0:
                metrics.validation(validation_record(iteration))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> [(step, value)] of a TensorBoard directory, read by TensorBoard itself."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


# ---- metrics.jsonl


def test_lines_hold_every_field_under_its_documented_name(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.meta("started", 0, seed=1234)
        metrics.train(train_record(10, memory_gb=1.5, mfu=0.4))
        metrics.validation(validation_record(10))
        metrics.validation(validation_record(10, kind="test", is_best=False))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("time") > 1.7e9 for line in lines)
    where = {
        "iteration": 10, "samples": 80, "tokens": 5120, "epoch": 5.0, "flops": 9e10, "flops_no_embeddings": 6e10,
    }
    measured = {
        "loss": 3.5, "stderr": 0.02, "ppl": math.exp(3.5), "bits_per_byte": 1.25, "windows": 120, "num_mc": 4,
        "seconds": 1.5,
    }
    assert lines == [
        {"kind": "meta", "event": "started", "iteration": 0, "seed": 1234},
        {
            "kind": "train", **where, "loss": 3.9, "total_iterations": 100, "lr": 0.01, "grad_norm": 1.25,
            "batch_size": 8, "loss_scale": None, "seconds_per_step": 0.25, "tokens_per_second": 2048.0,
            "tflops": 0.036, "mfu": 0.4, "memory": 1.5, "skipped_steps": 0, "nan_steps": 0,
        },
        {"kind": "valid", **where, **measured, "is_best": True},
        {"kind": "test", **where, **measured, "is_best": False},
    ]  # fmt: skip


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.train(train_record(1, loss=math.nan, grad_norm=math.inf))
        metrics.meta("nan", 1, sample_ids=[3, 4], losses=[math.nan, -math.inf, 2.0], nested={"x": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    train, meta = read_metrics(tmp_path / "metrics.jsonl")
    assert train["loss"] is None and train["grad_norm"] is None
    assert meta["losses"] == [None, None, 2.0] and meta["nested"] == {"x": None} and meta["sample_ids"] == [3, 4]


def test_every_line_is_on_file_at_once(tmp_path: Path) -> None:
    metrics = writer(tmp_path)
    for iteration in range(1, 4):
        metrics.train(train_record(iteration))
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == iteration
    metrics.close()
    metrics.close()  # a second time is harmless


def test_records_survive_their_line() -> None:
    for record in (train_record(3, memory_gb=2.0), validation_record(4), validation_record(5, kind="test")):
        assert from_event({**json.loads(json.dumps(to_event(record))), "time": 1.0}) == record
    assert from_event({"kind": "meta", "event": "x", "iteration": 0}) is None
    assert from_event({"kind": "train", "iteration": 3, "loss": 1.0}) is None, "a line of another version"


def test_reader_selects_kinds_and_ignores_a_torn_last_line(tmp_path: Path) -> None:
    run(tmp_path, range(1, 11))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    assert [event["iteration"] for event in read_metrics(path, "valid")] == [5, 10]
    assert len(read_metrics(path, "train")) == 10 and read_metrics(path, "test") == []
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert len(read_metrics(path)) == 11, f"cut at {cut - last} bytes of the last line"


@pytest.mark.parametrize("bad", ["{", "[]", "7", "", '{"kind": "else", "iteration": 1}', '{"kind": "train"}'])
def test_a_bad_line_elsewhere_names_its_number(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "meta", "iteration": 0}\n' + bad + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: "):
        read_metrics(path)
    with pytest.raises(UserError, match="cannot read the metrics: No such file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_path_is_the_flag_or_the_checkpoint_directory() -> None:
    saving = CheckpointConfig(save="out")
    assert metrics_path(LoggingConfig(), saving) == Path("out/metrics.jsonl")
    assert metrics_path(LoggingConfig(metrics_file="m.jsonl"), saving) == Path("m.jsonl")
    assert metrics_path(LoggingConfig(), CheckpointConfig()) is None


def test_without_a_file_the_console_remains(capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(LoggingConfig(), None, ALONE, total_iterations=100) as metrics:
        metrics.train(train_record(7))
        metrics.meta("started", 0)
        metrics.log("remark")
    assert capsys.readouterr().out == train_line(train_record(7)) + "\nremark\n"


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = Topology(Grid(1, 2, 1), 1, ALONE.device)
    run(tmp_path, range(1, 6), topology=second, tensorboard_dir=str(tmp_path / "tb"), wandb_project="p")
    with writer(tmp_path, topology=second) as metrics:
        metrics.log("not from here")
        metrics.meta("started", 0)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_what_cannot_be_written_is_the_users_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--metrics-file .*file/metrics.jsonl cannot be written: .* \(errno \d+\)"):
        writer(tmp_path / "file")
    with pytest.raises(UserError, match=r"--tensorboard-dir .*file/tb cannot be written"):
        writer(tmp_path, tensorboard_dir=str(tmp_path / "file" / "tb"))


def test_a_full_disk_while_running_names_path_and_errno(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("megatron.metrics._continue_file", lambda *_: ([], []))
    with pytest.raises(RuntimeError, match=r"metrics.jsonl: No space .*errno 28"), writer(tmp_path) as metrics:
        metrics.train(train_record(1))


# ---- resume


def test_resume_moves_later_events_away(tmp_path: Path) -> None:
    run(tmp_path, range(1, 11))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "iter')  # killed while writing
    run(tmp_path, range(8, 13), resumed_iteration=7)
    events = read_metrics(tmp_path / "metrics.jsonl")
    assert [event["iteration"] for event in events if event["kind"] == "train"] == list(range(1, 13))
    assert [event["iteration"] for event in events if event["kind"] == "valid"] == [5, 10]
    assert [(e["event"], e["iteration"]) for e in events if e["kind"] == "meta"] == [("resumed", 7)]
    moved = read_metrics(tmp_path / "metrics.superseded.jsonl")
    assert [(event["kind"], event["iteration"]) for event in moved] == [
        ("train", 8), ("train", 9), ("train", 10), ("valid", 10),
    ]  # fmt: skip


def test_a_fresh_run_keeps_nothing_and_loses_nothing(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4))
    run(tmp_path, range(1, 3))
    assert [event["iteration"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [event["iteration"] for event in read_metrics(tmp_path / "metrics.superseded.jsonl")] == [1, 2, 3]


def test_a_run_that_only_validates_appends(tmp_path: Path) -> None:
    run(tmp_path, range(1, 7))
    with writer(tmp_path, resumed_iteration=3, append=True) as metrics:
        metrics.validation(validation_record(3))
    events = [(event["kind"], event["iteration"]) for event in read_metrics(tmp_path / "metrics.jsonl")]
    assert events[-3:] == [("valid", 5), ("train", 6), ("valid", 3)] and len(events) == 8
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


def test_tensorboard_curves_do_not_go_back_after_a_resume(tmp_path: Path) -> None:
    board = tmp_path / "tb"
    run(tmp_path, range(1, 11), tensorboard_dir=str(board))
    run(tmp_path, range(8, 13), tensorboard_dir=str(board), resumed_iteration=7)
    found = curves(board)
    assert [step for step, _ in found["lm-loss-training/lm loss"]] == list(range(1, 13))
    assert [step for step, _ in found["lm-loss-training/lm loss vs tokens"]] == [512 * i for i in range(1, 13)]
    assert [step for step, _ in found["lm-loss-validation/lm loss validation"]] == [5, 10]
    assert len(list(board.glob("*superseded*"))) == 1


def test_a_clean_resume_continues_the_event_files(tmp_path: Path) -> None:
    board = tmp_path / "tb"
    run(tmp_path, range(1, 8), tensorboard_dir=str(board))
    run(tmp_path, range(8, 13), tensorboard_dir=str(board), resumed_iteration=7)
    assert [step for step, _ in curves(board)["lm-loss-training/lm loss"]] == list(range(1, 13))
    assert len(list(board.glob("*tfevents*"))) == 2


# ---- TensorBoard

GIGAFLOS = "vs gigaflos (no embeddings)"


def test_tensorboard_tags_and_values(tmp_path: Path) -> None:
    with writer(tmp_path, tensorboard_dir=str(tmp_path / "tb")) as metrics:
        metrics.train(train_record(10))
        metrics.validation(validation_record(10))
        metrics.validation(validation_record(10, kind="test", loss=3.75))
    expected = {
        "lm-loss-training/lm loss": (10, 3.9),
        "lm-loss-training/lm loss vs samples": (80, 3.9),
        "lm-loss-training/lm loss vs tokens": (5120, 3.9),
        f"lm-loss-training/lm loss {GIGAFLOS}": (60, 3.9),
        "learning-rate/learning-rate": (10, 0.01),
        "learning-rate/learning-rate vs samples": (80, 0.01),
        "learning-rate/learning-rate vs tokens": (5120, 0.01),
        "grad-norm/grad-norm": (10, 1.25),
        "grad-norm/grad-norm vs samples": (80, 1.25),
        "grad-norm/grad-norm vs tokens": (5120, 1.25),
    }
    for name, loss in (("validation", 3.5), ("test", 3.75)):
        expected |= {
            f"lm-loss-validation/lm loss {name}": (10, loss),
            f"lm-loss-validation/lm loss {name} vs samples": (80, loss),
            f"lm-loss-validation/lm loss {name} vs tokens": (5120, loss),
            f"lm-loss-validation/lm loss {name} {GIGAFLOS}": (60, loss),
            f"lm-loss-validation/lm loss {name} stderr": (10, 0.02),
            f"lm-loss-validation/lm loss {name} bits per byte": (10, 1.25),
        }
    found = curves(tmp_path / "tb")
    assert found.keys() == expected.keys()
    for tag, (step, value) in expected.items():
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6))], tag


@pytest.mark.parametrize(
    ("flag", "tags"),
    [
        (
            "log_batch_size_to_tensorboard",
            {"batch-size/batch-size": (10, 8.0), "batch-size/batch-size vs samples": (80, 8.0)},
        ),
        (
            "log_timers_to_tensorboard",
            {"iteration-time/iteration-time": (10, 0.25), "throughput/tokens per second": (10, 2048.0)},
        ),
        (
            "log_validation_ppl_to_tensorboard",
            {
                "lm-loss-validation/lm loss validation ppl": (10, math.exp(3.5)),
                f"lm-loss-validation/lm loss validation ppl {GIGAFLOS}": (60, math.exp(3.5)),
            },
        ),
    ],
)
def test_flags_add_their_tags(tmp_path: Path, flag: str, tags: dict[str, tuple[int, float]]) -> None:
    for enabled in (False, True):
        arguments: dict[str, Any] = {"tensorboard_dir": str(tmp_path / str(enabled)), flag: enabled}
        with writer(tmp_path / str(enabled), **arguments) as metrics:
            metrics.train(train_record(10))
            metrics.validation(validation_record(10))
    without, found = curves(tmp_path / "False"), curves(tmp_path / "True")
    for tag, (step, value) in tags.items():
        assert tag not in without
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6))]


def test_loss_scale_is_shown_for_fp16_and_nan_losses_are_visible(tmp_path: Path) -> None:
    with writer(tmp_path, tensorboard_dir=str(tmp_path)) as metrics:
        metrics.train(train_record(1, loss_scale=65536.0, loss=math.nan, grad_norm=None))
    found = curves(tmp_path)
    assert found["loss-scale/loss-scale"] == [(1, 65536.0)]
    assert math.isnan(found["lm-loss-training/lm loss"][0][1])
    assert "grad-norm/grad-norm" not in found


def test_queue_size_reaches_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.utils.tensorboard as tensorboard

    seen: list[int] = []
    original = tensorboard.SummaryWriter

    def spy(folder: str, max_queue: int) -> Any:
        seen.append(max_queue)
        return original(folder, max_queue=max_queue)

    monkeypatch.setattr(tensorboard, "SummaryWriter", spy)
    writer(tmp_path, tensorboard_dir=str(tmp_path), tensorboard_queue_size=7).close()
    assert seen == [7]


def test_a_failing_tensorboard_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with writer(tmp_path, tensorboard_dir=str(tmp_path)) as metrics:
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        metrics.train(train_record(1))
        metrics.train(train_record(2))
    assert capsys.readouterr().out.count("warning: TensorBoard is off from here on: No space left on device") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


# ---- Weights & Biases


class FakeWandb(types.ModuleType):
    """What the sink uses of wandb; raises in the call named by ``failing``."""

    def __init__(self, failing: str = "") -> None:
        super().__init__("wandb")
        self.failing = failing
        self.started: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.points: list[dict[str, float]] = []
        self.finished = 0
        self.id = "abc123"

    def _call(self, name: str) -> None:
        if name == self.failing:
            raise RuntimeError(f"{name} failed\nwith a second line")

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> FakeWandb:
        self._call("init")
        self.started = arguments
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self._call("define_metric")
        assert name not in self.axes
        self.axes[name] = step_metric

    def log(self, points: dict[str, float]) -> None:
        self._call("log")
        self.points.append(points)

    def finish(self) -> None:
        self._call("finish")
        self.finished += 1


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_wandb_gets_the_same_names_each_on_its_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    arguments = {
        "wandb_project": "p", "wandb_exp_name": "n", "wandb_group": "g", "wandb_save_dir": str(tmp_path / "w"),
        "tensorboard_dir": str(tmp_path / "tb"),
    }  # fmt: skip
    run(tmp_path, range(1, 6), settings={"seed": 1}, **arguments)
    assert (fake.started["project"], fake.started["name"], fake.started["group"]) == ("p", "n", "g")
    assert fake.started["config"] == {"seed": 1} and fake.started["dir"] == str(tmp_path / "w")
    assert fake.axes.keys() == curves(tmp_path / "tb").keys()
    assert fake.axes["lm-loss-training/lm loss"] == "iteration"
    assert fake.axes["lm-loss-training/lm loss vs tokens"] == "tokens"
    assert fake.axes[f"lm-loss-validation/lm loss validation {GIGAFLOS}"] == "gigaflos (no embeddings)"
    last_train = fake.points[-2]
    assert last_train["lm-loss-training/lm loss vs samples"] == 3.95
    assert (last_train["iteration"], last_train["samples"], last_train["tokens"]) == (5, 40, 2560)
    assert fake.finished == 1


def test_wandb_run_is_continued_by_a_resume_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path, range(1, 4), wandb_project="p")
    assert fake.started["id"] is None and fake.started["resume"] is None
    run(tmp_path, range(4, 6), wandb_project="p", resumed_iteration=3)
    assert fake.started["id"] == "abc123" and fake.started["resume"] == "allow"
    run(tmp_path, range(1, 6), wandb_project="p")
    assert fake.started["id"] is None


@pytest.mark.parametrize("failing", ["import", "init", "define_metric", "log", "finish"])
def test_wandb_never_makes_a_run_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if failing == "import" else FakeWandb(failing))  # None: ImportError
    run(tmp_path, range(1, 6), wandb_project="p")
    assert len(read_metrics(tmp_path / "metrics.jsonl", "train")) == 5
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: Weights & Biases is off from here on: ")
    assert "second line" not in warnings[0]


def test_wandb_is_untouched_without_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(tmp_path, range(1, 3))


def test_wandb_is_offline_without_a_key_or_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    closed = {"WANDB_API_KEY": "k", "WANDB_BASE_URL": "http://127.0.0.1:1"}  # nothing listens on port 1
    assert wandb_mode({}) == "offline"
    assert wandb_mode(closed) == "offline"
    assert wandb_mode(closed | {"HTTPS_PROXY": "http://proxy"}) == "online"
    assert wandb_mode(closed | {"WANDB_MODE": "disabled"}) is None
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode({"WANDB_BASE_URL": "http://127.0.0.1:1", "HTTPS_PROXY": "http://proxy"}) == "online"


# ---- console


def test_lines_are_megatrons() -> None:
    record = train_record(10, loss_scale=1024.0, memory_gb=2.5, mfu=0.412, skipped_steps=1, nan_steps=2)
    assert train_line(record) == (
        " iteration       10/     100 | consumed samples:           80 | consumed tokens:         5120"
        " | elapsed time per iteration (ms): 250.0 | learning rate: 1.000E-02 | global batch size:     8"
        " | lm loss: 3.900000E+00 | loss scale: 1024.0 | grad norm: 1.250 | number of skipped iterations:   1"
        " | number of nan iterations:   2 | epoch: 5.000 | tokens per second: 2048 | TFLOPs: 0.04 | MFU: 41.2%"
        " | memory (GB): 2.50 |"
    )
    bare = train_line(train_record(10, grad_norm=None, tflops=None))
    assert "| loss scale: 1.0 |" in bare and "grad norm" not in bare and "TFLOPs" not in bare and "MFU" not in bare
    assert validation_line(validation_record(10)) == (
        " validation loss at iteration 10 | lm loss value: 3.500000E+00 +/- 2.00E-02 | lm loss PPL: 3.311545E+01"
        " | bits per byte: 1.2500 | windows: 120 x 4 noise draws | time (s): 1.5 | best so far"
    )
    test_line = validation_line(validation_record(10, kind="test", stderr=None, num_mc=1, is_best=False))
    assert test_line.startswith(" test loss at iteration 10 | lm loss value: 3.500000E+00 | ")
    assert test_line.endswith("| windows: 120 | time (s): 1.5 |")


ON_A_TERMINAL = """
import json, sys
from megatron.metric_records import from_event
from megatron.metric_sinks import Console
console = Console(100, 4)
for event in json.loads(sys.argv[1]):
    console.progress(event["iteration"])
    console.write(from_event(event), 0.0)
console.log("a remark")
console.close()
"""


def on_a_terminal(stdout: int | None = None, **environment: str) -> str:
    """What a terminal shows of the console; ``stdout`` redirects standard output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))  # rows, columns
    records: list[TrainRecord | ValidationRecord] = [*map(train_record, range(5, 8)), validation_record(7)]
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, json.dumps([to_event(record) for record in records])],
        stdout=slave if stdout is None else stdout,
        stderr=slave,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TQDM_MININTERVAL": "0", **environment},
    )
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65536):
            shown += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(master)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_a_terminal_shows_a_bar_and_no_step_lines() -> None:
    shown = on_a_terminal(TQDM_DESC="MDM")
    assert "MDM:" in shown and "7/100" in shown and "loss 3.93" in shown and "2,048 tokens/s" in shown
    assert "consumed samples" not in shown
    assert "a remark\r\n" in shown and "validation loss at iteration 7" in shown


@pytest.mark.parametrize("told", [True, False])
def test_a_validation_does_not_lengthen_what_is_left(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    """A step a second, and 100 seconds of validation after step 9: at step 10 of 100 there are 90 seconds left. A bar
    that is not told of the validation expects far more.
    """
    now = 1000.0
    monkeypatch.setattr(metric_sinks, "time", types.SimpleNamespace(time=lambda: now))
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    console = metric_sinks.Console(100)
    bar = console._bar
    bar._time, bar.start_t, bar.last_print_t = (lambda: now), now, now
    for step in range(1, 11):
        now += 1
        console.progress(step)
        if step == 9:
            now += 100
            if told:
                console.pause(100)
    left = (100 - 10) / bar.format_dict["rate"]
    console.close()
    if told:
        assert left == pytest.approx(90)
    else:
        assert left > 400


def test_a_terminal_with_redirected_output_shows_the_bar_and_files_the_lines(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as log:
        shown = on_a_terminal(stdout=log.fileno(), TQDM_POSITION="1")
    assert "7/100" in shown and "consumed samples" not in shown
    assert "\n" in shown.split("7/100")[0], "position 1 is the second line"
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split("|")[0].strip() for line in lines] == [
        "iteration        5/     100", "iteration        6/     100", "iteration        7/     100",
        "validation loss at iteration 7", "a remark",
    ]  # fmt: skip


def test_a_disabled_bar_leaves_the_lines() -> None:
    shown = on_a_terminal(TQDM_DISABLE="1")
    assert shown.count("consumed samples") == 3 and "7/100 [" not in shown
