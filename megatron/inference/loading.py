"""A trained model, ready to be asked: from a checkpoint directory to the model, its vocabulary and its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from megatron.checkpointing import CheckpointStore
from megatron.config import ModelConfig, TokenizerConfig
from megatron.distributed.topology import single_process_topology
from megatron.errors import UserError
from megatron.inference.weights import WEIGHTS_FILE, full_weights, load_weights, write_safetensors
from megatron.model.gpt import build_layers
from megatron.model.sharding import SequentialGPT
from megatron.options import Options
from megatron.run_metadata import METADATA_FILE, CheckpointMetadata, git_commit, library_versions, model_shape
from megatron.tokenizer import Tokenizer, Vocabulary, build_tokenizer

OBJECTIVES: Final = ("ar", "mdm")
_OF_TRAINING: Final = frozenset((
    "attention_dropout", "hidden_dropout", "checkpoint_activations", "recompute_granularity", "recompute_method",
    "recompute_num_layers",
))
"""Settings of the model that weights alone do not tell."""
Concern = TypeVar("Concern", bound=Options)


@dataclass(frozen=True)
class Description:
    """What a checkpoint's ``run.json`` says of its model.

    Attributes:
        path: the ``global_step{N}`` directory.
        model: shape of the transformer.
        objective: "ar" (causal) or "mdm" (bidirectional, predicts the masked tokens).
        seq_length: tokens of a training sample: the longest sequence the model is used with.
        tokenizer: what it was trained with; None for an import that named none.
        metadata: all of ``run.json``.
    """

    path: Path
    model: ModelConfig
    objective: str
    vocabulary: Vocabulary
    seq_length: int
    tokenizer: TokenizerConfig | None
    metadata: CheckpointMetadata

    @property
    def causal(self) -> bool:
        """Whether each position sees its past only."""
        return self.objective == "ar"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with everything that is needed to use it."""

    model: SequentialGPT
    description: Description
    tokenizer: Tokenizer | None

    @property
    def vocabulary(self) -> Vocabulary:
        """Tokens, mask id and padded size."""
        return self.description.vocabulary

    @property
    def causal(self) -> bool:
        """Whether the model is autoregressive (True) or masked-diffusion (False)."""
        return self.description.causal

    @property
    def seq_length(self) -> int:
        """Longest sequence, in tokens, that the model was trained on."""
        return self.description.seq_length

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def needs_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: the checkpoint names none, and no flag did.
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self.description.path} names no tokenizer: give --vocab-file and --merge-file, or --tokenizer-model"
            )
        return self.tokenizer


def find_checkpoint(directory: str | Path, tag: str | None = None) -> Path:
    """The ``global_step{N}`` directory: ``directory`` itself, or ``tag`` in it (None: the latest).

    Raises:
        UserError: there is none, or it is incomplete.
    """
    path = Path(directory)
    if (path / METADATA_FILE).is_file() and tag is None:
        path, tag = path.absolute().parent, path.absolute().name
    store = CheckpointStore(path)
    found = store.resolve(tag)
    if found is None:
        raise UserError(f"{path}: holds no checkpoint")
    return store.directory / found


def describe_checkpoint(path: Path, metadata: CheckpointMetadata) -> Description:
    """Read the parts of ``run.json`` that a model is built from.

    Raises:
        UserError: they are missing or contradict each other.
    """
    try:
        objective = metadata.objective
        if objective not in OBJECTIVES:
            raise UserError(f"{path / METADATA_FILE}: objective {objective!r} is neither ar nor mdm")
        recorded = metadata.config.get("tokenizer")
        return Description(
            path=path,
            model=_concern(ModelConfig, metadata.config["model"]),
            objective=objective,
            vocabulary=Vocabulary(**metadata.vocabulary),
            seq_length=int(metadata.config["batch"]["seq_length"]),
            tokenizer=None if recorded is None else _concern(TokenizerConfig, recorded),
            metadata=metadata,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / METADATA_FILE} describes no model ({error}): use another checkpoint") from error


def _concern(cls: type[Concern], values: Mapping[str, Any]) -> Concern:
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def load_model(
    directory: str | Path,
    tag: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: TokenizerConfig | None = None,
) -> LoadedModel:
    """Load a model of ours, trained, imported or of any topology, for use on one device.

    Args:
        directory: checkpoint directory, or one ``global_step{N}`` in it.
        tag: which checkpoint (None: the latest).
        device: where it computes; dtype: of weights and activations (losses are fp32 in any case).
        tokenizer: used instead of the recorded one, whose files may lie elsewhere on this machine.

    Raises:
        UserError: no complete checkpoint there, damaged files, a tokenizer that is missing or has other tokens.
    """
    path = find_checkpoint(directory, tag)
    description = describe_checkpoint(path, CheckpointStore(path.parent).metadata(path.name))
    return LoadedModel(
        model=build(description, full_weights(path), device, dtype),
        description=description,
        tokenizer=_tokenizer(description, tokenizer),
    )


def build(
    description: Description, weights: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> SequentialGPT:
    """The described model with ``weights``, in evaluation mode, without gradients."""
    vocabulary = description.vocabulary
    with torch.device(device):
        layers = build_layers(description.model, vocabulary.padded_size, vocabulary.num_tokens, description.causal)
    model = SequentialGPT(layers, description.model).to(dtype).eval().requires_grad_(False)
    load_weights(model, weights)
    return model


def _tokenizer(description: Description, given: TokenizerConfig | None) -> Tokenizer | None:
    config = given or description.tokenizer
    if config is None:
        return None
    tokenizer = build_tokenizer(config)
    check_tokenizer(tokenizer, description.vocabulary, str(description.path))
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocabulary: Vocabulary, source: str) -> None:
    """Raise UserError if ``tokenizer`` has not the tokens of the model that lies at ``source``."""
    if tokenizer.vocab_size != vocabulary.num_tokens:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model of {source} has {vocabulary.num_tokens}: "
            "give the tokenizer that it was trained with"
        )


def save_weights(
    directory: str | Path,
    weights: Mapping[str, Tensor],
    *,
    model: ModelConfig,
    objective: str,
    vocabulary: Vocabulary,
    seq_length: int,
    tokenizer: TokenizerConfig | None,
    source: str,
) -> Path:
    """Write a weights-only checkpoint, ``directory/global_step0``, complete or not at all; returns its path.

    ``source`` says where the weights come from. What nobody knows of them (optimizer, data, schedule) is left out of
    ``run.json``: training continues from it with ``--finetune``.

    Raises:
        UserError: ``directory`` already holds something; the weights do not fit the description.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output {target} exists already: name a new directory")
    config: dict[str, Any] = {
        "model": {name: value for name, value in dataclasses.asdict(model).items() if name not in _OF_TRAINING},
        "objective": {"objective": objective},
        "batch": {"seq_length": seq_length},
    }
    if tokenizer is not None:
        config["tokenizer"] = dataclasses.asdict(tokenizer)
    metadata = CheckpointMetadata(
        iteration=0, consumed_samples=0, consumed_tokens=0, seed=0, objective=objective,
        vocabulary=dataclasses.asdict(vocabulary),
        shape=model_shape(model, vocabulary), data_order={}, config=config, world={},
        versions=library_versions(), git_commit=git_commit(), extra={"source": source},
    )
    build(describe_checkpoint(target, metadata), weights, "cpu", torch.float32)  # every name and shape fits
    store, topology = CheckpointStore(target), single_process_topology()
    store.prepare(topology)

    def write(parent: Path, tag: str) -> None:
        write_safetensors(parent / tag / WEIGHTS_FILE, weights)

    return store.save(write, metadata, topology)
