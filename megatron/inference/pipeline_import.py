"""Checkpoints of Megatron-DeepSpeed's pipeline engine: ``layer_XX-model_YY-model_states.pt``.

One file a pipeline layer XX and tensor-parallel rank YY. The embedding comes first, then the transformer blocks, then
the final norm; an untied model has its output matrix behind it. Rows of ``query_key_value`` are [q; k; v] and rows of
``dense_h_to_4h`` are [gate; up], on every tensor-parallel rank of its own heads and features; ``dense`` and
``dense_4h_to_h`` are split by columns, the embedding by rows. Everything but the number of heads follows from the
shapes.

Layers without weights have no file: none behind the embedding and none before the final norm, or one in both places
(the transposes of older versions). Any other gap in the numbers is a file that is missing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from megatron.config import ModelConfig
from megatron.errors import UserError
from megatron.files import describe, read_text
from megatron.inference.safe_load import load_file
from megatron.tokenizer import Vocabulary, build_vocabulary

_FILE: Final = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_NO_WEIGHTS: Final = ("inv_freq", "_extra_state")
_SPLIT: Final = ("query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight", "dense_h_to_4h.bias")
_EMBEDDING: Final = ("word_embeddings.weight",)
_BLOCK: Final = (
    "self_attention.query_key_value.weight", "self_attention.dense.weight", "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
)

Layer = list[dict[str, Tensor]]
"""One pipeline layer: its tensors by name, a mapping for each tensor-parallel rank."""


@dataclass(frozen=True)
class ImportOptions:
    """What the files do not say. None: inferred from the shapes, or the default named here.

    Attributes:
        num_attention_heads: query heads.
        vocab_size: real tokens; the mask id follows them. None: every row of the embedding is a token (AR only).
        max_position_embeddings: None: 2048, or the rows of the learned positions.
    """

    objective: str
    num_attention_heads: int
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    layernorm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    make_vocab_size_divisible_by: int = 128


@dataclass(frozen=True)
class ImportedModel:
    """Weights under our names, and the model they make."""

    weights: dict[str, Tensor]
    config: ModelConfig
    vocabulary: Vocabulary


def import_pipeline_checkpoint(directory: Path, options: ImportOptions) -> ImportedModel:
    """Read, merge and rename a Megatron-DeepSpeed pipeline checkpoint.

    Raises:
        UserError: files are missing, mixed, of an unknown form, or hold more than tensors.
    """
    directory = _resolve(directory)
    embedding, blocks, tail = _by_role(read_layers(directory), directory)
    recorded = _recorded_layers(directory)
    if recorded not in (None, len(blocks)):
        raise UserError(
            f"--input {directory}: has {len(blocks)} transformer layers, but the arguments of the run that saved it "
            f"say --num-layers {recorded}: layer files are missing, or of another run"
        )
    words = _rows(embedding, "word_embeddings.weight")  # [V, h]
    positions = embedding[0].get("position_embeddings.weight")
    config = _infer(words, positions, blocks[0], len(blocks), len(tail) > 1, options)
    vocabulary = _vocabulary(len(words), len(embedding), options)
    weights = {"layers.0.word_embeddings.weight": _resize(words, vocabulary.padded_size)}
    if positions is not None:
        weights["layers.0.position_embeddings.weight"] = _same(embedding, "position_embeddings.weight")
    for index, block in enumerate(blocks, start=1):
        weights |= {f"layers.{index}.{name}": value for name, value in _merge_block(block, config).items()}
    for name in tail[0][0]:
        weights[f"layers.{len(blocks) + 1}.final_layernorm.{name.rpartition('.')[2]}"] = _same(tail[0], name)
    if len(tail) > 1:
        (name,) = tail[1][0]
        weights[f"layers.{len(blocks) + 2}.weight"] = _resize(_rows(tail[1], name), vocabulary.padded_size)
    return ImportedModel({name: value.float() for name, value in weights.items()}, config, vocabulary)


def _resolve(directory: Path) -> Path:
    """``directory`` if it holds layer files, else the one that its ``latest`` file names."""
    if any(directory.glob("layer_*")):
        return directory
    try:
        latest = read_text(directory / "latest")
    except OSError as error:
        raise UserError(f"--input {directory / 'latest'} cannot be read: {describe(error)}") from error
    return directory if latest is None else directory / latest.strip()


def read_layers(directory: Path) -> dict[int, Layer]:
    """The layers by number, in order, each with the tensors of all its tensor-parallel ranks."""
    files: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.glob("layer_*.pt")):
        match = _FILE.fullmatch(path.name)
        if match is not None:
            files.setdefault(int(match[1]), {})[int(match[2])] = path
    if not files:
        raise UserError(f"--input {directory}: has no layer_XX-model_YY-model_states.pt: no pipeline checkpoint")
    ranks = max(len(found) for found in files.values())
    for index, found in files.items():
        missing = set(range(ranks)) - found.keys()
        if missing:
            name = _file_name(index, min(missing))
            raise UserError(f"--input {directory}: {name} is missing ({ranks} tensor-parallel ranks)")
    return {index: [_tensors(found[rank]) for rank in range(ranks)] for index, found in sorted(files.items())}


def _file_name(index: int, rank: int) -> str:
    return f"layer_{index:02d}-model_{rank:02d}-model_states.pt"


class _Arguments:
    """Stands for the record of attributes that holds a run's flags."""


