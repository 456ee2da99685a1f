"""Assemble a run from its configuration: data, objective, model, engine, checkpoints. Nothing trains here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron import budget
from megatron.backends import (
    flash_obstacle_of,
    gated_obstacle_of,
    graph_obstacle_of,
    on_attention,
    on_gated_products,
    on_graphs,
    on_masks,
    open_messages,
    require_flash,
)
from megatron.batch_schedule import BatchSchedule
from megatron.checkpoint_directory import TAG
from megatron.checkpointing import CheckpointStore, restore_rng
from megatron.config import CheckpointConfig, ObjectiveConfig, RunConfig
from megatron.config_checks import check_vocabulary
from megatron.config_record import describe
from megatron.data import Dataset, build_dataset, describe_helpers
from megatron.distributed.agreement import agree_on_error
from megatron.distributed.fp8 import require_fp8
from megatron.distributed.tensor_parallel import tensor_parallel, train_in_fp8
from megatron.distributed.topology import Topology
from megatron.engine import Engine, gather_by_block, partitioned, whole_parameter
from megatron.errors import UserError
from megatron.evaluation import Validator
from megatron.lr_schedule import LearningRateSchedule
from megatron.model.gpt import build_layers, initialize_weights, recipes
from megatron.model.sharding import SequentialGPT, compile_blocks, use_flash_attention, use_gated_products
from megatron.objectives import Objective, build_objective
from megatron.pipelined_engine import PipelinedEngine, build_pipeline
from megatron.run_metadata import (
    METADATA_FILE,
    changed_settings,
    check_compatible,
    git_commit,
    library_versions,
    world_layout,
)
from megatron.seeding import derive, seed_torch
from megatron.tokenizer import Tokenizer, Vocabulary, build_tokenizer, build_vocabulary

if TYPE_CHECKING:  # it imports DeepSpeed, which a run does only where it must
    from megatron.model.pipeline import PipelinedGPT


@dataclass
class Progress:
    """How far training is: the only state of the loop that a checkpoint keeps besides the engine's."""

    iteration: int = 0
    samples: int = 0
    skipped_steps: int = 0
    nan_steps: int = 0


