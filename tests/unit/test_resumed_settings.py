"""A checkpoint that DeepSpeed loads brings its state along, not the settings of the run that wrote it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megatron.deepspeed_state import settings_kept
from megatron.distributed.topology import Topology
from megatron.engine import Engine
from tests.unit.test_engine import CONFIG, MICRO_BATCHES, build, build_adam, make_batches

BEFORE: dict[str, Any] = {"weight_decay": 0.1, "clip_grad": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.95}
AFTER: dict[str, Any] = {"weight_decay": 5.0, "clip_grad": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.5, "adam_eps": 1e-3}


def build_with(
    topology: Topology, stage: int, bf16: bool, settings: dict[str, Any], path: str | None = None
) -> Engine:
    """An engine that has made no step."""
    optimizer = dataclasses.replace(CONFIG.optimizer, bf16=bf16, **settings)
    parallel = dataclasses.replace(CONFIG.parallel, zero_stage=stage, deepspeed_config=path)
    return build(topology, dataclasses.replace(CONFIG, optimizer=optimizer, parallel=parallel))


def train(engine: Engine, first: int, steps: int) -> None:
    """Steps ``first`` (from 0) and following."""
    batches = iter(make_batches(first + steps)[first * MICRO_BATCHES :])
    for _ in range(steps):
        assert engine.train_batch(batches, MICRO_BATCHES, 1e-2).applied


def weights(engine: Engine) -> list[torch.Tensor]:
    """Copies of them."""
    return [weight.detach().clone() for weight in engine.model.named_weights().values()]


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, True), (2, True), (2, False)])
def test_the_flags_of_the_run_that_goes_on_hold(topology: Topology, tmp_path: Path, stage: int, bf16: bool) -> None:
    """To the bit what a run does whose options are changed by hand under way."""
    engine = build_with(topology, stage, bf16, BEFORE)
    train(engine, 0, 2)
    engine.save(tmp_path, "global_step2")
    resumed = build_with(topology, stage, bf16, AFTER)
    resumed.load(tmp_path, "global_step2")
    for group in engine._engine.optimizer.param_groups:
        group.update(betas=(0.8, 0.5), eps=1e-3)
        if group["weight_decay"]:
            group["weight_decay"] = 5.0
    engine._engine.optimizer.clip_grad = 0.01
    same = build_with(topology, stage, bf16, BEFORE)
    same.load(tmp_path, "global_step2")
    for one in (engine, resumed, same):
        train(one, 2, 2)
    assert all(torch.equal(one, other) for one, other in zip(weights(resumed), weights(engine), strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(weights(same), weights(engine), strict=True))


@pytest.mark.parametrize("fused_first", [False, True])
def test_a_run_goes_on_on_another_kind_of_device(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused_first: bool
) -> None:
    """Adam is fused on GPUs: PyTorch has that for CPUs, too."""
    results = []
    for fused in (fused_first, not fused_first):
        build_adam(monkeypatch, fused)
        engine = build_with(topology, 1, True, BEFORE)
        if fused is fused_first:
            train(engine, 0, 2)
            engine.save(tmp_path, "global_step2")
        else:
            engine.load(tmp_path, "global_step2")
        assert [group["fused"] for group in engine._engine.optimizer.param_groups] == [fused] * 2
        train(engine, 2, 1)
        results.append(weights(engine))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


def scaled_by(scaler: Any) -> Any:
    """What :func:`settings_kept` sees of DeepSpeed's optimizer in fp16."""
    adam = SimpleNamespace(param_groups=[], state={})
    return SimpleNamespace(optimizer=adam, loss_scaler=scaler, dynamic_loss_scale=scaler.dynamic)


def dynamic(scale: float, window: int) -> DynamicLossScaler:
    return DynamicLossScaler(scale, window, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)


def test_a_loss_scale_goes_on_if_it_is_of_the_same_kind() -> None:
    ours, saved = dynamic(2.0**16, 500), dynamic(2.0**9, 1000)
    saved.cur_iter, saved.last_overflow_iter = 70, 60
    optimizer = scaled_by(ours)
    with settings_kept(optimizer):
        optimizer.loss_scaler = saved
    assert optimizer.loss_scaler is ours
    assert (ours.cur_scale, ours.cur_iter, ours.last_overflow_iter, ours.scale_window) == (2.0**9, 70, 60, 500)


@pytest.mark.parametrize(("own", "saved"), [(LossScaler(8.0), LossScaler(64.0)), (LossScaler(8.0), dynamic(2.0**9, 9)),
                                            (dynamic(2.0**16, 9), LossScaler(64.0))])  # fmt: skip
def test_a_loss_scale_of_another_kind_begins_anew(own: Any, saved: Any) -> None:
    optimizer = scaled_by(own)
    with settings_kept(optimizer):
        optimizer.loss_scaler, optimizer.dynamic_loss_scale = saved, saved.dynamic
    assert optimizer.loss_scaler is own and optimizer.dynamic_loss_scale is own.dynamic
    assert own.cur_scale in (8.0, 2.0**16)


def test_gradients_that_outlive_a_pass_are_nothing_for_recordings(topology: Topology, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"bf16": {"immediate_grad_update": False}}), encoding="utf-8")
    assert build_with(topology, 1, True, BEFORE).sums_in_place
    assert not build_with(topology, 1, True, BEFORE, str(path)).sums_in_place