def _recorded_layers(directory: Path) -> int | None:
    """``--num-layers`` of the run that saved the files, None where nothing readable says it."""
    path = directory / "mp_rank_00_model_states.pt"
    if not path.is_file():
        return None
    try:
        with torch.serialization.safe_globals([(_Arguments, "argparse.Namespace")]):
            state = load_file(path)
    except UserError:  # arguments that hold objects of that program
        return None
    found = getattr(state.get("args") if isinstance(state, Mapping) else None, "num_layers", None)
    return found if isinstance(found, int) else None


def _tensors(path: Path) -> dict[str, Tensor]:
    state = load_file(path)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor | None) for name, value in state.items()
    ):
        raise UserError(f"{path} is not a layer of a pipeline checkpoint: it holds more than named tensors")
    return {
        name.replace("attention.", "self_attention.", 1) if name.startswith("attention.") else name: value
        for name, value in state.items() if value is not None and not name.endswith(_NO_WEIGHTS)
    }


def _by_role(layers: Mapping[int, Layer], directory: Path) -> tuple[Layer, list[Layer], list[Layer]]:
    """Embedding, blocks, and the final norm with the output matrix if there is one; told by their tensors."""
    where = f"--input {directory}:"
    numbers = [number for number, layer in layers.items() if layer[0]]
    filled = [layers[number] for number in numbers]
    is_block = ["mlp.dense_4h_to_h.weight" in layer[0] for layer in filled]
    count = sum(is_block)
    if not filled or "word_embeddings.weight" not in filled[0][0]:
        raise UserError(f"{where} the first layer with weights is no embedding (layer_01 missing?)")
    if count == 0 or is_block[1 : 1 + count] != [True] * count:
        raise UserError(f"{where} transformer layers must follow the embedding; found {count}, not in a row")
    tail = filled[1 + count :]
    if not tail or not {"weight", "final_layernorm.weight"} & tail[0][0].keys() or len(tail) > 2:
        raise UserError(f"{where} {count} transformer layers, then no final norm (a file missing or too many?)")
    if next(iter(tail[0][0].values())).dim() != 1 or (len(tail) == 2 and len(tail[1][0]) != 1):
        raise UserError(f"{where} the layers after the transformer are not a final norm and an output matrix")
    absent = _absent(numbers, count)
    if absent is not None:
        raise UserError(f"{where} {_file_name(absent, 0)} is missing, or empty: found layers {_ranges(numbers)}")
    for number, layer, expected in zip(numbers, filled, [_EMBEDDING, *[_BLOCK] * count, (), ()], strict=False):
        _check_matrices(f"{where} layer_{number:02d}", layer, expected)
    if len(tail) == 2:
        _check_matrices(f"{where} layer_{numbers[-1]:02d}", tail[1], tuple(tail[1][0]))
    shapes = {
        tuple((name, value.shape) for name, value in sorted(rank.items()))
        for block in filled[1 : 1 + count] for rank in block
    }
    if len(shapes) != 1:
        raise UserError(f"{where} transformer layers differ in shape: files of several checkpoints are mixed")
    return filled[0], filled[1 : 1 + count], tail


def _check_matrices(where: str, layer: Layer, names: Sequence[str]) -> None:
    """The ranks hold tensors of the same names and shapes, among them matrices called ``names``."""
    for name in names:
        if name not in layer[0] or layer[0][name].dim() != 2:
            found = f"shape {tuple(layer[0][name].shape)}" if name in layer[0] else "nothing"
            raise UserError(f"{where}: {name} must be a matrix, found {found}")
    shapes = {tuple((name, value.shape) for name, value in sorted(rank.items())) for rank in layer}
    if len(shapes) != 1:
        raise UserError(f"{where}: tensor-parallel ranks differ in shape: files of several checkpoints are mixed")


def _absent(numbers: Sequence[int], blocks: int) -> int | None:
    """The first number that must have a file and has none; ``numbers`` are the embedding's, ``blocks``, the tail's."""
    before, after = numbers[1] - numbers[0] - 1, numbers[blocks + 1] - numbers[blocks] - 1
    gap = 1 if before and after else 0  # layers without weights there
    allowed = {0: gap, blocks: gap}
    for index, (number, following) in enumerate(itertools.pairwise(numbers)):
        if following - number - 1 > allowed.get(index, 0):
            return number + 1 + (gap if index == 0 else 0)
    return None


