"""Worker processes: order, bounded reading ahead, and what happens when one fails.

The work is a method of the items (``operator.methodcaller``), which needs no code of the tests in the processes.
"""

from __future__ import annotations

import operator
import os
import signal
from collections.abc import Iterator

import pytest
from waiting import wait_until

from megatron.errors import UserError
from tools.ordered_workers import IN_FLIGHT, OrderedWorkers, WorkerError, single_threaded_tokenizers


def test_order_and_bounded_reading_ahead() -> None:
    """Results come in the items' order, and no more than a few items per worker are taken before they are wanted."""
    taken = 0

    def items() -> Iterator[str]:
        nonlocal taken
        for i in range(300):
            taken += 1
            yield f"item {i}"

    workers: OrderedWorkers[str, str]
    with OrderedWorkers(operator.methodcaller, ("upper",), 2) as workers:
        for i, result in enumerate(workers.map(items())):
            assert result == f"ITEM {i}"
            assert taken <= i + 2 * IN_FLIGHT * 2 + 1
    assert taken == 300


def test_large_items_and_results_do_not_block_each_other() -> None:
    """Pipes hold 64 KiB: both ends sending at once would stand still for ever."""
    workers: OrderedWorkers[bytes, bytes]
    with OrderedWorkers(operator.methodcaller, ("swapcase",), 2) as workers:
        for i, result in enumerate(workers.map(bytes([65 + i]) * 3_000_000 for i in range(8))):
            assert result == bytes([97 + i]) * 3_000_000


def test_no_items() -> None:
    workers: OrderedWorkers[str, str]
    with OrderedWorkers(operator.methodcaller, ("upper",), 2) as workers:
        assert list(workers.map([])) == []


def test_an_error_of_the_source_comes_in_its_turn() -> None:
    """What lies before a damaged place is delivered, whatever the number of workers, so limits act the same."""

    def items() -> Iterator[str]:
        yield from "abc"
        raise UserError("damaged")

    workers: OrderedWorkers[str, str]
    with OrderedWorkers(operator.methodcaller, ("upper",), 3) as workers:
        results = workers.map(items())
        assert [next(results) for _ in range(3)] == ["A", "B", "C"]
        with pytest.raises(UserError, match="damaged"):
            next(results)


def test_a_failing_function() -> None:
    workers: OrderedWorkers[object, object]
    message = r"a worker process failed:\n(.*\n)+AttributeError: 'int'"
    with OrderedWorkers(operator.methodcaller, ("upper",), 1) as workers, pytest.raises(WorkerError, match=message):
        list(workers.map([3]))
    with OrderedWorkers(operator.itemgetter, (), 1) as workers, pytest.raises(WorkerError, match="TypeError"):
        list(workers.map([3]))


def test_a_worker_that_is_killed() -> None:
    workers: OrderedWorkers[str, str]
    with OrderedWorkers(operator.methodcaller, ("upper",), 2) as workers:

        def items() -> Iterator[str]:
            for i in range(1000):
                if i == 20:
                    process = workers._workers[1].process
                    assert process.pid is not None
                    os.kill(process.pid, signal.SIGKILL)
                yield "x"

        with pytest.raises(WorkerError, match=r"was killed \(out of memory\?\)"):
            list(workers.map(items()))


def test_no_process_is_left() -> None:
    workers: OrderedWorkers[str, str]
    with OrderedWorkers(operator.methodcaller, ("upper",), 2) as workers:
        next(workers.map(iter(lambda: "x", None)))  # an endless source, left in the middle
        processes = [worker.process for worker in workers._workers]
    wait_until(lambda: not any(process.is_alive() for process in processes), 30)


def test_single_threaded_tokenizers_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with single_threaded_tokenizers():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with single_threaded_tokenizers():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
