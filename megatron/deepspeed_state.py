"""Set a parameter's weight and Adam's moments in DeepSpeed's optimizers, wherever a ZeRO stage keeps this rank's share.

How a checkpoint is loaded under another split than it was saved with: values come whole and by name, and every rank
writes what it has of them. And how one is loaded by DeepSpeed itself: with its state, not with its run's settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class WholeParameter(Protocol):
    """See :func:`megatron.engine.whole_parameter`."""

    def __call__(self, parameter: nn.Parameter) -> AbstractContextManager[bool]:
        """Make it whole; True where its value is to be set."""


@dataclass(frozen=True)
class _Place:
    """Elements ``first`` .. ``first + count - 1`` of a parameter lie in ``flat`` from ``start`` on."""

    flat: Tensor
    start: int
    first: int
    count: int

    def write(self, into: Tensor, value: Tensor) -> None:
        """Copy this rank's elements of ``value`` (of the parameter's shape) into a vector like ``flat``."""
        own = value.flatten()[self.first : self.first + self.count]
        into.data[self.start : self.start + self.count].copy_(own)


@torch.no_grad()
def set_parameter(
    optimizer: Any,
    parameter: nn.Parameter,
    weight: Tensor | None,
    moments: Mapping[str, Tensor],
    step: float | None,
    whole_parameter: WholeParameter,
) -> None:
    """Set the weight, and the moments after ``step`` steps, of one parameter of this rank; a collective call.

    ``optimizer``: DeepSpeed's. ``weight``: fp32, of the shape that this rank's part of the model has; None where it
    could not be read, which leaves everything as it is. ``moments`` by Adam's names; without ``step`` they are not set.
    """
    divided = hasattr(parameter, "ds_id")  # ZeRO 3
    if divided:
        with whole_parameter(parameter) as mine:
            if mine and weight is not None:
                parameter.copy_(weight)
    if weight is None:
        return
    if not divided:
        parameter.copy_(weight)
    place = _divided_place(optimizer, parameter) if divided else _mapped_place(optimizer, parameter)
    if place is None:
        return
    place.write(place.flat, weight)
    if step is None:
        return
    adam = optimizer.optimizer
    state = adam.state[place.flat]
    # As torch.optim makes it: on the device where the kernel that reads it runs.
    device = place.flat.device if adam.defaults["fused"] else "cpu"
    state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
    for name, value in moments.items():
        if name not in state:
            state[name] = torch.zeros_like(place.flat)
        place.write(state[name], value)


def _mapped_place(optimizer: Any, parameter: nn.Parameter) -> _Place | None:
    """ZeRO 1 and 2: what DeepSpeed has linked to the parameter; None where another rank has it."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    held, own = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _Place(flat, own.start, held.start, held.numel)


def _divided_place(optimizer: Any, parameter: nn.Parameter) -> _Place:
    """ZeRO 3: an equal share of every parameter, the last one padded."""
    group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    first = size * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    count = max(0, min(size, parameter.ds_numel - first))  # type: ignore[attr-defined]
    return _Place(optimizer.fp32_partitioned_groups_flat[group], start, first, count)


_RUNNING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic loss scale has come to; its other attributes are settings."""


@contextmanager
def settings_kept(optimizer: Any) -> Iterator[None]:
    """Whatever DeepSpeed's ``optimizer`` loads meanwhile, its settings stay this run's: Adam's options, the limit of
    the norm, the kind of loss scale. Files of a checkpoint hold those of the run that wrote it."""
    adam = optimizer.optimizer
    options = [{name: value for name, value in group.items() if name != "params"} for group in adam.param_groups]
    own = {name: getattr(optimizer, name) for name in ("clip_grad", "dynamic_loss_scale") if hasattr(optimizer, name)}
    scaler = getattr(optimizer, "loss_scaler", None)
    yield
    for group, kept in zip(adam.param_groups, options, strict=True):
        group.update(kept)
        for state in (adam.state[parameter] for parameter in group["params"] if parameter in adam.state):
            if isinstance(state.get("step"), Tensor):
                # Where PyTorch wants it: beside what a fused step works on, else on the host.
                state["step"] = state["step"].to(state["exp_avg"].device if group.get("fused") else "cpu")
    for name, value in own.items():
        setattr(optimizer, name, value)
    if scaler is not None:
        if scaler.dynamic and optimizer.loss_scaler.dynamic:
            for name in _RUNNING:
                setattr(scaler, name, getattr(optimizer.loss_scaler, name))
        optimizer.loss_scaler = scaler