def _ranges(numbers: Sequence[int]) -> str:
    """``1, 3-5``."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _infer(
    words: Tensor, positions: Tensor | None, block: Layer, num_layers: int, untied: bool, options: ImportOptions
) -> ModelConfig:
    """The model's configuration from the shapes of one block."""
    heads = options.num_attention_heads
    projected = sum(rank["self_attention.dense.weight"].shape[1] for rank in block)  # heads * head size
    mixed = sum(rank["self_attention.query_key_value.weight"].shape[0] for rank in block)
    ffn = sum(rank["mlp.dense_4h_to_h.weight"].shape[1] for rank in block)
    inner = sum(rank["mlp.dense_h_to_4h.weight"].shape[0] for rank in block)
    head_size, left = divmod(projected, heads)
    kv_heads, odd = divmod(mixed - projected, 2 * head_size) if head_size else (0, 1)
    whole = kv_heads >= 1 and not (left or odd or heads % kv_heads or heads % len(block) or kv_heads % len(block))
    if not whole or inner not in (ffn, 2 * ffn):
        raise UserError(
            f"--num-attention-heads {heads} does not fit: attention is {projected} wide, with {mixed} rows of q, k and "
            f"v on {len(block)} tensor-parallel ranks"
        )
    length = options.max_position_embeddings
    if length is None:
        length = 2048 if positions is None else len(positions)
    if positions is not None and length != len(positions):
        raise UserError(f"--max-position-embeddings {length}, but {len(positions)} positions were learned")
    return ModelConfig(
        num_layers=num_layers, hidden_size=words.shape[1], num_attention_heads=heads, num_key_value_heads=kv_heads,
        kv_channels=head_size, ffn_hidden_size=ffn, max_position_embeddings=length,
        use_rotary_position_embeddings=positions is None, rope_theta=options.rope_theta,
        normalization="layernorm" if "input_layernorm.bias" in block[0] else "rmsnorm",
        layernorm_epsilon=options.layernorm_epsilon, swiglu=inner == 2 * ffn,
        disable_bias_linear="self_attention.dense.bias" not in block[0],
        untie_embeddings_and_output_weights=untied, make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
    )


def _vocabulary(rows: int, ranks: int, options: ImportOptions) -> Vocabulary:
    """Without --vocab-size every row of an AR model is a token, as in the program that trained it.

    That program pads to a multiple of 128 (or what --make-vocab-size-divisible-by says) on each of ``ranks``.
    """
    if options.vocab_size is None and options.objective == "mdm":
        raise UserError("--objective mdm needs --vocab-size (or a tokenizer): the mask id follows the tokens")
    tokens = rows if options.vocab_size is None else options.vocab_size
    needed = tokens + (options.objective == "mdm")
    if needed > rows:
        raise UserError(f"--vocab-size {tokens} needs {needed} rows of the embedding, but the checkpoint has {rows}")
    padding = max(128, options.make_vocab_size_divisible_by) * ranks
    if rows - tokens > padding:
        raise UserError(
            f"--vocab-size {tokens} (or the tokenizer) leaves out {rows - tokens} rows of the embedding, of {rows}: "
            f"more than the {padding} that padding can add (128, or --make-vocab-size-divisible-by, for each of the "
            f"{ranks} tensor-parallel ranks)"
        )
    return build_vocabulary(tokens, options.make_vocab_size_divisible_by)


def _merge_block(block: Layer, config: ModelConfig) -> dict[str, Tensor]:
    """One transformer layer, its tensor-parallel ranks merged."""
    query = config.num_attention_heads * config.head_size // len(block)
    key = config.num_kv_heads * config.head_size // len(block)
    ffn = config.ffn_size // len(block)
    sections = {"query_key_value": [query, key, key], "dense_h_to_4h": [ffn, ffn] if config.swiglu else [ffn]}
    merged = {}
    for name in block[0]:
        if name.endswith(_SPLIT):
            merged[name] = _interleaved(block, name, sections[name.split(".")[-2]])
        elif name.endswith(("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")):
            merged[name] = torch.cat([rank[name] for rank in block], dim=1)
        else:  # norms, and the biases that are added once
            merged[name] = _same(block, name)
    return merged


def _interleaved(layer: Layer, name: str, sections: Sequence[int]) -> Tensor:
    """Rows [a_0; b_0], [a_1; b_1], ... of the ranks -> [a_0; a_1; ...; b_0; b_1; ...]."""
    if len(layer[0][name]) != sum(sections):
        raise UserError(f"{name} has {len(layer[0][name])} rows on a rank, its layer asks for {sum(sections)}")
    parts = [rank[name].split(list(sections)) for rank in layer]
    return torch.cat([torch.cat(section) for section in zip(*parts, strict=True)])


def _rows(layer: Layer, name: str) -> Tensor:
    return torch.cat([rank[name] for rank in layer])


def _same(layer: Layer, name: str) -> Tensor:
    """A tensor that every tensor-parallel rank holds whole."""
    first = layer[0][name]
    if any(not torch.equal(first, rank[name]) for rank in layer[1:]):
        raise UserError(f"tensor-parallel ranks disagree on {name}: files of several checkpoints are mixed")
    return first


def _resize(matrix: Tensor, rows: int) -> Tensor:
    """Cut or pad a vocabulary matrix [V, h] to ``rows``; rows beyond the mask id are never used."""
    return torch.nn.functional.pad(matrix[:rows].float(), (0, 0, 0, max(0, rows - len(matrix))))
