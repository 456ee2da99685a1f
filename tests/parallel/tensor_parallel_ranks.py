"""One of four gloo processes that compute a cut model and the whole one; reports both. See ``test_tensor_parallel``."""

from __future__ import annotations

import datetime
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from megatron.config import ModelConfig
from megatron.distributed import products
from megatron.distributed.collectives import all_gather
from megatron.distributed.messages import use_slots
from megatron.distributed.tensor_parallel import ALONE, TensorParallel, tensor_parallel, train_in_fp8
from megatron.distributed.topology import Topology, build_topology
from megatron.model.gpt import build_layers, initialize_weights, named_parameters
from megatron.model.partition import cut_of
from megatron.model.sharding import SequentialGPT, compile_blocks
from tests.parallel.shared_memory import shared_slots

VOCABULARY, TOKENS = 72, 61  # the last of four ranks has 18 rows, 7 of them tokens
SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16,
    "normalization": "rmsnorm", "use_rotary_position_embeddings": True, "swiglu": True, "ffn_hidden_size": 48,
    "disable_bias_linear": True, "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.2,
}
GPT2 = {
    "normalization": "layernorm", "use_rotary_position_embeddings": False, "swiglu": False,
    "disable_bias_linear": False,
}
# name -> (changes of the model, what the batch has besides)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({}, ()),
    "gpt2": (GPT2, ()),
    "untied": ({"untie_embeddings_and_output_weights": True}, ("scored",)),
    "grouped": ({"num_key_value_heads": 2}, ("scored",)),
    "one key head": ({"num_key_value_heads": 1, "disable_bias_linear": False}, ("mask",)),
    "three key heads": ({"num_attention_heads": 12, "kv_channels": 4, "num_key_value_heads": 3}, ()),
    "recomputed": ({"checkpoint_activations": True} | GPT2, ("mask", "scored")),
    "padding only": ({}, ("few tokens",)),
    "in halves": ({}, ("halves",)),
    "compiled": ({"num_layers": 1, "num_key_value_heads": 1}, ("scored", "compiled")),
}


TALKING = {
    "gathered_product", "scattered_product", "summed_product", "column_gradients", "row_gradients", "all_gather",
    "reduce_scatter", "all_reduce",
}


