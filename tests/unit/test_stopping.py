"""Stopping: every reason, one answer for all ranks, signals in real processes, the kill switch removed once obeyed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from waiting import wait_until

from megatron.config import CheckpointConfig
from megatron.distributed.topology import build_topology, single_process_topology
from megatron.errors import UserError
from megatron.stopping import StopController

ALONE = single_process_topology()


def controller(clock: Callable[[], float] = lambda: 0.0, **settings: Any) -> StopController:
    """A controller of a single process whose clock started at 0."""
    return StopController(CheckpointConfig(**settings), ALONE, start_time=0.0, clock=clock)


def in_child(target: Callable[..., None], *arguments: Any) -> Any:
    """Start ``target`` in a forked process, whose signals are its own."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_nothing_asked_for_never_stops() -> None:
    assert [controller().should_stop(i) for i in range(1, 50)] == [None] * 49


def test_exit_interval_stops_at_its_multiples() -> None:
    stop = controller(exit_interval=4)
    assert [i for i in range(1, 13) if stop.should_stop(i)] == [4, 8, 12]
    assert stop.should_stop(4) == "--exit-interval 4 reached"


def test_exit_duration_counts_from_the_start_of_the_process() -> None:
    now = [0.0]
    stop = controller(clock=lambda: now[0], exit_duration_in_mins=1.5)
    now[0] = 89.9
    assert stop.should_stop(1) is None
    now[0] = 90.0
    assert stop.should_stop(2) == "--exit-duration-in-mins 1.5 reached"


def test_kill_switch_stops_once_and_is_removed(tmp_path: Path) -> None:
    switch = tmp_path / "kill"
    stop = controller(kill_switch_file=str(switch))
    assert stop.should_stop(1) is None
    switch.touch()
    assert stop.should_stop(2) == f"found --kill-switch-file {switch}"
    assert not switch.exists()
    assert controller(kill_switch_file=str(switch)).should_stop(1) is None, "the requeued job goes on"


def test_kill_switch_present_at_start_is_obeyed_at_the_first_boundary(tmp_path: Path) -> None:
    switch = tmp_path / "kill"
    switch.touch()
    with controller(kill_switch_file=str(switch)) as stop:
        assert switch.exists(), "nothing is obeyed before a step is done"
        assert stop.should_stop(1) is not None
    assert not switch.exists()


def test_what_has_content_is_no_kill_switch(tmp_path: Path) -> None:
    """It would be removed."""
    path = tmp_path / "tokens.bin"
    path.write_bytes(b"work of days")
    for name in (path, tmp_path):
        with pytest.raises(UserError, match=r"--kill-switch-file .* is there and no empty file"):
            controller(kill_switch_file=str(name)).__enter__()
    assert path.read_bytes() == b"work of days"


def test_kill_switch_that_cannot_be_removed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert controller(kill_switch_file=str(tmp_path)).should_stop(1) is not None  # a directory: unlink fails
    assert f"warning: --kill-switch-file {tmp_path} cannot be removed" in capsys.readouterr().out


def test_handlers_are_put_back_and_absent_without_the_flag() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with controller():
        assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(KeyError), controller(exit_signal_handler=True):
        assert all(signal.getsignal(number) not in before for number in numbers)
        raise KeyError
    assert [signal.getsignal(number) for number in numbers] == before


def _steps_until_stop(ready: Path, result: Path) -> None:
    with controller(exit_signal_handler=True) as stop:
        ready.touch()
        for iteration in range(1, 10_000):
            time.sleep(0.002)
            reason = stop.should_stop(iteration)
            if reason is not None:
                result.write_text(reason)
                os._exit(0)
    os._exit(3)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_stops_at_a_step_boundary_with_exit_code_0(tmp_path: Path, name: str) -> None:
    process = in_child(_steps_until_stop, tmp_path / "ready", tmp_path / "result")
    wait_until((tmp_path / "ready").exists, 20)
    os.kill(process.pid, getattr(signal, name))
    process.join(20)
    assert process.exitcode == 0
    assert (tmp_path / "result").read_text() == f"received {name}"


def _saves_slowly(ready: Path, pressed: Path, echoed: Path, later: Path) -> None:
    with controller(exit_signal_handler=True, clock=lambda: 2.0 if later.exists() else 0.5) as stop:
        ready.touch()
        while stop.should_stop(1) is None:
            time.sleep(0.002)
        signal.signal(signal.SIGUSR1, lambda number, frame: echoed.touch())  # delivered after the signals before it
        pressed.touch()
        time.sleep(60)  # the save that the user does not want to wait for
    os._exit(3)


def test_an_echo_of_ctrl_c_is_the_same_keystroke_and_a_second_one_kills(tmp_path: Path) -> None:
    ready, pressed, echoed, later = (tmp_path / name for name in ("ready", "pressed", "echoed", "later"))
    process = in_child(_saves_slowly, ready, pressed, echoed, later)
    wait_until(ready.exists, 20)
    os.kill(process.pid, signal.SIGINT)
    wait_until(pressed.exists, 20)
    os.kill(process.pid, signal.SIGINT)  # what torchrun passes on at once
    os.kill(process.pid, signal.SIGUSR1)
    wait_until(echoed.exists, 20)
    assert process.is_alive()
    later.touch()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT


def _rank(rank: int, folder: Path, settings: dict[str, Any]) -> None:
    """Steps until the ranks agree to stop; rank 1 alone raises SIGUSR1 in itself after step 3 if a file asks for it."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    topology = build_topology(1, 1, torch.device("cpu"))
    # Rank 1's clock is far ahead: only rank 0's counts.
    with StopController(CheckpointConfig(**settings), topology, 0.0, clock=lambda: 1e9 * rank) as stop:
        for iteration in range(1, 7):
            if iteration == 3 and rank == 1 and (folder / "signal").exists():
                os.kill(os.getpid(), signal.SIGUSR1)
            if iteration == 4 and rank == 0 and (folder / "switch").exists():
                (folder / "switch").rename(folder / "kill")
            reason = stop.should_stop(iteration)
            if reason is not None:
                break
    (folder / f"rank{rank}").write_text(f"{iteration} {reason}")
    dist.destroy_process_group()
    os._exit(0)


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        (("signal",), {"exit_signal_handler": True}, "3 received SIGUSR1"),
        (("switch",), {}, "4 found --kill-switch-file {folder}/kill"),
        ((), {"exit_duration_in_mins": 1.0}, "6 None"),
        (("signal",), {"exit_signal_handler": True, "exit_interval": 3}, "3 received SIGUSR1"),
    ],
)
def test_two_ranks_stop_at_the_same_step(
    tmp_path: Path, files: tuple[str, ...], settings: dict[str, Any], expected: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    settings = settings | {"kill_switch_file": str(tmp_path / "kill")}
    ranks = [in_child(_rank, rank, tmp_path, settings) for rank in range(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    answers = {(tmp_path / f"rank{rank}").read_text() for rank in range(2)}
    assert answers == {expected.format(folder=tmp_path)}
    assert not (tmp_path / "kill").exists()
