"""What DeepSpeed is told: flags, what a JSON may add to them, and what it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TokenizerConfig,
)
from megatron.deepspeed_json import deepspeed_config, offloads_optimizer
from megatron.errors import UserError


def config(parallel: dict[str, Any], **optimizer: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=64),
        batch=BatchConfig(micro_batch_size=2, global_batch_size=16, train_samples=800, seq_length=64),
        tokenizer=TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model="t.json"),
        optimizer=OptimizerConfig(lr=1e-3, **optimizer),
        data=DataConfig(train_data_path=("a",)),
        parallel=ParallelConfig(**parallel),
    )


def merged(tmp_path: Path, content: Any, parallel: dict[str, Any] | None = None, **optimizer: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return deepspeed_config(config((parallel or {}) | {"deepspeed_config": str(path)}, **optimizer), 4, 16)


@pytest.mark.parametrize(("asked", "run"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_stage_zero_runs_as_one(asked: int, run: int) -> None:
    found = deepspeed_config(config({"zero_stage": asked}), data_parallel_size=4, global_batch_size=8)
    assert found["zero_optimization"] == {"stage": run}
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (8, 1)
    assert not offloads_optimizer(found)


def test_json_adds_settings_and_keeps_its_own(tmp_path: Path) -> None:
    added = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "bf16": {"enabled": True}, "comms_logger": {},
        "timers": {"throughput": {"synchronized": False}},
    }  # fmt: skip
    assert merged(tmp_path, {})["timers"] == {"throughput": {"enabled": False}}
    found = merged(tmp_path, added | {"train_batch_size": "auto", "steps_per_print": 7}, {"zero_stage": 2}, bf16=True)
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert found["timers"] == added["timers"]
    assert found["comms_logger"] == {} and found["steps_per_print"] == 7 and found["train_batch_size"] == 16
    assert found["bf16"] == {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}


def test_cpu_optimizer_is_offloading(tmp_path: Path) -> None:
    alone = deepspeed_config(config({"cpu_optimizer": True}), 1, 16)
    assert alone["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    by_json = merged(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    pageable = {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}
    both = merged(tmp_path, pageable, {"cpu_optimizer": True})
    assert both["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert all(map(offloads_optimizer, (alone, by_json, both)))


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


CPU, NONE = {"device": "cpu"}, {"device": "none"}
# (JSON, parallel flags, optimizer flags, what the message names)
REFUSED: list[tuple[Any, dict[str, Any], dict[str, Any], list[str]]] = [
    ("{", {}, {}, ["line 1"]),
    ("[]", {}, {}, ["one JSON object"]),
    ({"train_batch_size": 8}, {}, {}, ["train_batch_size is 8", "--global-batch-size says 16"]),
    ({"gradient_clipping": 2.0}, {}, {}, ["--clip-grad"]),
    (zero(stage=2), {}, {}, ["zero_optimization.stage is 2", "--zero-stage says 0"]),
    ({"bf16": {"enabled": True}}, {}, {}, ["--bf16"]),
    ({"optimizer": {"type": "Adam"}}, {}, {}, ["'optimizer'"]),
    (zero(offload_param=CPU), {"zero_stage": 2}, {}, ["offload_param", "--zero-stage 3", "--cpu-optimizer"]),
    (zero(offload_optimizer={"device": "nvme"}), {}, {}, ["offload_optimizer.device is nvme"]),
    (zero(offload_optimizer=NONE), {"cpu_optimizer": True}, {}, ["--cpu-optimizer"]),
    (
        {},
        {"cpu_optimizer": True, "pipeline_model_parallel_size": 2},
        {"bf16": True},
        ["--cpu-optimizer", "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size"],
    ),
    (zero(offload_optimizer=CPU), {"pipeline_model_parallel_size": 2}, {"fp16": True}, ["offload_optimizer"]),
    (
        {"pipeline": {"pipe_partitioned": True}},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {},
        ["pipe_partitioned", "--sequence-parallel"],
    ),
]


@pytest.mark.parametrize(("content", "parallel", "optimizer", "named"), REFUSED, ids=range(len(REFUSED)))
def test_contradictions_are_refused_by_name(
    tmp_path: Path, content: Any, parallel: dict[str, Any], optimizer: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        merged(tmp_path, content, parallel, **optimizer)
    message = str(caught.value)
    assert "\n" not in message
    for name in named:
        assert name in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        deepspeed_config(config({"deepspeed_config": str(tmp_path / "absent.json")}), 1, 16)


def test_an_order_that_checkpoints_do_not_tell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ds\.json: zero_optimization\.round_robin_gradients: .* remove it$"):
        merged(tmp_path, {"zero_optimization": {"round_robin_gradients": True}}, {"zero_stage": 2})
    assert merged(tmp_path, {"zero_optimization": {"round_robin_gradients": False}}, {"zero_stage": 2})
