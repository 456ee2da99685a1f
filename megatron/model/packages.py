"""Optional packages of which one version is taken, since functions are called that are no promise of theirs."""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache
from typing import Final

import torch

from megatron.errors import one_line

INSTALL: Final = "pip install -e '.[flash]' -c constraints.txt"
"""What installs each of them, in the version that is taken."""


def hopper_obstacle(device: torch.device, half_precision: bool) -> str | None:
    """Why kernels for Hopper's tensor cores cannot serve a run, in words; None if they can."""
    if device.type != "cuda":
        return "it needs a GPU"
    if (found := torch.cuda.get_device_capability(device))[0] != 9:
        name = torch.cuda.get_device_name(device)
        return f"it is for GPUs of compute capability 9.0 (Hopper), and {name} has {found[0]}.{found[1]}"
    if not half_precision:
        return "it needs --bf16 or --fp16"
    return None


@cache
def package_obstacle(package: str, wanted: str, module: str) -> str | None:
    """Why ``module`` of version ``wanted`` of ``package`` cannot be had, in words; None if it can."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed: {INSTALL}"
    if version != wanted:
        return f"{package} {version} is installed, and {wanted} is needed: {INSTALL}"
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a package raises whose own needs are of other versions
        return f"{package} cannot be imported ({one_line(error)}): {INSTALL}"
    return None
