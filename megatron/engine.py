"""The only door to DeepSpeed: initialisation, one training step, evaluation, rank files.

The boundary of gradient accumulation is stated for every micro-batch instead of counted, so batch-size ramp-up is
exact. A step whose gradient norm is not finite changes no parameter; :class:`StepResult` says so. What DeepSpeed is
configured to do stands in ``deepspeed_json``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import record_function

from megatron.async_save import HostCopies
from megatron.config import ModelConfig, RunConfig
from megatron.cuda_graphs import MicroBatchGraphs, Record
from megatron.deepspeed_bf16 import add_without_copies, is_bf16_optimizer, note_gradients, step_without_waiting
from megatron.deepspeed_json import deepspeed_config, offloads_optimizer, refusals_of
from megatron.deepspeed_save import save_engine
from megatron.deepspeed_state import set_parameter, settings_kept
from megatron.distributed.agreement import agree_on_error
from megatron.distributed.roll_call import is_lost_peer
from megatron.distributed.topology import Topology
from megatron.errors import OneRankError, UserError, one_line
from megatron.inference.weights import WEIGHT, find_state, own_part
from megatron.model.gpt import Block
from megatron.model.kernels import add_to
from megatron.objectives.base import Batch
from megatron.optimizer import build_optimizer
from megatron.trace_shares import OPTIMIZER


class Reading:
    """Numbers that a device may still be computing, on their way to the host."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> torch.Tensor:
        """The numbers, on the CPU; waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers


@dataclass(frozen=True)
class StepResult:
    """One optimizer step as this rank saw it.

    Attributes:
        loss: scalar tensor, mean over micro-batches of ``sum(nll * weights)``; on the device, not yet averaged over
        ranks. counted: scalar tensor, share of the positions that the loss is a mean over (1 unless
        ``--eod-mask-loss``). norm: global L2 norm of the averaged gradient before clipping, loss scale removed.
        skipped: what DeepSpeed says, None where the device decides by the norm (``step_without_waiting``).
        micro_losses: the loss of each micro-batch ``[m]``, with the sample ids ``[m, b]`` of each in ``sample_ids``;
            both empty but on one of the ranks that hold the replica.
    """

    loss: torch.Tensor
    counted: torch.Tensor
    norm: Reading
    skipped: bool | None
    micro_losses: list[torch.Tensor]
    sample_ids: list[torch.Tensor]

    @property
    def grad_norm(self) -> float:
        """The norm, once the device has made the step."""
        return float(self.norm.numbers())

    @property
    def applied(self) -> bool:
        """False when the gradient was not finite and no parameter changed; known once the device has made the step."""
        return math.isfinite(self.grad_norm) if self.skipped is None else not self.skipped


class Model(Protocol):
    """What an engine trains: the whole model, or one pipeline stage of it."""

    def named_weights(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by their names within the whole model."""


