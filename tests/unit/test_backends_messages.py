"""How messages of tensor-parallel ranks go: what ``--tp-comm-backend`` asks for, what stands in its way, what is said.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron import backends
from megatron.distributed import messages
from megatron.distributed.copy_engines import Slots
from megatron.distributed.topology import Topology, single_process_topology
from megatron.errors import UserError
from tests.unit.test_run_metadata import MODEL, run_config

SLOTS = Slots(2, 0, 0, lambda nbytes: pytest.fail("nothing is sent here"))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Slots | str], Topology]:
    """``cut(found)``: a topology with a tensor-parallel group, whose ranks open these slots or cannot, and say why."""

    def pretend(found: Slots | str) -> Topology:
        def opened(topology: Topology, expected: int, timeout: datetime.timedelta) -> Slots | str:
            assert timeout == datetime.timedelta(minutes=7)
            assert expected == 2 * 32 * MODEL["hidden_size"] * 4  # micro-batch, tokens, features, bytes
            return found

        monkeypatch.setattr(backends, "open_slots", opened)
        # What an earlier run of the same process left.
        monkeypatch.setattr(messages, "_SLOTS", {"five": Slots(2, 1, 0, lambda nbytes: pytest.fail("long gone"))})
        return replace(single_process_topology(), tensor_group=SimpleNamespace(group_name="five"))

    return pretend


def config(backend: str, **changes: Any) -> Any:
    return run_config(
        tp_comm_backend=backend, tensor_model_parallel_size=2, distributed_timeout_minutes=7, **changes
    )


@pytest.mark.parametrize("backend", ["auto", "copy"])
def test_copy_engines_where_they_can_be_had(cut: Callable[..., Topology], backend: str) -> None:
    assert backends.open_messages(config(backend), cut(SLOTS)) == ["messages of tensor-parallel ranks: by copy engines"]
    assert messages._SLOTS == {"five": SLOTS}


def test_auto_says_why_not(cut: Callable[..., Topology]) -> None:
    said = "messages of tensor-parallel ranks: collectives (not copy engines: they are far apart)"
    assert backends.open_messages(config("auto"), cut("they are far apart")) == [said]
    assert messages._SLOTS == {}


def test_what_is_asked_for_and_cannot_be_had_ends_the_run(cut: Callable[..., Topology]) -> None:
    with pytest.raises(UserError) as error:
        backends.open_messages(config("copy"), cut("they are far apart"))
    assert str(error.value) == "--tp-comm-backend copy: they are far apart; or use --tp-comm-backend auto"


def test_products_in_fp8_have_none(cut: Callable[..., Topology]) -> None:
    fp8 = config("copy", bf16=True, fp8=True)
    with pytest.raises(UserError, match="copy: products in fp8 have no messages beside them; or"):
        backends.open_messages(fp8, cut(SLOTS))


@pytest.mark.parametrize(("backend", "size"), [("collective", 2), ("auto", 1)])
def test_else_nothing_is_opened_or_said(cut: Callable[..., Topology], backend: str, size: int) -> None:
    config = run_config(tp_comm_backend=backend, tensor_model_parallel_size=size)
    topology = cut(SLOTS)
    assert backends.open_messages(config, topology) == [] and (size == 1 or messages._SLOTS == {})
