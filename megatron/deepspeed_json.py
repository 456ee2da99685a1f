"""The configuration that DeepSpeed gets: the flags, and what a ``--deepspeed_config`` JSON adds to them.

What DeepSpeed 0.19.8 does with each precision and stage, and why this module asks for what it asks:

* ZeRO stage 0 runs as stage 1, which is the same mathematics: stage 0 reports no gradient norm in fp32 and sends bf16
  through an fp16-style optimizer with a loss scale.
* bf16 asks for fp32 gradient accumulation, done as each gradient arrives (``immediate_grad_update``), and for the check
  without which stage 2 and offloading would apply a gradient that is not finite.
* What pipeline stages send is not cut over tensor-parallel ranks as if all had the same: with sequence parallelism each
  has its own part.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.config import RunConfig
from megatron.errors import UserError, one_line

_SECTIONS = (
    "zero_optimization", "bf16", "fp16", "data_types", "pipeline", "activation_checkpointing", "timers", "comms_logger",
    "tensorboard", "wandb", "csv_monitor", "flops_profiler", "aio",
)  # fmt: skip
_SET_BY_FLAGS = ("optimizer", "scheduler", "tensor_parallel", "curriculum_learning", "data_efficiency")


def deepspeed_config(config: RunConfig, data_parallel_size: int, global_batch_size: int) -> dict[str, Any]:
    """Merge the flags with the ``--deepspeed_config`` JSON, which may add settings but not contradict a flag.

    Raises:
        UserError: the file is missing or no JSON object, or one of its values contradicts a flag (both are named).
    """
    user = _read_json(config.parallel.deepspeed_config)
    _check_against_flags(user, config, data_parallel_size)
    micro = config.batch.micro_batch_size
    merged = dict(user)
    merged |= {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": global_batch_size // (micro * data_parallel_size),
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(user, config),
        "pipeline": _pipeline(user, config),
    }
    merged.setdefault("steps_per_print", 10**9)
    # Its timer would wait for the GPU before every micro-batch, and nothing would be ready for the GPU to do then.
    merged.setdefault("timers", {"throughput": {"enabled": False}})
    if config.optimizer.bf16:
        defaults = {"immediate_grad_update": True, "check_grad_overflow": True}
        merged["bf16"] = {**defaults, **user.get("bf16", {}), "enabled": True}
        merged["data_types"] = {"grad_accum_dtype": "fp32", **user.get("data_types", {})}
    if config.optimizer.fp16:
        merged["fp16"] = {"loss_scale": config.optimizer.loss_scale or 0, **user.get("fp16", {}), "enabled": True}
    return merged


@contextlib.contextmanager
def refusals_of(path: str | None) -> Iterator[None]:
    """Name the ``--deepspeed_config`` JSON in what DeepSpeed says against a configuration that has it in it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from_a_check = type(error).__module__.startswith(("pydantic", "deepspeed"))
        if path is None or not (from_a_check or isinstance(error, _REFUSALS)):
            raise
        raise UserError(f"--deepspeed_config {path}: DeepSpeed refuses it ({one_line(error)[:300]})") from error


_REFUSALS = (TypeError, ValueError, KeyError, AttributeError, AssertionError, NotImplementedError, OSError)


def offloads_optimizer(merged: dict[str, Any]) -> bool:
    """Whether a merged configuration keeps the optimizer's state, and steps, on the CPU."""
    return _device(merged["zero_optimization"], "offload_optimizer") == "cpu"