class Engine:
    """A model, its optimizer and their gradients, stepped by DeepSpeed."""

    def __init__(self, model: Model, config: RunConfig, topology: Topology, global_batch_size: int) -> None:
        if config.optimizer.fp16 and topology.device.type == "cpu":
            raise UserError("--fp16 needs a GPU: leave it out to train in fp32 on the CPU")
        deepspeed = import_deepspeed(topology.device)
        self.topology = topology
        with agree_on_error(topology):  # a node may not see the JSON
            self.config = deepspeed_config(config, topology.data_parallel_size, global_batch_size)
        self._micro_batch_size = config.batch.micro_batch_size
        background = config.checkpoint.async_save
        if background is None:  # state that is on the CPU already would be there twice
            background = topology.device.type == "cuda" and not offloads_optimizer(self.config)
        self._copies = HostCopies(topology.device) if background else None
        fused = topology.device.type == "cuda" or offloads_optimizer(self.config)
        optimizer = build_optimizer(model.named_weights().items(), config.optimizer, fused)
        # Without graphs of autograd: what flat weights are made of would keep, as long as they live, what adds up each
        # parameter's gradient, on the stream that is current now.
        with quiet(), torch.no_grad(), refusals_of(config.parallel.deepspeed_config):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                mpu=topology.mpu if topology.pipeline_parallel_size == 1 else None,  # a pipeline brings its own
                config=self.config,
                dist_init_required=False,
            )
        optimizer, self._host_decides = self._engine.optimizer, True  # whether a step is applied
        self._graphs: MicroBatchGraphs | None = None
        if is_bf16_optimizer(optimizer):
            add_without_copies(optimizer, torch.Tensor.add_ if config.parallel.compile is False else add_to)
            self._host_decides = not step_without_waiting(optimizer)
            if topology.data_parallel_size == 1:  # nothing to sum: neither engine needs to flatten and copy gradients
                self._engine.enable_backward_allreduce = self._engine.pipeline_enable_backward_allreduce = False

    @property
    def model(self) -> Model:
        """The model, or the stage of it, that DeepSpeed trains."""
        model: Model = self._engine.module
        return model

    @property
    def loss_scale(self) -> float:
        """fp16 loss scale; 1 otherwise."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0)) if self._engine.fp16_enabled() else 1.0

    def train_batch(
        self, batches: Iterator[Batch], micro_batches: int, learning_rate: float,
        meanwhile: Callable[[], None] = lambda: None, *, by_graphs: bool = True,
    ) -> StepResult:
        """Accumulate the gradient of ``micro_batches`` batches, clip it, and step with ``learning_rate``.

        ``meanwhile`` is called once the device has the first micro-batch to work at: what waits for the step before is
        done there. Without ``by_graphs`` every kernel is launched by its own operator, for a profiler to see.
        """
        engine = self._engine
        engine.module.train()
        self._prepare_step(micro_batches, learning_rate)
        losses: list[torch.Tensor] = []
        counted: list[torch.Tensor] = []
        sample_ids: list[torch.Tensor] = []
        for index in range(micro_batches):
            batch = next(batches)
            sample_ids.append(batch.sample_ids)
            counted.append(batch.counted.sum() / batch.targets.numel())
            last = index == micro_batches - 1
            if self._graphs is None or not by_graphs:
                engine.set_gradient_accumulation_boundary(last)
                losses.append(self._pass(batch.to(self.topology.device, non_blocking=True), micro_batches))
            else:
                engine.set_gradient_accumulation_boundary(False)
                losses.append(self._graphs(batch, micro_batches))
                if last:
                    self._end_accumulation()
            if index == 0:
                meanwhile()
        with record_function(OPTIMIZER):
            engine.step()
        return self._result(torch.stack(losses).mean(), torch.stack(counted).mean(), losses, sample_ids)

    @property
    def sums_in_place(self) -> bool:
        """Whether a backward pass adds gradients to fp32 sums that stay where they are: bf16 with ZeRO 1, unless a JSON
        has its ``immediate_grad_update`` off."""
        optimizer = self._engine.optimizer
        return is_bf16_optimizer(optimizer) and bool(optimizer.immediate_grad_update)

    def use_graphs(self, record: Record | None = None) -> None:
        """Let micro-batches be played from recordings (``record``: see there)."""
        assert self.sums_in_place
        self._graphs = MicroBatchGraphs(self._pass, self.topology.device, record)

    def _pass(self, batch: Batch, micro_batches: int) -> torch.Tensor:
        """The loss of ``batch``, on the device; its gradient / ``micro_batches`` is added to what there is."""
        loss = _forward(self._engine, batch)
        self._engine.backward(loss / micro_batches, scale_wrt_gas=False)
        return loss.detach()

    def _end_accumulation(self) -> None:
        """What DeepSpeed does behind a step's last backward pass, where only the device's part of it was played."""
        engine = self._engine
        engine.set_gradient_accumulation_boundary(True)
        note_gradients(engine.optimizer)
        if engine.enable_backward_allreduce:
            engine.allreduce_gradients()

    def _prepare_step(self, micro_batches: int, learning_rate: float) -> None:
        """Tell DeepSpeed how many micro-batches the next step has, and its rate."""
        engine = self._engine
        total = micro_batches * self._micro_batch_size * self.topology.data_parallel_size
        if engine.train_batch_size() != total:
            engine.set_train_batch_size(total)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def _result(
        self,
        loss: torch.Tensor,
        counted: torch.Tensor,
        micro_losses: list[torch.Tensor],
        sample_ids: list[torch.Tensor],
    ) -> StepResult:
        norm, skipped = self._engine.get_global_grad_norm(), not self._engine.was_step_applied()
        if skipped and offloads_optimizer(self.config):
            # DeepSpeed 0.19.8 forgets to: the next steps would add to a gradient that is not finite.
            gradients = getattr(self._engine.optimizer, "averaged_gradients", {})
            gradients.update(dict.fromkeys(gradients))
        reports = self.topology.reports_loss
        return StepResult(
            loss=loss,
            counted=counted,
            norm=Reading(torch.as_tensor(math.nan if norm is None else norm)),
            skipped=skipped if self._host_decides else None,
            micro_losses=micro_losses if reports else [],
            sample_ids=sample_ids if reports else [],
        )

    @torch.no_grad()
    def eval_batches(self, batches: Iterator[Batch], count: int) -> list[torch.Tensor]:
        """Return ``sum(nll * weights)`` of every row, ``[b]`` fp32, of the next ``count`` batches, with dropout off.

        A collective call of the ranks that hold the replica. Empty where the loss is not known: on all pipeline stages
        but the last.
        """
        self._engine.module.eval()
        rows = []
        for _ in range(count):
            batch = next(batches).to(self.topology.device, non_blocking=True)
            rows.append(_forward(self._engine.module, batch, reduction="rows"))
        return rows

    @property
    def saves_in_background(self) -> bool:
        """Whether training goes on while a checkpoint is written: ``--async-save``."""
        return self._copies is not None

    def save(self, directory: Path, tag: str, *, background: bool = False) -> Callable[[], None] | None:
        """Write this rank's model and optimizer files into ``directory/tag``; a collective call.

        With ``background`` copy them, and return the function that writes them (see :func:`save_engine`).
        """
        assert self._copies is not None or not background
        with quiet():
            return save_engine(self._engine, directory, tag, copies=self._copies if background else None)

    @property
    def layout(self) -> dict[str, Any]:
        """What else than the process grid decides how a checkpoint's files look (JSON)."""
        zero = self.config["zero_optimization"]
        half = [name for name in ("bf16", "fp16") if self.config.get(name, {}).get("enabled")]
        return {
            "zero_stage": zero["stage"],
            "precision": half[0] if half else "fp32",
            "offload": offloads_optimizer(self.config),
        }

    def load(self, directory: Path, tag: str) -> None:
        """Load this rank's own files from ``directory/tag``, to the bit; a collective call.

        They must have been saved by the same process grid and the same ``layout``. What flags say stays as it is.
        """
        try:
            with quiet(), settings_kept(self._engine.optimizer):
                path, _ = self._engine.load_checkpoint(str(directory), tag=tag, load_lr_scheduler_states=False)
        except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, OSError) as error:
            if is_lost_peer(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            said = one_line(error)[:200]
            raise OneRankError(f"checkpoint {directory / tag} is damaged ({said}): use another") from error
        if path is None:
            raise UserError(f"--load {directory}: DeepSpeed finds no checkpoint files in {tag}")

    def load_by_name(self, checkpoint: Path, config: ModelConfig, padded_size: int, *, load_optimizer: bool) -> None:
        """Load fp32 weights, and Adam's state if ``load_optimizer``, of a checkpoint of any split; a collective call.

        Every rank reads the parameters that it has a part of, whole and one after the other. ``padded_size``: rows of
        the padded vocabulary.

        Raises:
            UserError: on every rank, when files are missing, damaged or mixed.
        """
        topology, parameters = self.topology, self.model.named_weights()
        with agree_on_error(topology):
            sources = find_state(checkpoint, parameters.keys(), load_optimizer=load_optimizer)
        problem: UserError | None = None
        for name, parameter in parameters.items():
            values: dict[str, torch.Tensor] = {}
            try:
                for kind, stored in sources.values.items() if problem is None else ():
                    rank, ranks = topology.tensor_parallel_rank, topology.tensor_parallel_size
                    values[kind] = own_part(name, stored[name](), config, padded_size, rank, ranks)
            except UserError as error:
                problem, values = error, {}  # the others wait in a collective: go on with them, then say it
            set_parameter(
                self._engine.optimizer, parameter, values.pop(WEIGHT, None), values, sources.step, whole_parameter
            )
        with agree_on_error(topology):
            if problem is not None:
                raise problem


def _forward(model: Any, batch: Batch, **options: str) -> torch.Tensor:
    """Loss of ``batch`` by ``model``: a :class:`SequentialGPT`, or the DeepSpeed engine around one."""
    loss: torch.Tensor = model(
        batch.inputs,
        batch.positions,
        batch.targets,
        batch.weights,
        attention_mask=batch.attention_mask,
        scored=batch.scored,
        **options,
    )
    return loss


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed quietly, without the C++ operators that it would compile at start."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault(
        "LOCAL_RANK", str(device.index or 0)
    )  # DeepSpeed insists on it, also in a run without launcher
    # DeepSpeed calls collectives by names that torch is about to retire: no user's business, on every rank least.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    with quiet():
        import deepspeed
        import deepspeed.ops

        # Shared-memory collectives compile with g++ for over a minute on first use; gloo needs none of it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextlib.contextmanager
