"""Checkpoints in and out: equal logits in transformers, equal losses from Megatron-DeepSpeed, bit-equal round trips."""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers

from megatron.config import ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.inference.loading import load_model, save_weights
from megatron.inference.weights import full_weights, read_safetensors, write_safetensors
from megatron.model.gpt import build_layers
from megatron.model.sharding import SequentialGPT
from megatron.tokenizer import build_tokenizer, build_vocabulary
from tools.convert_checkpoint import main

LLAMA: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "ffn_hidden_size": 48,
    "max_position_embeddings": 64, "normalization": "rmsnorm", "use_rotary_position_embeddings": True, "swiglu": True,
    "disable_bias_linear": True, "rope_theta": 5000.0,
}
GPT2: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
LENGTH = 48


def random_weights(config: ModelConfig, padded: int) -> dict[str, torch.Tensor]:
    """Every parameter random (norms around 1, padding too), large enough that each one matters."""
    layers = build_layers(config, padded, padded - 1, causal=True)
    generator = torch.Generator().manual_seed(4)
    return {
        name: ("norm" in name and name.endswith("weight")) + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in SequentialGPT(layers, config).named_parameters()
    }


@pytest.fixture
def make_checkpoint(tmp_path: Path, byte_tokenizer: Path) -> Callable[..., Path]:
    """``make_checkpoint(objective, **model)``: a weights-only checkpoint over the byte tokenizer's 257 tokens."""

    def make(objective: str, **model: Any) -> Path:
        config = ModelConfig(**model)
        tokenizer = TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(byte_tokenizer))
        vocabulary = build_vocabulary(build_tokenizer(tokenizer).vocab_size, 64)
        directory = tmp_path / "ours"
        save_weights(
            directory, random_weights(config, vocabulary.padded_size), model=config, objective=objective,
            vocabulary=vocabulary, seq_length=LENGTH, tokenizer=tokenizer, source="test",
        )
        return directory

    return make


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies modelling code that it is trusted to run: not into the user's cache."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def convert(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def our_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    loaded = load_model(directory)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return loaded.model.logits(tokens, positions)[..., : loaded.vocabulary.num_tokens]


SHAPES = [
    pytest.param("ar", LLAMA, id="llama"),
    pytest.param("ar", LLAMA | {"untie_embeddings_and_output_weights": True, "kv_channels": 12}, id="llama-untied"),
    pytest.param("ar", LLAMA | {"disable_bias_linear": False}, id="llama-biases"),
    pytest.param("ar", GPT2, id="gpt2"),
    pytest.param("ar", GPT2 | {"untie_embeddings_and_output_weights": True, "ffn_hidden_size": 40}, id="gpt2-untied"),
    pytest.param("mdm", LLAMA, id="mdm"),
    pytest.param("mdm", LLAMA | {"untie_embeddings_and_output_weights": True}, id="mdm-untied"),
    pytest.param("mdm", GPT2, id="mdm-gpt2-shape"),
]