def _check_against_flags(user: dict[str, Any], config: RunConfig, data_parallel_size: int) -> None:
    """Raise UserError where the JSON says otherwise than a flag, or what only flags say."""
    micro, path = config.batch.micro_batch_size, config.parallel.deepspeed_config
    assert config.batch.global_batch_size is not None, "resolve_for_world comes first"
    flags = {
        "train_batch_size": ("--global-batch-size", config.batch.global_batch_size),
        "train_micro_batch_size_per_gpu": ("--micro-batch-size", micro),
        "gradient_clipping": ("--clip-grad", config.optimizer.clip_grad),
        "zero_optimization.stage": ("--zero-stage", config.parallel.zero_stage),
        "bf16.enabled": ("--bf16", config.optimizer.bf16),
        "fp16.enabled": ("--fp16", config.optimizer.fp16),
        "gradient_accumulation_steps": (
            "--global-batch-size",
            config.batch.global_batch_size // (micro * data_parallel_size),
        ),
    }
    for key, (flag, value) in flags.items():
        stated = _lookup(user, key)
        if stated not in (None, "auto") and stated != value:
            raise UserError(f"{path}: {key} is {stated}, but {flag} says {value}: make them equal or drop the key")
    for key in _SET_BY_FLAGS:
        if key in user:
            raise UserError(f"{path}: '{key}' is set by flags here: remove it from the JSON")


def _zero(user: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The section of ZeRO. ``--cpu-optimizer`` is its ``offload_optimizer`` to the CPU."""
    path, stage = config.parallel.deepspeed_config, config.parallel.zero_stage
    zero = {**user.get("zero_optimization", {}), "stage": max(1, stage)}
    if zero.get("round_robin_gradients"):
        # It stores the flat vectors in another order than it says: parameters would be read from others' places.
        raise UserError(
            f"{path}: zero_optimization.round_robin_gradients: checkpoints of it cannot be read under another split, "
            "by evaluation or by conversion: remove it"
        )
    for key in ("offload_optimizer", "offload_param"):
        device = _device(zero, key)
        if device not in (None, "none", "cpu"):
            raise UserError(f"{path}: zero_optimization.{key}.device is {device}: only cpu and none are supported")
    if _device(zero, "offload_param") == "cpu" and stage != 3:
        raise UserError(
            f"{path}: zero_optimization.offload_param needs --zero-stage 3, not {stage}: change the stage, or offload "
            "the optimizer alone with --cpu-optimizer"
        )
    if config.parallel.cpu_optimizer:
        if _device(zero, "offload_optimizer") == "none":
            raise UserError(
                f"{path}: zero_optimization.offload_optimizer.device is none, but --cpu-optimizer is given: "
                "drop one of them"
            )
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True, **zero.get("offload_optimizer", {})}
    stages, half = config.parallel.pipeline_model_parallel_size, config.optimizer.half_precision
    if _device(zero, "offload_optimizer") == "cpu" and stages > 1 and half:
        # Seen: bf16 gradients of all stages but the last are not accumulated, and norms are wrong.
        raise UserError(
            "--cpu-optimizer (or offload_optimizer in the JSON) does not go with --pipeline-model-parallel-size "
            f"{stages} in half precision: use --tensor-model-parallel-size instead, or leave the optimizer on the GPU"
        )
    return zero


def _pipeline(user: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    pipeline = {"pipe_partitioned": False, "grad_partitioned": False, **user.get("pipeline", {})}
    if config.parallel.sequence_parallel and (pipeline["pipe_partitioned"] or pipeline["grad_partitioned"]):
        raise UserError(
            f"{config.parallel.deepspeed_config}: pipeline.pipe_partitioned and grad_partitioned do not go with "
            "--sequence-parallel, which sends each rank's own part: drop them"
        )
    return pipeline


def _device(zero: dict[str, Any], key: str) -> str | None:
    section = zero.get(key)
    return section.get("device") if isinstance(section, dict) else None


def _read_json(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed_config {path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed_config {path}: not valid JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {path}: must hold one JSON object")
    for key in _SECTIONS:
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"--deepspeed_config {path}: {key} must be an object, not {json.dumps(content[key])[:40]}")
    steps = content.get("steps_per_print", 1)
    if not (isinstance(steps, int) and steps >= 1):  # read in the first step only
        raise UserError(f"--deepspeed_config {path}: steps_per_print must be a whole number, at least 1")
    return content


def _lookup(tree: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree
