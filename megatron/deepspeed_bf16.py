"""What DeepSpeed's ``BF16_Optimizer`` (bf16 with ZeRO 1) does otherwise here: the same numbers with less waiting.

By itself it copies every gradient to fp32 before adding it, asks the device in every step whether to clip and whether
the norm is finite (while that is on its way the device has nothing to do), and flattens, sums and copies back all
gradients of a replica that is alone. Other optimizers are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

EPSILON = 1e-6
"""What DeepSpeed adds to a norm before it divides by it."""


def is_bf16_optimizer(optimizer: Any) -> bool:
    """Whether this is what DeepSpeed makes of ours in bf16 with ZeRO 1."""
    return hasattr(optimizer, "fp32_groups_gradients")


def add_without_copies(optimizer: Any, add: Callable[[Tensor, Tensor], Any]) -> None:
    """Let it add bf16 gradients to its fp32 sums as they are, by ``add(sum, gradient)``: the same sums to the bit."""

    def update(parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        parameter._hp_grad = optimizer.fp32_groups_gradients[group][index]
        add(parameter._hp_grad, parameter.grad.view(parameter._hp_grad.shape))
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    optimizer._update_hp_grad = update


def note_gradients(optimizer: Any) -> None:
    """Let it know that every parameter's gradient has been added to its sum, though no hook of its own said so."""
    optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in optimizer.bf16_groups]


def step_without_waiting(optimizer: Any) -> bool:
    """Let it decide on the device what it asks the device for: whether to clip, and whether to step at all.

    The optimizer inside must be PyTorch's fused AdamW, which takes a scale of the gradients and a flag not to step (as
    it does for loss scaling). Afterwards ``_global_grad_norm`` is a scalar on the device; a step whose norm is not
    finite has changed nothing, and ``overflow`` stays False. Returns whether it can be: not where Adam is not fused or
    gradients are not summed in fp32.
    """
    adam = optimizer.optimizer
    if not (adam.defaults.get("fused") and optimizer.grad_acc_dtype is torch.float32):
        return False

    @torch.no_grad()
    def step(closure: None = None) -> None:
        norm = _global_norm(optimizer)
        adam.found_inf = (~norm.isfinite()).float()
        if optimizer.clip_grad > 0:
            adam.grad_scale = ((norm + EPSILON) / optimizer.clip_grad).clamp(min=1.0)  # what gradients are divided by
        gradients = optimizer.fp32_groups_gradient_flat_partition
        for weights, gradient in zip(optimizer.fp32_groups_flat_partition, gradients, strict=True):
            weights.grad = gradient
        adam.step()
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()
        optimizer._global_grad_norm = norm
        optimizer.overflow = False
        # The engine clears the gradients next.

    optimizer.step = step
    return True


def _global_norm(optimizer: Any) -> Tensor:
    """L2 norm of the averaged gradient over all ranks of the replica, a scalar on the device."""
    gradients, _ = optimizer.get_grads_for_norm()
    norm = torch.nn.utils.get_total_norm(gradients).to(optimizer.fp32_groups_gradients_flat[0].device)
    group = None if optimizer.mpu is None else optimizer.mpu.get_model_parallel_group()
    if group is None or dist.get_world_size(group) == 1:
        return norm
    square = norm.square()
    dist.all_reduce(square, group=group)
    return square.sqrt()