def partitioned(config: RunConfig, topology: Topology) -> Iterator[None]:
    """Build modules here: with ZeRO 3 each parameter is divided over data-parallel ranks as soon as it is made.

    So a model that fits no single device never exists whole. Below ZeRO 3, and in evaluation, nothing happens.
    """
    if config.parallel.zero_stage < 3:
        yield
        return
    assert config.batch.global_batch_size is not None, "resolve_for_world comes first"
    deepspeed = import_deepspeed(topology.device)
    with agree_on_error(topology):
        merged = deepspeed_config(config, topology.data_parallel_size, config.batch.global_batch_size)
    with quiet():
        with refusals_of(config.parallel.deepspeed_config):
            divided = deepspeed.zero.Init(
                data_parallel_group=topology.data_group, config_dict_or_path=merged, mpu=topology.mpu
            )
        with divided:
            yield


def gather_by_block(model: torch.nn.Module) -> None:
    """Let ZeRO 3 gather the parameters of a transformer block together, before the block runs, not layer by layer
    within it: a compiled block would not see them come and go."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [Block])


@contextlib.contextmanager
def whole_parameter(parameter: torch.nn.Parameter) -> Iterator[bool]:
    """A parameter that ZeRO 3 has divided, whole; what this rank's ``True`` sets in it, all ranks get. Collective."""
    import deepspeed

    group = parameter.ds_process_group  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield torch.distributed.get_rank(group) == 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what DeepSpeed prints on standard output; warnings and errors still reach standard error."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
