"""``run.json``: what a checkpoint is, and whether a run may continue from it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from megatron.config import ModelConfig, RunConfig, concern_types
from megatron.config_record import to_dict
from megatron.errors import UserError
from megatron.model.flash_attention import PACKAGE as FLASH
from megatron.options import flag_of
from megatron.version import __version__

if TYPE_CHECKING:
    from megatron.distributed.topology import Topology
    from megatron.tokenizer.vocabulary import Vocabulary

METADATA_FILE: Final = "run.json"
FORMAT: Final = 1
# Settings that say where things are and how often they happen: a run that changes them is the same run.
_NOT_COMPARED: Final = frozenset(("local_rank", "num_workers", "data_cache_path"))


@dataclass(frozen=True)
class Validation:
    """Validation loss of exactly the saved weights, in nats a token, with its standard error."""

    loss: float
    stderr: float | None = None


@dataclass(frozen=True)
class CheckpointMetadata:
    """``run.json``. :func:`describe_run` fills the first part, ``CheckpointStore.save`` the last three fields.

    Attributes:
        iteration: finished steps; consumed_samples, consumed_tokens: what they read.
        shape: flag -> value of everything that the weights' shapes and meaning depend on, defaults resolved.
        data_order: flag -> value of what decides which tokens sample j holds.
        config: every setting (``config_record.from_dict`` reads it).
        world: ``world_size`` and the parallel sizes; with the same ones, resume is bit-exact.
        versions: of Python and of the libraries; git_commit: of this program, "-dirty" if it was changed.
        extra: whatever else the training loop wants back (JSON).
        sequence: 1 for the first checkpoint ever written to its directory, then counting: the order of writing.
        saved_at: local time, ISO 8601.
        files: size in bytes of every other file of the checkpoint.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    seed: int
    objective: str
    vocabulary: Mapping[str, int]
    shape: Mapping[str, Any]
    data_order: Mapping[str, Any]
    config: Mapping[str, Any]
    world: Mapping[str, int]
    versions: Mapping[str, str]
    git_commit: str | None = None
    validation: Validation | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    sequence: int = 0
    saved_at: str = ""
    files: Mapping[str, int] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """Name of the checkpoint's directory."""
        return f"global_step{self.iteration}"


def describe_run(
    config: RunConfig,
    vocabulary: Vocabulary,
    topology: Topology,
    *,
    iteration: int,
    consumed_samples: int,
    commit: str | None,
    validation: Validation | None = None,
    extra: Mapping[str, Any] | None = None,
) -> CheckpointMetadata:
    """Return the metadata of a checkpoint of this run at this step.

    ``commit`` is :func:`git_commit`, asked once at the start: the files may change under a running program. A
    validation loss that is not finite is left out.
    """
    measured = validation is not None and math.isfinite(validation.loss)
    return CheckpointMetadata(
        iteration=iteration,
        consumed_samples=consumed_samples,
        consumed_tokens=consumed_samples * config.batch.seq_length,
        seed=config.parallel.seed,
        objective=config.objective.objective,
        vocabulary={"num_tokens": vocabulary.num_tokens, "padded_size": vocabulary.padded_size},
        shape=model_shape(config.model, vocabulary),
        data_order=_data_order(config),
        config=to_dict(config),
        world=world_layout(topology),
        versions=library_versions(),
        git_commit=commit,
        validation=validation if measured else None,
        extra=dict(extra or {}),
    )


def check_compatible(
    saved: CheckpointMetadata, config: RunConfig, vocabulary: Vocabulary, *, finetune: bool = False
) -> None:
    """Check that this run can continue from a checkpoint.

    The model must be the same one. Unless ``finetune`` (weights only, from sample 0), the objective and what decides
    the order of the samples must be the same too, or samples would be read twice or never without a word. A run with
    ``--skip-train`` reads no samples, but measures with its own objective, which must be the checkpoint's.

    Raises:
        UserError: one line with every flag that differs.
    """
    different = _differences(saved.shape, model_shape(config.model, vocabulary))
    if config.evaluation.skip_train:
        if saved.objective != config.objective.objective:
            raise UserError(
                f"--load: checkpoint {saved.tag} was trained as {saved.objective}, this entry point measures "
                f"{config.objective.objective}: use the other one"
            )
    elif not finetune:
        order = _differences(saved.data_order, _data_order(config)) + _other_objective(saved, config)
        if order and not different:
            raise UserError(
                f"--load: checkpoint {saved.tag} cannot be continued with {'; '.join(order)}: "
                "give the saved values, or --finetune to start from its weights at sample 0"
            )
        different += order
    if different:
        found = "; ".join(different)
        raise UserError(f"--load: checkpoint {saved.tag} holds another model: {found}: give the saved values")


def other_model(saved: CheckpointMetadata, config: RunConfig, vocabulary: Vocabulary) -> list[str]:
    """Return ``flag old -> new`` for all in which the model of a checkpoint, or what it was trained for, is another."""
    return _differences(saved.shape, model_shape(config.model, vocabulary)) + _other_objective(saved, config)


def _other_objective(saved: CheckpointMetadata, config: RunConfig) -> list[str]:
    old, new = saved.objective, config.objective.objective
    return [] if old == new else [f"objective {old} -> {new}"]


