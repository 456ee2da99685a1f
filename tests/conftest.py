"""What every test shares: the environment of a CPU run, the skipping of GPU tests, paths and golden files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before torch is imported: tests run side by side, so one thread each, also in the processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from megatron.config import ParallelConfig
from megatron.distributed.topology import Topology

REPOSITORY = Path(__file__).resolve().parents[1]
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The same examples on every run and every machine, and no deadline: a test never fails because a machine is busy.
settings.register_profile("repository", deadline=None, derandomize=True, database=None)
settings.load_profile("repository")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-goldens``."""
    parser.addoption("--update-goldens", action="store_true", help="write the golden files anew instead of comparing")


def pytest_configure() -> None:
    """Let interrupts reach the programs that tests start and interrupt: a shell's background jobs ignore them."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, and put the files with slow tests first so that no worker ends late."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)  # a stable sort: the order inside a file stays


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's ``shared/`` folder beside the repository: data and fixtures that are not committed here."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs {path}")
    return path


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """This process alone, on its GPU if it has one, in a process group of one, as DeepSpeed wants."""
    from megatron.initialize import initialize, shut_down

    yield initialize(ParallelConfig())
    shut_down()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Sequence[float], float], None]:
    """``golden(name, values, rel)`` compares with ``golden/<name>.json`` beside the test file, within ``rel`` each.

    With ``--update-goldens`` it writes that file instead. A commit that changes one says why the numbers changed.
    """
    update = request.config.getoption("--update-goldens")

    def check(name: str, values: Sequence[float], rel: float) -> None:
        path = request.path.parent / "golden" / f"{name}.json"
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps([float(v) for v in values], indent=1) + "\n", encoding="utf-8")
        assert path.is_file(), f"{path} is missing: run this test once with --update-goldens"
        assert list(values) == pytest.approx(json.loads(path.read_text(encoding="utf-8")), rel=rel)

    return check
