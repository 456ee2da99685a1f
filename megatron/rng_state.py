"""The generators that dropout draws from, saved and restored for each rank.

Noise of the objectives and the order of the data need none of this: they are pure functions of the seed and the sample.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron.errors import OneRankError, one_line
from megatron.files import flush
from megatron.run_metadata import world_layout

if TYPE_CHECKING:
    from megatron.distributed.topology import Topology


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of torch's generators that dropout uses on this rank: CPU, and ``device`` if it is a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def rng_file(rank: int) -> str:
    """Name of a rank's generator file inside the checkpoint."""
    return f"rng_rank_{rank}.pt"


def save_rng(checkpoint: Path, state: Mapping[str, torch.Tensor], topology: Topology) -> None:
    """Write what :func:`rng_state` returned on this rank into a checkpoint directory, flushed to disk."""
    path = checkpoint / rng_file(topology.rank)
    torch.save({"rng": state, "world": world_layout(topology)}, path)
    flush(path)


def restore_rng(checkpoint: Path, topology: Topology, seed: int) -> str | None:
    """Restore this rank's generators from a checkpoint directory; returns a remark to print where that is not possible.

    The states fit only the process layout that saved them. With another one, or another kind of device, the generators
    are seeded with ``seed`` (the caller makes it differ by rank and step): a valid run, not a bit-exact continuation.
    """
    path = checkpoint / rng_file(topology.rank)
    reason = None
    if not path.is_file():
        reason = f"{path.name} is missing"
    else:
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            world, states = stored["world"], stored["rng"]
        except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, EOFError, ValueError, OSError) as error:
            said = one_line(error)[:200]
            raise OneRankError(f"{path} is damaged ({said}): use another checkpoint, or --no-load-rng") from error
        if world != world_layout(topology):
            reason = f"saved by {_layout_text(world)} processes, now {_layout_text(world_layout(topology))}"
        elif set(states) != set(rng_state(topology.device)):
            reason = "saved on another kind of device"
    if reason is None:
        set_rng_state(states, topology.device)
        return None
    torch.manual_seed(seed)
    return f"dropout generators of {checkpoint.name} not restored, seeded anew: {reason}"


def _layout_text(layout: Mapping[str, int]) -> str:
    """world (data x tensor x pipeline)."""
    world, *sizes = layout.values()
    return f"{world} ({' x '.join(map(str, sizes))})"
