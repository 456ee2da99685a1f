"""Tables of runs: which losses count, what is a bound, and which do not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.report import load_run, main, remarks, table


def start(**changes: Any) -> dict[str, Any]:
    fields = {
        "kind": "meta", "event": "start", "iteration": 0, "objective": "mdm", "parameters": 1000, "weight_decay": 0.1,
        "tokens_per_epoch": 5000, "valid_windows": "abc", "loss_conditions": [],
    }
    return fields | changes


def valid(iteration: int, loss: float, **changes: Any) -> dict[str, Any]:
    fields = {
        "kind": "valid", "iteration": iteration, "loss": loss, "stderr": 0.5, "epoch": iteration / 10, "windows": 12
    }
    return fields | changes


def directory(tmp_path: Path, name: str, *events: dict[str, Any]) -> str:
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(tmp_path / name)


def test_what_skip_train_measured_is_not_a_point_of_the_run(tmp_path: Path) -> None:
    """It has no training data, other windows perhaps, and stands in the same file."""
    measured = [start(tokens_per_epoch=0, valid_windows="few"), valid(30, 2.0, epoch=0.0, windows=4)]
    run = load_run(directory(tmp_path, "run", start(), valid(10, 3.0), valid(20, 2.5), valid(30, 2.75), *measured))
    assert table([run])[1] == (
        "run", "MDM", "1,000", "5,000", "3.0", "0.1", "<= 2.500 +/- 0.500", "2.0", "<= 2.750 +/- 0.500"
    )  # fmt: skip


def test_losses_of_other_windows_than_the_last_do_not_count(tmp_path: Path) -> None:
    again = start(valid_windows="more", iteration=20)
    path = directory(tmp_path, "run", start(), valid(10, 1.0), valid(20, 1.5), again, valid(30, 2.0), valid(40, 1.9))
    run = load_run(path)
    assert [event["loss"] for event in run.valid] == [2.0, 1.9] and run.best["iteration"] == 40


def test_one_window_has_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory(tmp_path, "run", start(objective="ar"), valid(10, 3.0, stderr=None), valid(20, 2.5, stderr=None))
    assert main([path, "--output", str(tmp_path / "picture.png")]) == 0
    assert "2.500  " in capsys.readouterr().out and (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize(("output", "message"), [
    ("", "--output is empty"), ("deep", "--output deep: is a directory"), ("/proc/x/y.png", "/proc/x/y.png: cannot be"),
    ("x.foo", "--output x.foo: end its name in .png, .pdf, .svg"), ("x", "--output x: end its name in"),
    ("run/metrics.jsonl/y.png", "y.png: cannot be written: Not a directory"),
])  # fmt: skip
def test_an_impossible_output_is_refused_before_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    path = directory(tmp_path, "run", start(), valid(10, 3.0), valid(20, 2.5))
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main([path, "--output", output]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("error: --output") and said.err.count("\n") == 1
    assert said.out == "" and sorted(file.name for file in tmp_path.iterdir()) == ["deep", "run"]


def test_a_disk_that_refuses_the_picture_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory(tmp_path, "run", start(), valid(10, 3.0), valid(20, 2.5))

    def full(runs: object, picture: Path) -> None:
        raise OSError(28, "No space left on device", str(picture))

    monkeypatch.setattr("tools.report.plot", full)
    assert main([path, "--output", str(tmp_path / "a" / "b.PDF")]) == 2
    said = capsys.readouterr()
    assert said.err == f"error: --output {tmp_path}/a/b.PDF: cannot be written: No space left on device\n"
    assert "2.500" in said.out


def test_it_says_what_does_not_compare(tmp_path: Path) -> None:
    runs = {
        "a": load_run(directory(tmp_path, "a", start(objective="ar"), valid(10, 3.0))),
        "b": load_run(directory(tmp_path, "b", start(), valid(10, 3.0))),
        "text": load_run(directory(tmp_path, "text", start(valid_windows="x"), valid(10, 3.0))),
        "many": load_run(directory(tmp_path, "many", start(valid_windows="y"), valid(10, 3.0, windows=17))),
        "old": load_run(directory(tmp_path, "old", start(valid_windows=None), valid(10, 3.0))),
        "flag": load_run(directory(tmp_path, "flag", start(loss_conditions=["--eod-mask-loss"]), valid(10, 3.0))),
    }
    bound = "'<=': an MDM loss is an upper bound (negative ELBO) of its true loss."
    same = "Losses are nats per token on the same windows."
    assert remarks([runs["a"]]) == [same] and remarks([runs["a"], runs["b"]]) == [same, bound]
    (said, *_) = remarks([runs["a"], runs["text"]])
    assert said == "NOT THE SAME WINDOWS, so losses do not compare (windows: a 12, text 12)."
    assert remarks([runs["b"], runs["many"]])[0].startswith("NOT THE SAME WINDOWS")
    assert remarks([runs["old"], runs["many"]])[0].startswith("NOT THE SAME WINDOWS")
    assert "do not say whether" in remarks([runs["a"], runs["old"]])[0]
    last = remarks([runs["flag"]])[-1]
    assert last.startswith("flag: not the loss of the text alone (--eod-mask-loss)")
    assert table([runs["flag"]])[1][6] == "3.000 +/- 0.500", "no bound"
