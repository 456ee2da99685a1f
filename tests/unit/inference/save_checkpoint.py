"""Two steps of a tiny run through the real engine, then its DeepSpeed files and the true fp32 weights.

    python save_checkpoint.py OUTPUT [fp16] [FLAGS]     (RANK, WORLD_SIZE, MASTER_* from the environment)

``fp16`` without dashes is fp16 on a CPU, which PyTorch can and this program refuses, as it would take days: the files
are those of a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megatron import engine as engine_module
from megatron.arguments import parse_arguments
from megatron.config_checks import resolve_for_world
from megatron.engine import Engine
from megatron.initialize import initialize, leave, shut_down
from megatron.model.gpt import build_layers, initialize_weights
from megatron.model.sharding import SequentialGPT
from megatron.objectives.base import Batch

FLAGS = """--num-layers 2 --hidden-size 16 --num-attention-heads 2 --max-position-embeddings 8 --seq-length 8
 --micro-batch-size 2 --train-iters 5 --lr 1e-2 --vocab-file none --merge-file none --train-data-path none"""


def allow_fp16_on_cpu() -> None:
    """Make DeepSpeed train in fp16 here, with a dynamic loss scale that starts where nothing overflows."""
    from deepspeed.accelerator import get_accelerator

    merge = engine_module.deepspeed_config

    def with_fp16(*arguments: Any) -> dict[str, Any]:
        return merge(*arguments) | {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 6}}

    engine_module.deepspeed_config = with_fp16
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True


def main(output: Path, flags: list[str]) -> None:
    """Train, save, and write ``truth.pt``: the fp32 weights as DeepSpeed's own accessor gives them."""
    if "fp16" in flags:
        allow_fp16_on_cpu()
    config = parse_arguments("ar", FLAGS.split() + [flag for flag in flags if flag != "fp16"])
    topology = initialize(config.parallel)
    config = resolve_for_world(config, topology.world_size)
    layers = build_layers(config.model, 24, 20, causal=True)
    initialize_weights(layers, config.model, seed=1)
    assert config.batch.global_batch_size is not None
    engine = Engine(SequentialGPT(layers, config.model), config, topology, config.batch.global_batch_size)
    generator = torch.Generator().manual_seed(topology.rank)
    for _ in range(2):
        tokens = torch.randint(0, 20, (2, 9), generator=generator)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        batch = Batch(inputs, targets, torch.full((2, 8), 1 / 16), torch.arange(8).repeat(2, 1), torch.full((2,), 8.0),
                      torch.arange(2))
        engine.train_batch(iter([batch]), 1, 1e-2)
    engine.save(output, "global_step2")
    from deepspeed.utils import safe_get_full_fp32_param

    truth = {name: safe_get_full_fp32_param(parameter) for name, parameter in engine.model.named_parameters()}
    if topology.is_first:
        torch.save(truth, output / "truth.pt")
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
