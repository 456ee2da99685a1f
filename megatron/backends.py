"""Which implementation does what several can do, where a flag leaves it open, and what is said of it at start.

What stands in the way of one process stands in that of all: each choice is agreed on.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from megatron.config import RunConfig
from megatron.distributed.agreement import first_said
from megatron.distributed.copy_engines import Slots, open_slots
from megatron.distributed.messages import use_slots
from megatron.distributed.topology import Topology
from megatron.errors import UserError
from megatron.model.flash_attention import VERSION as FLASH_VERSION
from megatron.model.flash_attention import flash_obstacle
from megatron.model.gated_products import VERSION as GATED_VERSION
from megatron.model.gated_products import gated_obstacle
from megatron.model.sharding import SequentialGPT, describe_masks

if TYPE_CHECKING:  # it imports DeepSpeed, which a run does only where it must
    from megatron.model.pipeline import PipelinedGPT

WIDEST_BY_GRAPHS = 576
"""Width up to which micro-batches are CUDA graphs by themselves. Wider models keep the GPU busy as they are, and graphs
and what is computed besides (sizes that are new or rare, validation) do not share the memory of their activations."""


def flash_obstacle_of(config: RunConfig, topology: Topology) -> str | None:
    """Why this run does not train with FlashAttention; None if it does. Collective."""
    return first_said(topology, _own_flash_obstacle(config, topology))


def _own_flash_obstacle(config: RunConfig, topology: Topology) -> str | None:
    if config.parallel.attention_backend == "fused":
        return "--attention-backend fused"
    if config.evaluation.skip_train:
        return "it is for training"
    if (flag := _mask_flag(config)) is not None:
        return f"it has no masks, and {flag} gives every batch one"
    return flash_obstacle(
        device=topology.device,
        half_precision=config.optimizer.half_precision,
        head_size=config.model.head_size,
        length=config.batch.seq_length,
        dropout=config.model.attention_dropout,
    )


def _mask_flag(config: RunConfig) -> str | None:
    """The flag that gives every batch of this run a mask; None if batches bring none."""
    if config.objective.reset_attention_mask:
        return "--reset-attention-mask"
    if config.objective.randmask_ratio > 0 and not config.evaluation.skip_train:
        return "--randmask-ratio"
    return None


def require_flash(config: RunConfig, obstacle: str | None) -> None:
    """Raise UserError where ``--attention-backend flash`` meets an ``obstacle`` in training."""
    if config.parallel.attention_backend == "flash" and not config.evaluation.skip_train and obstacle is not None:
        raise UserError(f"--attention-backend flash: {obstacle}; or use --attention-backend auto")


def on_attention(config: RunConfig, topology: Topology, obstacle: str | None) -> list[str]:
    """Which attention trains the model, on a GPU; on a CPU there is one."""
    if topology.device.type != "cuda" or config.evaluation.skip_train:
        return []
    if config.parallel.attention_backend == "fused":
        return ["attention: PyTorch's (--attention-backend fused)"]
    if obstacle is not None:
        return [f"attention: PyTorch's (not FlashAttention: {obstacle})"]
    return [f"attention: FlashAttention {FLASH_VERSION} in training, PyTorch's in validation and for masks"]


def gated_obstacle_of(config: RunConfig, topology: Topology) -> str | None:
    """Why this run does not train with SwiGLU inside of products; None if it does. Collective."""
    return first_said(topology, _own_gated_obstacle(config, topology))


def _own_gated_obstacle(config: RunConfig, topology: Topology) -> str | None:
    parallel, model = config.parallel, config.model
    if parallel.no_bias_swiglu_fusion:
        return "--no-bias-swiglu-fusion"
    if config.evaluation.skip_train:
        return "it is for training"
    if not model.swiglu:
        return "there is none"
    if not model.disable_bias_linear:
        return "it has no biases: --disable-bias-linear"
    if config.optimizer.fp8:
        return "it has no fp8"
    if parallel.compile is False:
        return "it is for compiled code, and there is --no-compile"
    if parallel.tensor_model_parallel_size > 1:
        return "it has no messages beside it, and there is --tensor-model-parallel-size"
    return gated_obstacle(
        device=topology.device,
        half_precision=config.optimizer.half_precision,
        hidden_size=model.hidden_size,
        ffn_size=model.ffn_size,
    )


def on_gated_products(config: RunConfig, topology: Topology, obstacle: str | None) -> list[str]:
    """Where SwiGLU is computed in training on a GPU."""
    if topology.device.type != "cuda" or config.evaluation.skip_train or not config.model.swiglu:
        return []
    if obstacle is not None:
        return [f"SwiGLU: between products (not inside: {obstacle})"]
    return [f"SwiGLU: inside of products (quack-kernels {GATED_VERSION}) in training"]


def graph_obstacle_of(config: RunConfig, topology: Topology, sums_in_place: bool) -> str | None:
    """Why this run does not launch micro-batches as CUDA graphs; None if it does. Collective.

    ``sums_in_place``: the engine's.

    Raises:
        UserError: ``--enable-cuda-graph``, and it cannot.
    """
    obstacle = first_said(topology, _own_graph_obstacle(config, topology, sums_in_place))
    if config.parallel.enable_cuda_graph and not config.evaluation.skip_train and obstacle is not None:
        raise UserError(f"--enable-cuda-graph: {obstacle}; drop it")
    return obstacle


def _own_graph_obstacle(config: RunConfig, topology: Topology, sums_in_place: bool) -> str | None:
    parallel, model = config.parallel, config.model
    if parallel.enable_cuda_graph is False:
        return "--no-enable-cuda-graph"
    if config.evaluation.skip_train:
        return "they are for training"
    if topology.device.type != "cuda":
        return "they need a GPU"
    if parallel.compile is False:
        return "they are for compiled code, and there is --no-compile"
    if parallel.pipeline_model_parallel_size > 1 or parallel.tensor_model_parallel_size > 1:
        return "they are for data parallelism alone"
    if not sums_in_place:
        return "they need --bf16, --zero-stage 1, no offloading, bf16.immediate_grad_update"
    if config.optimizer.fp8:
        return "they have not been tried with --fp8"
    if (flag := _mask_flag(config)) is not None:
        return f"they have no masks, and {flag} gives every batch one"
    if model.recompute is not None:
        return "they have no recomputation"
    if parallel.enable_cuda_graph is None and topology.data_parallel_size > 1:
        return "several GPUs have not run them yet; --enable-cuda-graph asks for them"
    if parallel.enable_cuda_graph is None and model.hidden_size > WIDEST_BY_GRAPHS:
        return f"they pay up to --hidden-size {WIDEST_BY_GRAPHS}"
    return None


def on_graphs(config: RunConfig, topology: Topology, obstacle: str | None) -> list[str]:
    """Whether Python launches each kernel of training on a GPU."""
    if topology.device.type != "cuda" or config.evaluation.skip_train:
        return []
    if obstacle is not None:
        return [f"CUDA graphs: none ({obstacle})"]
    return ["CUDA graphs: one a micro-batch"]


def on_masks(config: RunConfig, model: SequentialGPT | PipelinedGPT, topology: Topology) -> list[str]:
    """Which attention serves the masks of the batches, where they have any."""
    if _mask_flag(config) is None:
        return []
    training = not config.evaluation.skip_train
    return [f"attention masks: {describe_masks(model, topology.device, config.batch.seq_length, training)}"]


def open_messages(config: RunConfig, topology: Topology) -> list[str]:
    """Let messages of this process's tensor-parallel ranks go as ``--tp-comm-backend`` says; what to say of it.
    Collective.

    Raises:
        UserError: copy engines are asked for and cannot be had.
    """
    parallel = config.parallel
    if parallel.tensor_model_parallel_size == 1:
        return []
    use_slots(topology.tensor_group.group_name, None)
    if parallel.tp_comm_backend == "collective":
        return []
    found: Slots | str = "products in fp8 have no messages beside them"
    if not config.optimizer.fp8:
        # What is gathered, or summed, of the micro-batch's hidden states.
        width = 2 if config.optimizer.half_precision else 4
        expected = config.batch.micro_batch_size * config.batch.seq_length * config.model.hidden_size * width
        timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
        found = open_slots(topology, expected, timeout)
    if isinstance(found, Slots):
        use_slots(topology.tensor_group.group_name, found)
        return ["messages of tensor-parallel ranks: by copy engines"]
    if parallel.tp_comm_backend == "copy":
        raise UserError(f"--tp-comm-backend copy: {found}; or use --tp-comm-backend auto")
    return [f"messages of tensor-parallel ranks: collectives (not copy engines: {found})"]
