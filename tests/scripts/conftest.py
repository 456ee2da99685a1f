"""Dry runs, and scripts run in a working copy of the repository, so that they write nothing into the real one."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from working_copy import make_working_copy, script_environment

from megatron import budget, budget_cli
from megatron.arguments import parse_arguments
from megatron.config import RunConfig
from megatron.errors import UserError


@dataclass(frozen=True)
class DryRun:
    """What a script prints under ``DRY_RUN=1``: ``launch`` up to the entry point, ``arguments`` after it."""

    deepspeed: dict[str, Any]
    launch: list[str]
    entry: str
    arguments: list[str]

    def value(self, flag: str) -> str:
        """The value after the last ``flag``."""
        return self.arguments[len(self.arguments) - self.arguments[::-1].index(flag)]

    @property
    def variant(self) -> str:
        """The run's name."""
        return Path(self.value("--save")).name.removeprefix("checkpoints_")


def read_dry_run(text: str) -> DryRun:
    """Take the output of a dry run apart."""
    deepspeed, end = json.JSONDecoder().raw_decode(text)
    words = text[end:].removeprefix("\n").removesuffix("\n").split("\n")
    entry = next(i for i, word in enumerate(words) if re.fullmatch(r"pretrain_\w+\.py", word))
    return DryRun(deepspeed, words[:entry], words[entry], words[entry + 1 :])


def parse(run: DryRun) -> RunConfig:
    """Parse the arguments with the real parser, without the flags that it says are not built yet."""
    objective: Literal["ar", "mdm"] = "mdm" if "diff" in run.entry else "ar"
    arguments = list(run.arguments)
    while True:
        try:
            return parse_arguments(objective, arguments)
        except UserError as error:
            flag = re.match(r"(--[\w-]+).* is not built yet", str(error))
            if flag is None:
                raise
            at = arguments.index(flag[1])
            valued = at + 1 < len(arguments) and not arguments[at + 1].startswith("--")
            del arguments[at : at + 1 + valued]


class Sandbox:
    """A directory that looks like the repository root. ``path`` has a space in its name.

    ``answers`` holds a program "python" that knows what ``megatron.budget`` says of every row and budget: many dry runs
    start no interpreter each. A single :meth:`dry_run` uses the real one.
    """

    def __init__(self, path: Path, repository: Path, answers: Path) -> None:
        self.path = path
        self.answers = answers
        make_working_copy(path, repository)

    def environment(self, settings: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment without launchers' variables, with this Python, and ``settings``."""
        return script_environment(self.path, settings)

    def bash(self, *command: str, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run ``bash command...`` here (or in ``cwd``) with the given environment variables."""
        return subprocess.run(
            ["bash", *command],
            cwd=cwd or self.path,
            env=self.environment(settings),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def dry_run(self, script: str, *arguments: str, **settings: str) -> DryRun:
        """Dry-run ``examples_training/<script>.sh`` or a path."""
        file = script if script.endswith(".sh") else f"examples_training/{script}.sh"
        result = self.bash(file, *arguments, **{"DRY_RUN": "1", **settings})
        assert result.returncode == 0, result.stderr
        return read_dry_run(result.stdout)

    def dry_runs(self, script: str, points: Sequence[Sequence[str]]) -> Iterator[DryRun]:
        """Dry-run a script with each list of NAME=VALUE, all in one bash process."""
        lines = [f"(source examples_training/{script}.sh {' '.join(point)}) || exit; printf '\\f'" for point in points]
        result = self.bash("-c", "\n".join(lines), DRY_RUN="1", PYTHON=str(self.answers / "python"))
        assert result.returncode == 0, result.stderr
        outputs = result.stdout.split("\f")[:-1]
        assert len(outputs) == len(points)
        yield from map(read_dry_run, outputs)

    def edited(self, script: str, edits: Mapping[str, str]) -> Path:
        """A copy of a script with lines ``NAME=...`` replaced, as a user edits it."""
        text = (self.path / f"examples_training/{script}.sh").read_text(encoding="utf-8")
        for name, value in edits.items():
            text, count = re.subn(rf"(?m)^{name}=.*$", lambda _, line=f"{name}={value}": line, text)
            assert count == 1, (script, name)
        copy = self.path / f"edited_{script.replace('/', '_')}.sh"
        copy.write_text(text, encoding="utf-8")
        return copy


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :class:`Sandbox`."""
    folder = tmp_path_factory.mktemp("answers")
    for row in budget.read_model_table():
        for factor in ("6", "10", "30", "100"):
            question = ["samples", "--flops-factor", factor, "--model", row, "--seq-length", "2048"]
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                assert budget_cli.main(question) == 0
            (folder / " ".join(["-m", "megatron.budget", *question])).write_text(output.getvalue(), encoding="utf-8")
    program = folder / "python"
    program.write_text('#!/bin/sh\nexec cat "${0%/*}/$*"\n', encoding="utf-8")
    program.chmod(0o755)
    return folder


@pytest.fixture
def sandbox(tmp_path: Path, repository: Path, answers: Path) -> Sandbox:
    """A fresh working copy."""
    return Sandbox(tmp_path / "working copy", repository, answers)


@pytest.fixture(scope="session")
def parsed() -> Callable[[DryRun], RunConfig]:
    """:func:`parse`, for tests that cannot import this file by name."""
    return parse


@pytest.fixture(scope="session")
def script_names(repository: Path) -> list[str]:
    """``arm/example_training`` and so on, evaluation scripts left out."""
    return experiment_scripts(repository)


def experiment_scripts(repository: Path) -> list[str]:
    """Every experiment script of both families, without its ending."""
    folder = repository / "examples_training"
    names = [str(path.relative_to(folder).with_suffix("")) for path in sorted(folder.glob("*/example_*.sh"))]
    return [name for name in names if "evaluation" not in name and "downstream" not in name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a script for tests with an argument ``script``."""
    if "script" in metafunc.fixturenames:
        metafunc.parametrize("script", experiment_scripts(Path(__file__).resolve().parents[2]))
