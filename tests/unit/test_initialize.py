"""The launcher's environment: wrong values are named, before any process waits for another."""

from __future__ import annotations

import pytest

from megatron.config import ParallelConfig
from megatron.errors import UserError
from megatron.initialize import initialize

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("name", "value", "words"), [
    ("WORLD_SIZE", "abc", "WORLD_SIZE=abc in the environment: it must be a whole number from 1"),
    ("WORLD_SIZE", "", "WORLD_SIZE= in the environment"),
    ("WORLD_SIZE", "0", "WORLD_SIZE=0 in the environment"),
    ("RANK", "x", "RANK=x in the environment"),
    ("RANK", "5", "RANK is 5, and WORLD_SIZE 2: ranks are 0 to 1"),
    ("MASTER_PORT", "abc", "MASTER_PORT=abc in the environment: it must be a whole number from 1 to 65535"),
    ("MASTER_PORT", "65536", "MASTER_PORT=65536 in the environment"),
])  # fmt: skip
def test_wrong_values_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    for known, usual in (LAUNCHED | {name: value}).items():
        monkeypatch.setenv(known, usual)
    with pytest.raises(UserError, match=words):
        initialize(ParallelConfig(distributed_backend="gloo"))