def changed_settings(saved: CheckpointMetadata, config: RunConfig) -> list[str]:
    """Return ``flag old -> new`` for every setting that differs from the checkpoint's, paths and intervals left out.

    Changing them is allowed, but never silent: the caller prints them. What the checkpoint does not record (imported
    weights say nothing of optimizer and data) has not changed, and what ``shape`` holds has been compared, resolved.
    """
    old, new = _by_flag(saved.config), _by_flag(to_dict(config))
    recorded = [flag for flag in old if flag not in saved.shape]
    return _differences({flag: old[flag] for flag in recorded}, {flag: new[flag] for flag in recorded})


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """Parse ``run.json`` of a checkpoint directory.

    Raises:
        UserError: it is missing, damaged or of another format; the message names it.
    """
    path = checkpoint / METADATA_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            raise UserError(f"{path} is not of format {FORMAT}: load it with the version that wrote it")
        fields.pop("tag")
        fields["validation"] = None if fields["validation"] is None else Validation(**fields["validation"])
        metadata = CheckpointMetadata(**fields)
        _check_types(metadata)
        return metadata
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {checkpoint} is no checkpoint of this program") from None
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): use another checkpoint") from error


def _check_types(metadata: CheckpointMetadata) -> None:
    """Raise TypeError where a value cannot be what it says."""
    for name in ("iteration", "consumed_samples", "consumed_tokens", "sequence"):
        value = getattr(metadata, name)
        if not isinstance(value, int) or value < 0:
            raise TypeError(f"{name} is {value!r}")
    for name in ("vocabulary", "shape", "data_order", "config", "world", "versions", "extra", "files"):
        if not isinstance(getattr(metadata, name), dict):
            raise TypeError(f"{name} is no object")
    for name, size in {**metadata.files, **metadata.world}.items():
        if not isinstance(size, int):
            raise TypeError(f"{name}: {size!r} is no whole number")
    loss = None if metadata.validation is None else metadata.validation.loss
    if not isinstance(metadata.seed, int) or not isinstance(loss, int | float | None):
        raise TypeError("seed or validation loss is no number")


def as_json(metadata: CheckpointMetadata) -> dict[str, Any]:
    """Return the object that :func:`read_metadata` reads."""
    return {"format": FORMAT, "tag": metadata.tag, **dataclasses.asdict(metadata)}


def world_layout(topology: Topology) -> dict[str, int]:
    """Return the sizes of the process grid."""
    return {
        "world_size": topology.world_size,
        "data_parallel_size": topology.data_parallel_size,
        "tensor_parallel_size": topology.tensor_parallel_size,
        "pipeline_parallel_size": topology.pipeline_parallel_size,
    }


def library_versions() -> dict[str, str]:
    """Return the versions that results may depend on; FlashAttention's where it is installed."""
    versions = {"megatron": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("deepspeed", "numpy", "tokenizers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions[FLASH] = importlib.metadata.version(FLASH)
    return versions | {"cuda": torch.version.cuda or "none"}


def git_commit() -> str | None:
    """Return the commit of this program's working tree, "-dirty" appended if tracked files differ; None outside git."""
    here = Path(__file__).resolve().parents[1]
    try:
        found = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty",
             "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def model_shape(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return flag -> value of everything that the weights' shapes and meaning depend on, defaults resolved."""
    shape = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.ffn_size,
        "--num-attention-heads": model.num_attention_heads,
        "--num-key-value-heads": model.num_kv_heads,
        "--kv-channels": model.head_size,
        "--normalization": model.normalization,
        "--layernorm-epsilon": model.layernorm_epsilon,
        "--swiglu": model.swiglu,
        "--disable-bias-linear": model.disable_bias_linear,
        "--untie-embeddings-and-output-weights": model.untie_embeddings_and_output_weights,
        "--use-rotary-position-embeddings": model.use_rotary_position_embeddings,
        "tokens of the vocabulary": vocabulary.num_tokens,
        "padded vocabulary (--make-vocab-size-divisible-by)": vocabulary.padded_size,
    }
    if model.use_rotary_position_embeddings:
        return shape | {"--rope-theta": model.rope_theta}
    # Learned positions are rows of a matrix.
    return shape | {"--max-position-embeddings": model.max_position_embeddings}


def _data_order(config: RunConfig) -> dict[str, Any]:
    return {
        "--seq-length": config.batch.seq_length,
        "--seed": config.parallel.seed,
        "--epoch-rule": config.data.epoch_rule,
        "--unique-tokens": config.data.unique_tokens,
    }


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [*old, *(name for name in new if name not in old)]
    return [f"{n} {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def _by_flag(config: Mapping[str, Any]) -> dict[str, Any]:
    """flag -> value of the settings in a configuration's JSON that make a run what it is; no others than are there."""
    found = {}
    for concern, cls in concern_types().items():
        if concern in ("checkpoint", "logging"):
            continue
        values = config.get(concern, {})
        for setting in dataclasses.fields(cls):
            if setting.name in values and setting.name not in _NOT_COMPARED:
                found[flag_of(setting)] = values[setting.name]
    return found