class Graphs:
    """A backend of ``torch.compile`` that notes the graphs it gets, forward and backward."""

    def __init__(self) -> None:
        self.messages: list[dict[str, int]] = []  # by every graph: operators that talk to other ranks, how many of each
        self.kept: list[bool] = []  # by every graph: whether something gathered leaves it

    def backend(self) -> Callable[..., Any]:
        """It divides forward from backward as inductor does and runs both as they are."""
        return aot_autograd(
            fw_compiler=self._note, bw_compiler=self._note, partition_fn=min_cut_rematerialization_partition
        )

    def _note(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        names = [node.target.__name__.removesuffix(".default") for node in nodes]
        self.messages.append(Counter(name for name in names if name in TALKING))
        made = [node for node, name in zip(nodes, names) if name == "all_gather"]
        self.kept.append(bool({*made} & {*graph.graph.output_node().args[0]}))
        return make_boxed_func(graph.forward)


GRAPHS = Graphs()


def make_batch(extras: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Three rows of 16 positions, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    tokens = 17 if "few tokens" in extras else TOKENS
    batch = {
        "inputs": torch.randint(0, tokens + 1, (3, 16), generator=generator),
        "positions": torch.arange(16).repeat(3, 1),
        "targets": torch.randint(0, tokens, (3, 16), generator=generator),
        "weights": torch.rand(3, 16, generator=generator, dtype=torch.float64) / 48,
    }
    if "scored" in extras:
        batch["scored"] = torch.arange(0, 48, 2)
        batch["weights"].view(-1)[1::2] = 0.0
    if "mask" in extras:
        visible = torch.rand(3, 1, 16, 16, generator=generator) < 0.6
        batch["attention_mask"] = visible | torch.eye(16, dtype=torch.bool)
    return batch


FP8 = {"hidden_size": 64, "ffn_hidden_size": 128, "disable_bias_linear": False, "init_method_std": 0.05}
"""Multiples of 16 for every part of four ranks; weights that do not blow rounding up."""


def make_model(config: ModelConfig, tensor: TensorParallel, tokens: int, fp8: bool = False) -> SequentialGPT:
    """In double precision: what differs from the whole model by more than rounding is wrong; or in bf16 and fp8."""
    dtype = torch.bfloat16 if fp8 else torch.float64
    layers = [layer.to(dtype) for layer in build_layers(config, VOCABULARY, tokens, causal=False, tensor=tensor)]
    initialize_weights(layers, config, seed=1)
    # Away from ones and zeros, where a missing gain or bias would not show.
    for name, parameter in named_parameters(layers, config, 0).items():
        if parameter.dim() == 1:
            cut = cut_of(name, config, VOCABULARY)
            whole = torch.Size(parameter.shape) if cut is None else cut.whole_shape(parameter.shape)
            shift = 0.3 * torch.linspace(-1, 1, whole.numel(), dtype=torch.float64)
            parameter.data += shift if cut is None else cut.part(shift, tensor.rank, tensor.size)
    model = SequentialGPT(layers, config)
    if fp8:
        train_in_fp8(model)
    return model


def losses_and_gradients(
    config: ModelConfig, tensor: TensorParallel, extras: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Training loss, evaluation rows, and the gradient of every parameter, joined over ranks."""
    model = make_model(config, tensor, 17 if "few tokens" in extras else TOKENS, "fp8" in extras)
    if "compiled" in extras and tensor.size > 1:
        compile_blocks(model, backend=GRAPHS.backend())
    batch = make_batch(extras)
    rows = model(**batch, reduction="rows")
    loss = model(**batch)
    loss.backward()
    gradients = {}
    for name, parameter in named_parameters(model.layers, config, 0).items():
        cut = cut_of(name, config, VOCABULARY) if tensor.size > 1 else None
        assert (cut is not None) == hasattr(parameter, "tensor_model_parallel"), name
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad if cut is None else cut.join(gather(parameter.grad, tensor))
    return loss.detach(), rows, gradients


def gather(x: torch.Tensor, tensor: TensorParallel) -> list[torch.Tensor]:
    """``x`` of every tensor-parallel rank."""
    assert tensor.ranks is not None
    return list(all_gather(x.unsqueeze(0), tensor.ranks))


def compare(topology: Topology, sequence_parallel: bool, case: str, sums_in_halves: bool) -> dict[str, float]:
    """Largest relative difference between the cut and the whole model, by what was compared."""
    changes, extras = CASES[case]
    config = ModelConfig(**(SIZES | changes))
    with (
        mock.patch.object(products, "HALVED_FROM", 8 if "halves" in extras else products.HALVED_FROM),
        mock.patch.object(products, "_sum_of_halves", wraps=products._sum_of_halves) as summed,
    ):
        cut = losses_and_gradients(config, tensor_parallel(topology, sequence_parallel), extras)
    # Both passes of both last products of two blocks: one for evaluation, one for training.
    assert summed.call_count == (8 if sums_in_halves else 0), summed.call_count
    whole = losses_and_gradients(config, ALONE, extras)

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    report = {"loss": difference(cut[0], whole[0]), "rows": difference(cut[1], whole[1])}
    assert cut[2].keys() == whole[2].keys()
    return report | {name: difference(gradient, whole[2][name]) for name, gradient in cut[2].items()}


def compare_fp8(topology: Topology) -> dict[str, float]:
    """Distance of the cut model that trains in fp8 from the whole one in double precision, relative, by parameter."""
    config = ModelConfig(**(SIZES | FP8))
    cut = losses_and_gradients(config, tensor_parallel(topology, False), ("fp8",))
    whole = losses_and_gradients(config, ALONE, ())
    report = {"loss": float((cut[0] - whole[0]).abs() / whole[0])}
    return report | {name: float((cut[2][name] - one).norm() / one.norm()) for name, one in whole[2].items()}


def dropout(topology: Topology, sequence_parallel: bool, **changes: Any) -> dict[str, Any]:
    """What dropout does on the ranks: kept features of the embedding, gradients with and without recomputation."""
    tensor = tensor_parallel(topology, sequence_parallel)
    results = []
    for recompute in ({}, {"checkpoint_activations": True}, {"recompute_granularity": "selective"}):
        model = make_model(ModelConfig(**(SIZES | changes | recompute)), tensor, TOKENS)
        torch.manual_seed(7)
        loss = model(**make_batch(()))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters()), torch.get_rng_state()])
    torch.manual_seed(7)
    embedded = model.layers[0](*(make_batch(())[name] for name in ("inputs", "positions")))[0]
    attention = model.layers[1].self_attention
    torch.manual_seed(7)
    ones = torch.ones(3, 16, attention.num_heads, 8, dtype=torch.float64)
    attended = attention._attend(ones, ones, torch.eye(16, 8, dtype=torch.float64).expand(3, -1, 8).unsqueeze(2)
                                 .expand(-1, -1, attention.num_kv_heads, -1), None)
    return {
        "hidden": embedded != 0, "attention": attended, "next": torch.rand(()),
        "recomputed alike": all(all(torch.equal(a, b) for a, b in zip(results[0], r)) for r in results[1:]),
    }


def main(store: str, report: str) -> None:
    """Join, compute everything, report."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    found: dict[str, Any] = {"differences": {}, "dropout": {}, "fp8": {}}
    for size in (2, 4):
        topology = build_topology(size, 1, torch.device("cpu"), timeout)
        for sequence_parallel in (False, True):
            kind = f"tensor {size}" + (" sequence" if sequence_parallel else "")
            for copied in (False, True):
                slots = shared_slots(Path(report).parent, topology.tensor_group) if copied else None
                use_slots(topology.tensor_group.group_name, slots)
                for case in CASES:
                    if case == "compiled" and (copied or kind != "tensor 2 sequence"):
                        continue  # compiling takes seconds
                    halves = case == "in halves" and copied and kind == "tensor 2"
                    differences = compare(topology, sequence_parallel, case, halves)
                    found["differences"][kind + " copied" * copied, case] = differences
            use_slots(topology.tensor_group.group_name, None)
            if not sequence_parallel:
                found["fp8"][kind] = compare_fp8(topology)
            found["dropout"][kind] = dropout(topology, sequence_parallel, hidden_dropout=0.3, attention_dropout=0.3)
    found["messages"], found["kept"] = GRAPHS.messages, GRAPHS.kept
    torch.save(found, Path(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
