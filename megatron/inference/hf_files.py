"""Hugging Face model directories on disk: written complete or not at all, read without running anything in them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from megatron.config import TokenizerConfig
from megatron.errors import UserError
from megatron.files import TEMPORARY, describe, remove, write_json
from megatron.inference import hub
from megatron.inference.hf_format import MASKED_DIFFUSION, HuggingFaceModel
from megatron.inference.weights import WEIGHTS_FILE, read_safetensors, write_safetensors
from megatron.tokenizer.gpt2_bpe import END_OF_TEXT, read_merges, read_vocabulary

_INDEX: Final = "model.safetensors.index.json"
_SHIPPED: Final = ("modeling_masked_diffusion.py", "unmasking.py")
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_directory(
    output: Path,
    model: HuggingFaceModel,
    card: str,
    dtype: torch.dtype,
    tokenizer: TokenizerConfig | None,
    eod: int | None,
    seq_length: int,
) -> None:
    """Write ``output``: config, weights, tokenizer, model card, and the modelling code of a masked-diffusion model.

    Raises:
        UserError: ``output`` holds something already, or the tokenizer's files cannot be used.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists already: name a new directory")
    temporary = output.with_name(f"{TEMPORARY}{output.name}")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {describe(error)}") from error
    try:
        weights = {name: value.to(dtype) for name, value in model.weights.items()}
        write_safetensors(temporary / WEIGHTS_FILE, weights, {"format": "pt"})
        name = str(dtype).removeprefix("torch.")
        write_json(temporary / "config.json", model.config | {"torch_dtype": name, "dtype": name})
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if model.config["model_type"] == MASKED_DIFFUSION:
            for file in _SHIPPED:
                shutil.copy(Path(hub.__file__).with_name(file), temporary)
        else:
            write_json(temporary / "generation_config.json", {"bos_token_id": eod, "eos_token_id": eod})
        if tokenizer is not None and eod is not None:
            _write_tokenizer(temporary, tokenizer, eod, seq_length)
        if output.exists():
            output.rmdir()
        os.rename(temporary, output)
    finally:
        remove(temporary)


def read_directory(directory: Path) -> HuggingFaceModel:
    """``config.json`` and all tensors, of one safetensors file or of several with an index.

    Raises:
        UserError: a file is missing or damaged, or the weights are pickled.
    """
    config = _read_json(directory / "config.json")
    if (directory / WEIGHTS_FILE).is_file():
        return HuggingFaceModel(config, _read_weights(directory / WEIGHTS_FILE))
    if not (directory / _INDEX).is_file():
        pickled = next(directory.glob("*.bin"), None)
        remedy = f"; {pickled.name} is pickled: save the model as safetensors" if pickled is not None else ""
        raise UserError(f"{directory} has no {WEIGHTS_FILE}{remedy}")
    places = _read_json(directory / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{directory / _INDEX} is damaged: weight_map does not say which tensor is in which file")
    files = {name: _read_weights(directory / Path(name).name) for name in sorted(set(places.values()))}
    try:
        return HuggingFaceModel(config, {tensor: files[name][tensor] for tensor, name in places.items()})
    except KeyError as error:
        raise UserError(f"{directory / _INDEX} does not fit its files: {error} is missing") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb"):  # safetensors takes whatever it cannot open for missing
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be read: {describe(error)}") from error
    return read_safetensors(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a Hugging Face model directory") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {describe(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return content


def _write_tokenizer(directory: Path, config: TokenizerConfig, eod: int, seq_length: int) -> None:
    """The tokenizer's own files where it has some, else a tokenizer.json made of GPT-2's two files."""
    if config.tokenizer_type == "GPT2BPETokenizer":
        assert config.vocab_file is not None and config.merge_file is not None
        library = _gpt2(Path(config.vocab_file), Path(config.merge_file))
        library.save(str(directory / "tokenizer.json"))
    else:
        assert config.tokenizer_model is not None
        source = Path(config.tokenizer_model).expanduser()
        if source.is_dir() and (source / "tokenizer.json").is_file():
            for name in _TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copy(source / name, directory)
        elif source.suffix == ".json" and source.is_file():
            shutil.copy(source, directory / "tokenizer.json")
        else:
            _write_with_transformers(config.tokenizer_model, directory)
    if not (directory / "tokenizer_config.json").is_file() and (directory / "tokenizer.json").is_file():
        end = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).id_to_token(eod)
        write_json(directory / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
            "model_max_length": seq_length, "clean_up_tokenization_spaces": False,
        })


def _gpt2(vocab_file: Path, merge_file: Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer as others know it: the end of document is a special token."""
    library = tokenizers.Tokenizer(models.BPE(read_vocabulary(vocab_file), read_merges(merge_file)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return library


def _write_with_transformers(name: str, directory: Path) -> None:
    """A SentencePiece model or a hub name: whatever transformers makes of it."""
    from transformers import AutoTokenizer

    source = Path(name).expanduser()
    AutoTokenizer.from_pretrained(str(source.parent) if source.is_file() else name).save_pretrained(directory)