@dataclass(frozen=True)
class Run:
    """Everything the loop works with."""

    config: RunConfig
    topology: Topology
    vocabulary: Vocabulary
    objective: Objective
    schedule: BatchSchedule
    learning_rate: LearningRateSchedule | None
    train_data: Dataset | None
    validator: Validator | None
    tester: Validator | None
    engine: Engine
    parameters: int
    embedding_parameters: int
    commit: str | None
    progress: Progress
    remarks: list[str]

    @property
    def tokens_per_sample(self) -> int:
        """Tokens a sample trains on."""
        return self.config.batch.seq_length

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward a token, attention included (PERFORMANCE: what MFU
        counts).
        """
        return budget.flops_per_token(
            self.config.model, self.config.batch.seq_length, self.vocabulary.num_tokens, causal=self.objective.causal
        )

    def epochs(self, samples: int) -> float:
        """Passes over the training data that ``samples`` make."""
        return 0.0 if self.train_data is None else samples * self.tokens_per_sample / self.train_data.tokens_per_epoch


def _on_losses(config: ObjectiveConfig) -> list[str]:
    flags = ", ".join(config.loss_conditions)
    note = "compare them with those of the same objective and flags only (docs/training.md)"
    return [f"losses are not those of the text alone ({flags}): {note}"] if flags else []


def set_up(config: RunConfig, topology: Topology) -> Run:
    """Build the run and load its checkpoint. A collective call: what fails on one rank fails on all.

    Raises:
        UserError: wrong files, flags that contradict the data or the checkpoint, too little data.
    """
    global_batch_size = config.batch.global_batch_size
    assert global_batch_size is not None, "resolve_for_world comes first"
    schedule = BatchSchedule(global_batch_size, config.batch.rampup_batch_size)
    obstacle = flash_obstacle_of(config, topology)
    require_flash(config, obstacle)
    on_messages = open_messages(config, topology)
    with agree_on_error(topology):
        if config.optimizer.fp8:
            require_fp8(topology.device)
        tokenizer = build_tokenizer(config.tokenizer)
        vocabulary = build_vocabulary(tokenizer.vocab_size, config.model.make_vocab_size_divisible_by)
        check_vocabulary(config, vocabulary.padded_size)
        train_data = _training_data(config, tokenizer)
    objective = build_objective(
        config.objective, vocabulary, tokenizer.eod, config.parallel.seed, config.batch.seq_length, schedule
    )
    with agree_on_error(topology):
        validator = _validator("valid", config, objective, tokenizer, topology)
        tester = _validator("test", config, objective, tokenizer, topology)
        if config.evaluation.skip_train and validator is None and tester is None:
            raise UserError(
                "--skip-train only validates: give --valid-data-path, --valid-data-path-file or --data-path"
            )
    model = build_model(config, vocabulary, objective.causal, topology)
    parameters = budget.parameter_count(config.model, vocabulary.padded_size)
    embedding_parameters = vocabulary.padded_size * config.model.hidden_size
    seed_torch(config.parallel.seed, topology.data_parallel_rank, topology.pipeline_parallel_rank)
    first_batch = schedule.batch_at(0).size
    engine: Engine
    if isinstance(model, SequentialGPT):
        engine = Engine(model, config, topology, first_batch)
    else:
        engine = PipelinedEngine(model, config, topology, first_batch)
    graph_obstacle = graph_obstacle_of(config, topology, engine.sums_in_place)
    if graph_obstacle is None:
        engine.use_graphs()
    remarks = [*on_attention(config, topology, obstacle), *on_masks(config, model, topology), *on_messages]
    remarks += on_gated_products(config, topology, gated_obstacle_of(config, topology))
    remarks += [*on_graphs(config, topology, graph_obstacle), *_on_losses(config.objective)]
    progress = _load(config, topology, vocabulary, engine, remarks)
    return Run(
        config=config,
        topology=topology,
        vocabulary=vocabulary,
        objective=objective,
        schedule=schedule,
        learning_rate=None if config.evaluation.skip_train else _learning_rate(config),
        train_data=train_data,
        validator=validator,
        tester=tester,
        engine=engine,
        parameters=parameters,
        embedding_parameters=embedding_parameters,
        commit=git_commit() if topology.is_first else None,
        progress=progress,
        remarks=remarks,
    )


def banner(run: Run) -> list[str]:
    """Lines that state, at the start of a run, every decision that changes its results."""
    config, topology, vocabulary = run.config, run.topology, run.vocabulary
    stage = (
        "0, run as stage 1 (the same mathematics)"
        if config.parallel.zero_stage == 0
        else str(config.parallel.zero_stage)
    )
    lines = [
        f"{config.objective.objective.upper()} run, "
        + ", ".join(f"{k} {v}" for k, v in library_versions().items())
        + f", commit {run.commit or 'unknown'}",
        f"  processes {topology.world_size} (data {topology.data_parallel_size} x tensor "
        f"{topology.tensor_parallel_size} x pipeline {topology.pipeline_parallel_size}) on "
        f"{_device_name(topology.device)}, ZeRO stage {stage}",
        f"  parameters {run.parameters:,}, of which embedding {run.embedding_parameters:,}",
        f"  vocabulary {vocabulary.num_tokens:,} tokens, mask id {vocabulary.mask_id}, "
        f"padded to {vocabulary.padded_size:,}",
    ]
    if run.train_data is not None:
        lines += [f"  training data: {line}" for line in run.train_data.describe()]
        lines.append(f"  epochs {run.epochs(config.train_samples):.2f}; {describe_helpers()}")
    for name, validator in (("validation", run.validator), ("test", run.tester)):
        if validator is not None:
            lines.append(f"  {name}: {validator.describe()}")
    if config.checkpoint.save is not None and not config.evaluation.skip_train:
        how = "in the background" if run.engine.saves_in_background else "while training waits"
        lines.append(f"  checkpoints are written {how}")
    return lines + describe(config)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def build_model(
    config: RunConfig, vocabulary: Vocabulary, causal: bool, topology: Topology
) -> SequentialGPT | PipelinedGPT:
    """This process's part of the model with its initial weights, its blocks compiled if ``--compile`` (default: on a
    GPU).

    Raises:
        UserError: ``--activation-memory-budget`` without compiled blocks.
    """
    tensor = tensor_parallel(topology, config.parallel.sequence_parallel)
    sizes = (vocabulary.padded_size, vocabulary.num_tokens)
    model: SequentialGPT | PipelinedGPT
    if topology.pipeline_parallel_size > 1:
        model = build_pipeline(recipes(config.model, *sizes, causal, tensor), config.model, topology)
    else:
        with topology.device, partitioned(config, topology):
            model = SequentialGPT(build_layers(config.model, *sizes, causal, tensor), config.model)
    if config.optimizer.fp8:
        train_in_fp8(model)
    if flash_obstacle_of(config, topology) is None:
        use_flash_attention(model)
    if gated_obstacle_of(config, topology) is None:
        use_gated_products(model)
    divided = config.parallel.zero_stage == 3
    access = whole_parameter if divided else None
    initialize_weights(list(model.layers), config.model, config.parallel.seed, model.first_layer, access)
    compiled = config.parallel.compile
    if compiled is None:
        compiled = topology.device.type == "cuda"
    if compiled:
        if divided:
            gather_by_block(model)
        compile_blocks(model, one_by_one=divided, memory_budget=config.parallel.activation_memory_budget)
    elif config.parallel.activation_memory_budget is not None:
        raise UserError("--activation-memory-budget needs compiled blocks: add --compile, or drop it")
    return model


def _training_data(config: RunConfig, tokenizer: Tokenizer) -> Dataset | None:
    if config.evaluation.skip_train:
        return None
    return _dataset(config, "train", config.train_samples, tokenizer)


def _dataset(config: RunConfig, split: str, num_samples: int | None, tokenizer: Tokenizer) -> Dataset:
    return build_dataset(
        config.data,
        split,
        num_samples,
        config.batch.seq_length,
        config.parallel.seed,
        eod=tokenizer.eod,
        num_tokens=tokenizer.vocab_size,
    )


def _validator(
    split: str, config: RunConfig, objective: Objective, tokenizer: Tokenizer, topology: Topology
) -> Validator | None:
    """The measurement of one split, None where no data are given for it."""
    if not config.data.has(split):
        return None
    return Validator(_dataset(config, split, None, tokenizer), objective, config, tokenizer.token_bytes(), topology)


def _learning_rate(config: RunConfig) -> LearningRateSchedule:
    optimizer = config.optimizer
    assert optimizer.lr is not None  # config_checks requires it for training
    return LearningRateSchedule(
        peak=optimizer.lr,
        floor=optimizer.min_lr,
        style=optimizer.lr_decay_style,
        warmup_samples=config.lr_warmup_samples,
        decay_samples=config.lr_decay_samples,
        wsd_samples=config.lr_wsd_decay_samples,
        wsd_style=optimizer.lr_wsd_decay_style,
    )


def _load(
    config: RunConfig, topology: Topology, vocabulary: Vocabulary, engine: Engine, remarks: list[str]
) -> Progress:
    """Load ``--load`` into the engine; return where training continues."""
    settings = config.checkpoint
    if settings.load is None:
        return Progress()
    store = CheckpointStore(settings.load)
    saves_there = settings.save is not None and Path(settings.save).resolve() == Path(settings.load).resolve()
    if saves_there and not config.evaluation.skip_train:
        store.recover(topology)
    with agree_on_error(topology):
        tag = store.resolve(settings.load_tag)
        saved = None if tag is None else store.metadata(tag)
        if saved is not None:
            check_compatible(saved, config, vocabulary, finetune=settings.finetune)
    if tag is None or saved is None:
        if config.evaluation.skip_train:
            raise UserError(f"--load {settings.load}: holds no checkpoint to evaluate")
        _require_nothing_there(settings)
        remarks.append(f"--load {settings.load}: no checkpoint there, starting from scratch")
        return Progress()
    weights_only = settings.finetune or settings.no_load_optim or config.evaluation.skip_train
    split = _split(world_layout(topology), engine.layout)
    saved_split = _split(saved.world, saved.extra.get("engine", {}))
    if split == saved_split and not weights_only:
        engine.load(Path(settings.load), tag)
        how = ""
    else:
        engine.load_by_name(
            store.directory / tag, config.model, vocabulary.padded_size, load_optimizer=not weights_only
        )
        how = " (weights only)"
        if not weights_only:
            how = f", saved as {saved_split}, into {split}: training continues within rounding"
        if config.optimizer.fp16:
            remarks.append("the fp16 loss scale begins anew")
    remarks.append(f"loaded {settings.load}/{tag}{how}")
    remarks.extend(f"changed since {tag}: {change}" for change in changed_settings(saved, config))
    if settings.finetune:
        return Progress()
    if not settings.no_load_rng:
        remark = restore_rng(store.directory / tag, topology, _resume_seed(config, topology, saved.iteration))
        remarks.extend([remark] if remark else [])
    extra = {field.name for field in dataclasses.fields(Progress)} & set(saved.extra)
    return Progress(
        iteration=saved.iteration,
        samples=saved.consumed_samples,
        **{name: saved.extra[name] for name in extra},
    )


def _require_nothing_there(settings: CheckpointConfig) -> None:
    """Raise UserError where starting from scratch cannot be what ``--load`` was meant for."""
    needing = {"--finetune": settings.finetune, "--no-load-optim": settings.no_load_optim,
               "--no-load-rng": settings.no_load_rng}  # fmt: skip
    for flag in (flag for flag, given in needing.items() if given):
        raise UserError(f"--load {settings.load} holds no checkpoint, and {flag} needs one")
    assert settings.load is not None
    path = Path(settings.load)
    if TAG.fullmatch(path.resolve().name) and (path / METADATA_FILE).is_file():
        whole = path.resolve()
        raise UserError(f"--load {path} is a checkpoint: give --load {whole.parent} --load-tag {whole.name}")


def _split(world: Mapping[str, int], layout: Mapping[str, Any]) -> str:
    """All that decides how a checkpoint's files look, in words."""
    grid = [f"{name.split('_')[0]} {size}" for name, size in world.items() if name != "world_size"]
    return ", ".join([" x ".join(grid), *(f"{name.replace('_', ' ')} {value}" for name, value in layout.items())])


def _resume_seed(config: RunConfig, topology: Topology, iteration: int) -> int:
    """Seed of dropout where the saved generators do not fit: new for this replica, stage and step."""
    stage = (topology.pipeline_parallel_rank,) if topology.pipeline_parallel_rank else ()
    return derive(config.parallel.seed, topology.data_parallel_rank, iteration, *stage)