@pytest.mark.parametrize(("objective", "shape"), SHAPES)
def test_export_gives_equal_logits_and_comes_back_bit_identical(
    make_checkpoint: Callable[..., Path], tmp_path: Path, objective: str, shape: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs, back = make_checkpoint(objective, **shape), tmp_path / "hf", tmp_path / "back"
    convert("to-hf", "--input", ours, "--output", theirs)
    tokens = torch.randint(0, 257, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    if objective == "ar":
        model = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    else:
        tokens[:, ::3] = 257  # the mask id
        model = transformers.AutoModelForMaskedLM.from_pretrained(theirs, trust_remote_code=True, dtype=torch.float32)
    model.eval()
    expected = our_logits(ours, tokens)
    assert expected.std() > 0.5
    with torch.no_grad():
        found = model(input_ids=tokens).logits
    assert found.shape[-1] == 257 + (objective == "mdm")
    torch.testing.assert_close(found[..., :257], expected, rtol=1e-5, atol=1e-5)
    if objective == "mdm":
        assert torch.all(found[..., 257] == -torch.inf)
    convert("from-hf", "--input", theirs, "--output", back, "--make-vocab-size-divisible-by", "64")
    before, after = full_weights(ours / "global_step0"), full_weights(back / "global_step0")
    assert before.keys() == after.keys()
    kept = 257 + (objective == "mdm")
    for name, value in before.items():
        rows = kept if value.shape[0] == 320 else value.shape[0]
        assert torch.equal(value[:rows], after[name][:rows]), name
    assert torch.equal(our_logits(back, tokens), expected)
    again, saved = load_model(back).description, load_model(ours).description
    assert (again.objective, again.vocabulary) == (saved.objective, saved.vocabulary)
    assert again.model.num_kv_heads == saved.model.num_kv_heads and again.model.rope_theta == saved.model.rope_theta


def test_exported_tokenizer_card_and_generation(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = make_checkpoint("ar", **LLAMA), tmp_path / "hf"
    convert("to-hf", "--input", ours, "--output", theirs, "--dtype", "bf16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    assert tokenizer("a b").input_ids == list(b"a b") and tokenizer.eos_token_id == 256
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs)
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 256
    prompt = tokenizer("a b", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] <= 6
    card = (theirs / "README.md").read_text()
    assert "library_name: transformers" in card and "architecture | llama" in card and "imported" in card
    assert not list(theirs.glob("*.py"))


def test_exported_masked_model_generates(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = make_checkpoint("mdm", **LLAMA), tmp_path / "hf"
    convert("to-hf", "--input", ours, "--output", theirs)
    model = transformers.AutoModelForMaskedLM.from_pretrained(theirs, trust_remote_code=True, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs, trust_remote_code=True)
    assert tokenizer("a b").input_ids == list(b"a b")
    card = (theirs / "README.md").read_text()
    assert "trust_remote_code=True" in card and "mask id 257" in card and "pipeline_tag: fill-mask" in card
    prompt = torch.tensor([[10, 11, 12]])
    found = model.generate(prompt, max_new_tokens=5, tokens_per_step=2)
    assert found.shape == (1, 8) and torch.equal(found[:, :3], prompt) and int(found.max()) < 257
    padded = torch.tensor([[256, 256, 10, 11, 12]])
    same = model.generate(padded, max_new_tokens=5, tokens_per_step=2, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    assert torch.equal(same[:, 2:], found)
    infilled = model.generate(torch.tensor([[10, 257, 12, 257]]), order="left-to-right", temperature=1.0, guidance=0.5)
    assert infilled.shape == (1, 4) and infilled[0, 0] == 10 and infilled[0, 2] == 12 and int(infilled.max()) < 257


def test_models_in_several_files_and_with_gpt2s_first_names_come_in(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    ours, theirs = make_checkpoint("ar", **GPT2), tmp_path / "hf"
    convert("to-hf", "--input", ours, "--output", theirs)
    weights = read_safetensors(theirs / "model.safetensors")
    for index in range(2):  # buffers of older versions
        weights[f"transformer.h.{index}.attn.bias"] = torch.ones(1, 1, 64, 64)
        weights[f"transformer.h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    (theirs / "model.safetensors").unlink()
    places = {}
    for index, name in enumerate(sorted(weights)):
        places[name.removeprefix("transformer.")] = f"model-0000{1 + index % 2}-of-00002.safetensors"
    for file in set(places.values()):
        own = {name: weights[f"transformer.{name}"] for name, place in places.items() if place == file}
        write_safetensors(theirs / file, own)
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    convert("from-hf", "--input", theirs, "--output", tmp_path / "back", "--make-vocab-size-divisible-by", "64")
    tokens = torch.arange(20).unsqueeze(0)
    assert torch.equal(our_logits(tmp_path / "back", tokens), our_logits(ours, tokens))


def test_gpt2s_two_files_become_a_tokenizer_json(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, "th", "the", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({entry: index for index, entry in enumerate(entries)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    config = ModelConfig(**LLAMA)
    tokenizer = TokenizerConfig(vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt"))
    save_weights(
        tmp_path / "ours", random_weights(config, 264), model=config, objective="ar",
        vocabulary=build_vocabulary(259, 8), seq_length=LENGTH, tokenizer=tokenizer, source="test",
    )
    convert("to-hf", "--input", tmp_path / "ours", "--output", tmp_path / "hf")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the bath, naïve \U0001f642 other"
    assert found(text).input_ids == build_tokenizer(tokenizer).encode(text)
    assert found.decode(found(text).input_ids) == text and found("<|endoftext|>").input_ids == [258]
    convert("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "back", "--make-vocab-size-divisible-by", "8")
    again = load_model(tmp_path / "back").needs_tokenizer()
    assert (again.eod, again.vocab_size) == (258, 259) and again.encode(text) == found(text).input_ids


@pytest.mark.parametrize(
    ("shape", "flag"),
    [
        (LLAMA | {"normalization": "layernorm"}, "--normalization layernorm"),
        (LLAMA | {"swiglu": False}, "GELU"),
        (GPT2 | {"normalization": "rmsnorm"}, "--normalization rmsnorm"),
        (GPT2 | {"disable_bias_linear": True}, "--disable-bias-linear"),
        (GPT2 | {"num_key_value_heads": 2}, "--num-key-value-heads"),
    ],
)
def test_shapes_without_a_standard_class_are_named(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    shape: dict[str, Any], flag: str,
) -> None:
    ours = make_checkpoint("ar", **shape)
    assert main(["to-hf", "--input", str(ours), "--output", str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert flag in error and error.count("\n") == 1 and not (tmp_path / "hf").exists()


# ---- Megatron-DeepSpeed


def write_pipeline(directory: Path, weights: dict[str, torch.Tensor], config: ModelConfig, ranks: int) -> None:
    """``weights`` as a Megatron-DeepSpeed pipeline checkpoint of ``ranks`` tensor-parallel ranks (independent code)."""
    directory.mkdir()
    size, heads, kv = config.head_size, config.num_attention_heads, config.num_kv_heads

    def heads_of(matrix: torch.Tensor, rank: int) -> torch.Tensor:
        """Own heads of q, k and v, one after the other."""
        q, k, v = np.split(np.arange(len(matrix)), [heads * size, (heads + kv) * size])
        return torch.cat([matrix[part.reshape(ranks, -1)[rank]] for part in (q, k, v)])

    def features_of(matrix: torch.Tensor, rank: int) -> torch.Tensor:
        parts = matrix.chunk(2) if config.swiglu else [matrix]
        return torch.cat([part.chunk(ranks)[rank] for part in parts])

    cuts: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
        "query_key_value.weight": heads_of, "query_key_value.bias": heads_of,
        "dense_h_to_4h.weight": features_of, "dense_h_to_4h.bias": features_of,
        "attention.dense.weight": lambda x, r: x.chunk(ranks, dim=1)[r],
        "dense_4h_to_h.weight": lambda x, r: x.chunk(ranks, dim=1)[r],
        "word_embeddings.weight": lambda x, r: x.chunk(ranks)[r],
        "lm_head.weight": lambda x, r: x.chunk(ranks)[r],
    }
    for rank in range(ranks):
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for full, value in weights.items():
            _, index, name = full.split(".", 2)
            if name == "weight":
                name = "lm_head.weight"
            cut = next((c for suffix, c in cuts.items() if name.endswith(suffix)), lambda x, r: x)
            layers.setdefault(int(index), {})[name.replace("final_layernorm.", "")] = cut(value, rank).clone()
        for index, state in layers.items():
            torch.save(state, directory / f"layer_{index + 1:02d}-model_{rank:02d}-model_states.pt")
        torch.save({"args": os.getcwd}, directory / f"mp_rank_{rank:02d}_model_states.pt")  # never called


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [LLAMA, LLAMA | {"untie_embeddings_and_output_weights": True, "kv_channels": 6}, GPT2],
    ids=["llama", "untied", "gpt2"],
)
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_megatron_deepspeed_import(tmp_path: Path, shape: dict[str, Any], ranks: int, objective: str) -> None:
    config = ModelConfig(**shape)
    weights = random_weights(config, 128 * ranks)
    write_pipeline(tmp_path / "theirs", weights, config, ranks)
    convert(
        "from-megatron-deepspeed", "--objective", objective, "--input", tmp_path / "theirs",
        "--output", tmp_path / "ours", "--num-attention-heads", 4, "--vocab-size", 100,
        "--rope-theta", config.rope_theta, "--max-position-embeddings", 64, "--seq-length", LENGTH,
    )
    loaded = load_model(tmp_path / "ours")
    assert loaded.vocabulary.num_tokens == 100 and loaded.vocabulary.padded_size == 128  # whatever the ranks padded to
    assert loaded.causal is (objective == "ar") and loaded.seq_length == LENGTH
    found = full_weights(tmp_path / "ours" / "global_step0")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(found[name], value[:128] if value.shape[0] == 128 * ranks and ranks > 1 else value), name


def test_fixture_gives_the_losses_of_the_program_that_trained_it(tmp_path: Path, shared_dir: Path) -> None:
    fixture = shared_dir / "fixtures" / "megatron_deepspeed_ar"
    if not fixture.is_dir():
        pytest.skip(f"needs {fixture}")
    common = ("from-megatron-deepspeed", "--objective", "ar", "--input", fixture, "--num-attention-heads", 4,
              "--max-position-embeddings", 128)
    convert(*common, "--output", tmp_path / "all")
    convert(*common, "--output", tmp_path / "tokens", "--vocab-size", 1001)
    reference = np.load(fixture / "reference.npz")
    inputs, targets = torch.from_numpy(reference["inputs"]), torch.from_numpy(reference["targets"])
    logits = our_logits(tmp_path / "all", inputs)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 128)
    torch.testing.assert_close(nll, torch.from_numpy(reference["nll"]), rtol=0, atol=2e-6)
    # With --vocab-size the padding rows, which that program counted in its softmax, get no probability.
    torch.testing.assert_close(our_logits(tmp_path / "tokens", inputs), logits[..., :1001], rtol=0, atol=0)


def import_error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    command = ["from-megatron-deepspeed", "--num-attention-heads", "4", *map(str, arguments)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_no_more_rows_of_the_vocabulary_are_cut_than_padding_added(
    tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(**LLAMA)
    theirs = tmp_path / "theirs"
    write_pipeline(theirs, random_weights(config, 1024), config, 2)
    flags = ("--objective", "ar", "--input", theirs, "--output", tmp_path / "ours")
    tokenizer = ("--tokenizer-type", "HFTokenizer", "--tokenizer-model", byte_tokenizer)
    assert "--vocab-size 257 (or the tokenizer) leaves out 767 rows of the embedding, of 1024: more than the 256 " in (
        import_error(capsys, *flags, *tokenizer)
    )
    assert "leaves out 257 rows" in import_error(capsys, *flags, "--vocab-size", "767")
    convert("from-megatron-deepspeed", "--num-attention-heads", 4, *flags, "--vocab-size", 768)
    convert("from-megatron-deepspeed", "--num-attention-heads", 4, *flags[:-1], tmp_path / "wide", *tokenizer,
            "--make-vocab-size-divisible-by", 512)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-attention-heads", "0"), "--num-attention-heads 0 is out of range: it must be >= 1"),
        (("--vocab-size", "0"), "--vocab-size 0 is out of range: it must be >= 1"),
        (("--max-position-embeddings", "0"), "--max-position-embeddings 0 is out of range: it must be >= 1"),
        (("--seq-length", "0"), "--seq-length 0 is out of range: it must be >= 1"),
        (("--seq-length", "-3"), "--seq-length -3 is out of range: it must be >= 1"),
        (("--seq-length", "65"), "--seq-length 65 exceeds the model's 64 positions (--max-position-embeddings)"),
        (("--output", "/proc/x"), "--output /proc/x cannot be written: "),
    ],
)
def test_sizes_out_of_range_and_a_closed_output_are_named_by_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    config = ModelConfig(**GPT2)
    write_pipeline(tmp_path / "theirs", random_weights(config, 128), config, 1)
    common = ("--objective", "ar", "--input", tmp_path / "theirs", "--output", tmp_path / "ours")
    assert f"error: {message}" in import_error(capsys, *common, *flags)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, {"word_embeddings.weight": torch.zeros(4096)}, "layer_01: word_embeddings.weight must be a matrix"),
        (2, {"self_attention.dense.weight": None}, "layer_02: self_attention.dense.weight must be a matrix, found"),
        (2, {"self_attention.query_key_value.weight": torch.zeros(96)}, "must be a matrix, found shape (96,)"),
        (3, {"self_attention.query_key_value.bias": torch.zeros(5)}, "differ in shape"),
        (5, {"weight": torch.zeros(32)}, "layer_05: weight must be a matrix, found shape (32,)"),
        (5, {3: torch.zeros(32)}, "it holds more than named tensors"),
        (9, {"weight": torch.zeros(32)}, "layer_05-model_00-model_states.pt is missing, or empty: found layers 1-4, 9"),
    ],
)
def test_layers_of_another_form_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, change: dict[Any, Any], message: str
) -> None:
    config = ModelConfig(**GPT2)
    write_pipeline(tmp_path / "theirs", random_weights(config, 128), config, 1)
    path = tmp_path / "theirs" / f"layer_{number:02d}-model_00-model_states.pt"
    state = torch.load(path, weights_only=True) if path.exists() else {}
    torch.save(state | change, path)
    flags = ("--objective", "ar", "--input", tmp_path / "theirs", "--output", tmp_path / "ours")
    assert message in import_error(capsys, *flags)


def test_biases_of_another_length_and_a_latest_that_is_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(**GPT2 | {"num_layers": 1})
    weights = random_weights(config, 128)
    weights["layers.1.mlp.dense_h_to_4h.bias"] = torch.zeros(5)
    write_pipeline(tmp_path / "theirs", weights, config, 1)
    flags = ("--objective", "ar", "--output", tmp_path / "ours")
    assert "mlp.dense_h_to_4h.bias has 5 rows on a rank, its layer asks for 128" in import_error(
        capsys, *flags, "--input", tmp_path / "theirs"
    )
    (tmp_path / "latest").mkdir()
    assert f"--input {tmp_path / 'latest'} cannot be read: Is a directory" in import_error(
        capsys, *flags, "--input", tmp_path
    )
    assert main(["to-hf", "--input", str(tmp_path), "--output", str(tmp_path / "hf")]) == 2
    assert f"error: --input {tmp_path / 'latest'}: Is a directory" in capsys.readouterr().err


def test_wrong_or_mixed_files_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**LLAMA)
    theirs, output = tmp_path / "theirs", tmp_path / "ours"
    write_pipeline(theirs, random_weights(config, 128), config, 2)
    flags = ("--input", theirs, "--output", output)
    assert "--objective mdm needs --vocab-size" in import_error(capsys, "--objective", "mdm", *flags)
    assert "has 128" in import_error(capsys, "--objective", "mdm", "--vocab-size", "128", *flags)
    assert "--num-attention-heads 5" in import_error(
        capsys, "--objective", "ar", *flags, "--num-attention-heads", "5"
    )
    norm = theirs / "layer_02-model_01-model_states.pt"
    state = torch.load(norm, weights_only=True)
    torch.save(state | {"input_layernorm.weight": state["input_layernorm.weight"] + 1}, norm)
    assert "disagree on input_layernorm.weight" in import_error(capsys, "--objective", "ar", *flags)
    torch.save(state | {"mlp.dense_4h_to_h.weight": torch.zeros(32, 12)}, norm)
    assert "differ in shape" in import_error(capsys, "--objective", "ar", *flags)
    torch.save(state | {"hook": os.getcwd}, norm)
    assert "is refused" in import_error(capsys, "--objective", "ar", *flags)
    norm.unlink()
    assert "layer_02-model_01-model_states.pt is missing" in import_error(capsys, "--objective", "ar", *flags)
    for path in theirs.glob("layer_0[23]*"):
        path.unlink()
    assert "found 0" in import_error(capsys, "--objective", "ar", *flags)
    assert "has no layer_XX" in import_error(capsys, "--objective", "ar", "--input", tmp_path, "--output", output)
    assert not output.exists()


def import_with_numbers(tmp_path: Path, numbers: dict[int, int], recorded: int | None = None) -> int:
    """Exit code of the import of a model of 3 layers (files 1-5) whose file ``i`` is called ``numbers[i]``."""
    theirs = tmp_path / f"theirs-{'-'.join(map(str, numbers.values()))}-{recorded}"
    config = ModelConfig(**LLAMA | {"num_layers": 3})
    write_pipeline(theirs, random_weights(config, 128), config, 1)
    files = {index: (theirs / f"layer_{index:02d}-model_00-model_states.pt") for index in range(1, 6)}
    contents = {index: path.read_bytes() for index, path in files.items()}
    for path in files.values():
        path.unlink()
    for index, number in numbers.items():
        (theirs / f"layer_{number:02d}-model_00-model_states.pt").write_bytes(contents[index])
    if recorded is not None:
        arguments = argparse.Namespace(num_layers=recorded, params_dtype=torch.bfloat16)
        torch.save({"args": arguments}, theirs / "mp_rank_00_model_states.pt")
    return main(["from-megatron-deepspeed", "--objective", "ar", "--num-attention-heads", "4", "--input", str(theirs),
                 "--output", str(theirs.with_suffix(".ours"))])


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        ({1: 1, 3: 3, 4: 4, 5: 5}, 2),
        ({1: 1, 2: 2, 4: 4, 5: 5}, 3),
        ({1: 1, 2: 2, 3: 3, 5: 5}, 4),
        ({1: 1, 3: 4, 4: 5, 5: 7}, 3),  # with layers that have no weights at 2 and 6
        ({1: 1, 2: 3, 4: 5, 5: 7}, 4),
        ({1: 1, 2: 3, 3: 4, 5: 7}, 5),
    ],
)
def test_a_missing_layer_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], numbers: dict[int, int], missing: int
) -> None:
    assert import_with_numbers(tmp_path, numbers) == 2
    error = capsys.readouterr().err
    assert f"layer_{missing:02d}-model_00-model_states.pt is missing" in error and error.count("\n") == 1


def test_layers_without_weights_and_the_recorded_number_of_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = {1: 1, 2: 3, 3: 4, 4: 5, 5: 7}
    assert import_with_numbers(tmp_path, everything) == 0
    assert import_with_numbers(tmp_path, everything, recorded=3) == 0
    assert import_with_numbers(tmp_path, everything, recorded=4) == 2
    assert "has 3 transformer layers, but the arguments of the run that saved it say --num-layers 4" in (
        capsys.readouterr().err
    )
    # The first and the last of three: the numbers alone look complete.
    assert import_with_numbers(tmp_path, {1: 1, 3: 3, 5: 5}, recorded=3) == 2
    assert "has 1 transformer layers" in capsys.readouterr().err


def test_other_hugging_face_models_are_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "hf"
    convert("to-hf", "--input", make_checkpoint("ar", **LLAMA), "--output", theirs)
    config = json.loads((theirs / "config.json").read_text())
    for change, message in (
        ({"model_type": "opt"}, "'opt' is none of llama, gpt2, masked_diffusion"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"attention_bias": True}, "attention_bias and mlp_bias differ"),
        ({"num_hidden_layers": 3}, "lacks 'model.layers.2"),
    ):
        (theirs / "config.json").write_text(json.dumps(config | change))
        assert main(["from-hf", "--input", str(theirs), "--output", str(tmp_path / "back")]) == 2
        assert message in capsys.readouterr().err
    (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    assert main(["from-hf", "--input", str(theirs), "--output", str(tmp_path / "back")]) == 2
    assert "pytorch_model.bin is pickled" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_tensors_that_the_configuration_does_not_use_are_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "hf"
    convert("to-hf", "--input", make_checkpoint("ar", **LLAMA), "--output", theirs)
    config = json.loads((theirs / "config.json").read_text())
    weights = read_safetensors(theirs / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    (theirs / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert main(["from-hf", "--input", str(theirs), "--output", str(tmp_path / "back")]) == 2
    assert "hold model.layers.1.input_layernorm.weight, which the model of config.json lacks (9 such tensors)" in (
        capsys.readouterr().err
    )
    (theirs / "config.json").write_text(json.dumps(config))
    write_safetensors(theirs / "model.safetensors", weights | {"lm_head.weight": embedding + 1})
    assert main(["from-hf", "--input", str(theirs), "--output", str(tmp_path / "back")]) == 2
    assert "config.json ties lm_head.weight to the embedding" in capsys.readouterr().err
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": embedding}
    write_safetensors(theirs / "model.safetensors", weights | buffers)
    convert("from-hf", "--input", theirs, "--output", tmp_path / "back")


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        ("ar", {"num_attention_heads": "four"}, 'num_attention_heads "four" is not a whole number of at least 1'),
        ("ar", {"hidden_size": None}, "hidden_size null is not a whole number"),
        ("ar", {"num_hidden_layers": 2.0}, "num_hidden_layers 2.0 is not a whole number"),
        ("ar", {"max_position_embeddings": 0}, "max_position_embeddings 0 is not a whole number of at least 1"),
        ("ar", {"vocab_size": "x"}, 'vocab_size "x" is not a whole number'),
        ("ar", {"rms_norm_eps": "1e-5"}, 'rms_norm_eps "1e-5" is not a number above 0'),
        ("ar", {"rope_parameters": 3}, "rope_parameters 3 is not an object"),
        ("ar", {"rope_parameters": {"rope_theta": "x"}}, 'rope_theta "x" is not a number above 0'),
        ("ar", {"tie_word_embeddings": "no"}, 'tie_word_embeddings "no" is neither true nor false'),
        ("ar", {"num_key_value_heads": 3}, "--num-key-value-heads 3 does not divide"),
        ("mdm", {"mask_token_id": "a"}, 'mask_token_id "a" is not a whole number'),
        ("mdm", {"mask_token_id": 10}, "mask_token_id 10 is not the last of vocab_size"),
        ("mdm", {"rotary": "yes"}, 'rotary "yes" is neither true nor false'),
        ("mdm", {"normalization": None}, "normalization None has no counterpart here"),
    ],
)
def test_values_of_config_json_are_checked_by_key(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    objective: str, change: dict[str, Any], message: str,
) -> None:
    theirs = tmp_path / "hf"
    convert("to-hf", "--input", make_checkpoint(objective, **LLAMA), "--output", theirs)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | change))
    capsys.readouterr()
    assert main(["from-hf", "--input", str(theirs), "--output", str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: config.json: {message}") and error.count("\n") == 1


def test_tensors_of_another_shape_and_unreadable_files_are_named(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = make_checkpoint("ar", **LLAMA), tmp_path / "hf"
    assert main(["to-hf", "--input", str(ours), "--output", "/proc/x"]) == 2
    assert "error: --output /proc/x cannot be written: " in capsys.readouterr().err
    convert("to-hf", "--input", ours, "--output", theirs)
    path = theirs / "model.safetensors"
    weights = read_safetensors(path)

    def error() -> str:
        assert main(["from-hf", "--input", str(theirs), "--output", str(tmp_path / "back")]) == 2
        return capsys.readouterr().err

    write_safetensors(path, weights | {"model.embed_tokens.weight": torch.zeros(257)})
    assert "the embedding has shape (257,), but config.json says (257, 32)" in error()
    write_safetensors(path, weights | {"model.embed_tokens.weight": torch.zeros(600, 32)})
    assert "the embedding has shape (600, 32), but config.json says (257, 32)" in error()
    write_safetensors(path, weights | {"model.layers.1.self_attn.k_proj.weight": torch.zeros(16, 8)})
    assert "model.layers.1.self_attn.k_proj.weight has shape (16, 8), but config.json says (16, 32)" in error()
    path.rename(theirs / "model-00001-of-00001.safetensors")
    (theirs / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    assert "weight_map does not say which tensor is in which file" in error()
    write_safetensors(path, weights)
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)  # root can open everything
    assert f"error: {path} cannot be read: Permission denied" in error()


def test_output_is_never_overwritten(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    ours = make_checkpoint("ar", **LLAMA)
    assert main(["to-hf", "--input", str(ours), "--output", str(ours)]) == 2
    with pytest.raises(UserError, match="exists already"):
        save_weights(
            ours, {}, model=ModelConfig(**LLAMA), objective="ar", vocabulary=build_vocabulary(257, 64), seq_length=4,
            tokenizer=None, source="",
        )
    assert main(["to-hf", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2
