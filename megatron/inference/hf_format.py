"""The same model in the words of Hugging Face: configuration and parameter names, both ways.

- AR, rotary, RMSNorm, SwiGLU: ``LlamaForCausalLM``. [q; k; v] and [gate; up] become separate matrices.
- AR, learned positions, LayerNorm, GELU, biases: ``GPT2LMHeadModel``. Its linear layers are stored transposed.
- MDM of any shape: our own ``hub/modeling_masked_diffusion.py``, with our parameter names.

Nothing here imports transformers: a model directory is JSON and safetensors.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from megatron.config import ModelConfig
from megatron.errors import UserError
from megatron.tokenizer import Vocabulary, build_vocabulary

MASKED_DIFFUSION: Final = "masked_diffusion"
MODEL_TYPES: Final = ("llama", "gpt2", MASKED_DIFFUSION)
EMBEDDING: Final = "layers.0.word_embeddings.weight"
_GPT2_LINEAR: Final = {
    "attn.c_attn": "self_attention.query_key_value",
    "attn.c_proj": "self_attention.dense",
    "mlp.c_fc": "mlp.dense_h_to_4h",
    "mlp.c_proj": "mlp.dense_4h_to_h",
}
_GPT2_NORMS: Final = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
_LLAMA_PLAIN: Final = {
    "self_attn.o_proj": "self_attention.dense",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}

_BUFFER: Final = re.compile(r"rotary_emb\.inv_freq$|\bh\.\d+\.attn\.(masked_)?bias$")
"""Values that older versions stored with the parameters."""

_REQUIRED: Final = object()


@dataclass(frozen=True)
class HuggingFaceModel:
    """``config.json`` and the tensors of ``model.safetensors``."""

    config: dict[str, Any]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class OurModel:
    """A model in this program's words."""

    objective: str
    config: ModelConfig
    vocabulary: Vocabulary
    weights: dict[str, Tensor]


def model_type(config: ModelConfig, objective: str) -> str:
    """Which of ``MODEL_TYPES`` holds this model.

    Raises:
        UserError: an AR model whose shape no standard class has; names the flag.
    """
    if objective == "mdm":
        return MASKED_DIFFUSION
    if config.use_rotary_position_embeddings:
        for ok, flag in (
            (config.normalization == "rmsnorm", "--normalization layernorm"),
            (config.swiglu, "a GELU MLP (no --swiglu)"),
            (config.hidden_size % config.num_attention_heads == 0, "a hidden size that is no multiple of the heads"),
        ):
            if not ok:
                raise UserError(f"an AR model with rotary positions exports as Llama, which has no {flag}")
        return "llama"
    for ok, flag in (
        (config.normalization == "layernorm", "--normalization rmsnorm"),
        (not config.swiglu, "--swiglu"),
        (not config.disable_bias_linear, "--disable-bias-linear"),
        (config.num_kv_heads == config.num_attention_heads, "--num-key-value-heads"),
        (config.head_size * config.num_attention_heads == config.hidden_size, "--kv-channels"),
    ):
        if not ok:
            raise UserError(f"an AR model with learned positions exports as GPT-2, which has no {flag}")
    return "gpt2"


# ---- ours to theirs


def to_hugging_face(ours: OurModel, eod: int | None) -> HuggingFaceModel:
    """Names, fused matrices and padding undone; ``eod`` is the end-of-document id, None if unknown.

    The vocabulary keeps its tokens, and the mask id for MDM; padding rows go.
    """
    kind = model_type(ours.config, ours.objective)
    rows = ours.vocabulary.num_tokens + (ours.objective == "mdm")
    weights = dict(ours.weights)
    head = f"layers.{ours.config.num_layers + 2}.weight"
    for name in (EMBEDDING, head):
        if name in weights:
            weights[name] = weights[name][:rows]
    common = {"vocab_size": rows, "bos_token_id": eod, "eos_token_id": eod, "pad_token_id": None}
    if kind == MASKED_DIFFUSION:
        return HuggingFaceModel(_diffusion_config(ours, eod) | common, weights)
    if kind == "llama":
        return HuggingFaceModel(_llama_config(ours.config) | common, _to_llama(weights, ours.config, head))
    return HuggingFaceModel(_gpt2_config(ours.config) | common, _to_gpt2(weights, ours.config, head))


def _llama_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.init_method_std,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_theta": config.rope_theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # and by 5
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "attention_bias": not config.disable_bias_linear,
        "mlp_bias": not config.disable_bias_linear,
        "attention_dropout": 0.0,
    }


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layernorm_epsilon,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _diffusion_config(ours: OurModel, eod: int | None) -> dict[str, Any]:
    config = ours.config
    file = "modeling_masked_diffusion"
    return {
        "architectures": ["MaskedDiffusionForMaskedLM"],
        "model_type": MASKED_DIFFUSION,
        "auto_map": {
            "AutoConfig": f"{file}.MaskedDiffusionConfig",
            "AutoModelForMaskedLM": f"{file}.MaskedDiffusionForMaskedLM",
        },
        "mask_token_id": ours.vocabulary.mask_id,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rotary": config.use_rotary_position_embeddings,
        "rotary_base": config.rope_theta,
        "normalization": config.normalization,
        "norm_eps": config.layernorm_epsilon,
        "swiglu": config.swiglu,
        "linear_bias": not config.disable_bias_linear,
        "untied_head": config.untie_embeddings_and_output_weights,
        "tie_word_embeddings": False,
    }


def _to_llama(weights: Mapping[str, Tensor], config: ModelConfig, head: str) -> dict[str, Tensor]:
    query, key = config.num_attention_heads * config.head_size, config.num_kv_heads * config.head_size
    theirs = {
        "model.embed_tokens.weight": weights[EMBEDDING],
        "model.norm.weight": weights[f"layers.{config.num_layers + 1}.final_layernorm.weight"],
    }
    if head in weights:
        theirs["lm_head.weight"] = weights[head]
    for i in range(config.num_layers):
        block = {n.removeprefix(f"layers.{i + 1}."): v for n, v in weights.items() if n.startswith(f"layers.{i + 1}.")}
        for part in {name.rpartition(".")[2] for name in block}:  # weight, and bias where linear layers have one
            fused = block[f"self_attention.query_key_value.{part}"].split([query, key, key])
            gate_up = block[f"mlp.dense_h_to_4h.{part}"].chunk(2)
            renamed = {f"self_attn.{x}_proj": value for x, value in zip("qkv", fused, strict=True)}
            renamed |= {f"mlp.{x}_proj": value for x, value in zip(("gate", "up"), gate_up, strict=True)}
            renamed |= {a: block[f"{b}.{part}"] for a, b in _LLAMA_PLAIN.items() if f"{b}.{part}" in block}
            theirs |= {f"model.layers.{i}.{name}.{part}": value for name, value in renamed.items()}
    return theirs


def _to_gpt2(weights: Mapping[str, Tensor], config: ModelConfig, head: str) -> dict[str, Tensor]:
    theirs = {
        "transformer.wte.weight": weights[EMBEDDING],
        "transformer.wpe.weight": weights["layers.0.position_embeddings.weight"],
    }
    if head in weights:
        theirs["lm_head.weight"] = weights[head]
    for old, new in _gpt2_names(config):
        theirs[f"transformer.{old}"] = _transposed(weights[new])
    return theirs


def _gpt2_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(their name, our name) of every parameter behind the embeddings; matrices are transposed (see _transposed)."""
    for part in ("weight", "bias"):
        yield f"ln_f.{part}", f"layers.{config.num_layers + 1}.final_layernorm.{part}"
        for i in range(config.num_layers):
            for old, new in (_GPT2_LINEAR | _GPT2_NORMS).items():
                yield f"h.{i}.{old}.{part}", f"layers.{i + 1}.{new}.{part}"


def _transposed(value: Tensor) -> Tensor:
    """GPT-2's linear layers keep [in, out], ours [out, in]; vectors are what they are."""
    return value.t() if value.dim() == 2 else value


# ---- theirs to ours


def from_hugging_face(theirs: HuggingFaceModel, divisible_by: int) -> OurModel:
    """The inverse of :func:`to_hugging_face`, for any model of these three types; padding rows come back as zeros.

    Raises:
        UserError: another type, or an option of it that our model does not have.
    """
    kind = theirs.config.get("model_type")
    unused = dict(theirs.weights)
    try:
        if kind == "llama":
            config = _from_llama_config(theirs.config, divisible_by)
            ours = _from_llama(unused, config)
        elif kind == "gpt2":
            config = _from_gpt2_config(theirs.config, divisible_by)
            ours = _from_gpt2(unused, config)
        elif kind == MASKED_DIFFUSION:
            config = _from_diffusion_config(theirs.config, divisible_by)
            ours, unused = unused, {}
        else:
            raise UserError(f"model_type {kind!r} is none of {', '.join(MODEL_TYPES)}: such a model has no form here")
        _check_unused(unused, ours[EMBEDDING], config)
        objective = "mdm" if kind == MASKED_DIFFUSION else "ar"
        tokens = _whole(theirs.config, "mask_token_id" if objective == "mdm" else "vocab_size")
        rows = tokens + (objective == "mdm")
        if _whole(theirs.config, "vocab_size", rows) != rows:
            raise UserError(f"config.json: mask_token_id {tokens} is not the last of vocab_size")
        vocabulary = build_vocabulary(tokens, divisible_by)
        for name in (EMBEDDING, f"layers.{config.num_layers + 2}.weight"):
            if name in ours:
                _check_shape("the embedding" if name == EMBEDDING else "the head", ours[name], rows, config.hidden_size)
                ours[name] = _pad(ours[name], vocabulary.padded_size)
    except KeyError as error:
        raise UserError(f"the {kind} model lacks {error}: config.json and weights do not belong together") from error
    return OurModel(objective, config, vocabulary, {name: value.float() for name, value in ours.items()})


def _expect(config: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse options whose value changes what is computed; absent ones have the first of the values."""
    for key, values in expected.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"config.json: {key} {config[key]!r} has no counterpart here, only {values[0]!r}")


def _from_llama_config(config: Mapping[str, Any], divisible_by: int) -> ModelConfig:
    _expect(config, {"hidden_act": ("silu",), "rope_scaling": (None,)})
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: rope_parameters {json.dumps(rope)} is not an object")
    _expect(rope, {"rope_type": ("default",), "partial_rotary_factor": (1.0, None)})
    biased = _truth(config, "attention_bias", False)
    if biased != _truth(config, "mlp_bias", False):
        raise UserError("config.json: attention_bias and mlp_bias differ; here all linear layers have biases or none")
    heads = _whole(config, "num_attention_heads")
    return _model(
        num_layers=_whole(config, "num_hidden_layers"), hidden_size=_whole(config, "hidden_size"),
        num_attention_heads=heads, num_key_value_heads=_whole(config, "num_key_value_heads", None) or heads,
        kv_channels=_whole(config, "head_dim", None), ffn_hidden_size=_whole(config, "intermediate_size"),
        max_position_embeddings=_whole(config, "max_position_embeddings"), use_rotary_position_embeddings=True,
        rope_theta=_positive(rope, "rope_theta"), normalization="rmsnorm",
        layernorm_epsilon=_positive(config, "rms_norm_eps"), swiglu=True, disable_bias_linear=not biased,
        untie_embeddings_and_output_weights=not _truth(config, "tie_word_embeddings", False),
        init_method_std=_positive(config, "initializer_range", 0.02), make_vocab_size_divisible_by=divisible_by,
    )


def _from_gpt2_config(config: Mapping[str, Any], divisible_by: int) -> ModelConfig:
    _expect(config, {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    })
    width = _whole(config, "n_embd")
    return _model(
        num_layers=_whole(config, "n_layer"), hidden_size=width, num_attention_heads=_whole(config, "n_head"),
        ffn_hidden_size=_whole(config, "n_inner", None) or 4 * width,
        max_position_embeddings=_whole(config, "n_positions"),
        layernorm_epsilon=_positive(config, "layer_norm_epsilon", 1e-5),
        untie_embeddings_and_output_weights=not _truth(config, "tie_word_embeddings", True),
        init_method_std=_positive(config, "initializer_range", 0.02), make_vocab_size_divisible_by=divisible_by,
    )


def _from_diffusion_config(config: Mapping[str, Any], divisible_by: int) -> ModelConfig:
    _expect(config, {"normalization": ("rmsnorm", "layernorm")})
    return _model(
        num_layers=_whole(config, "num_hidden_layers"), hidden_size=_whole(config, "hidden_size"),
        num_attention_heads=_whole(config, "num_attention_heads"),
        num_key_value_heads=_whole(config, "num_key_value_heads", None), kv_channels=_whole(config, "head_dim", None),
        ffn_hidden_size=_whole(config, "intermediate_size"),
        max_position_embeddings=_whole(config, "max_position_embeddings"),
        use_rotary_position_embeddings=_truth(config, "rotary"), rope_theta=_positive(config, "rotary_base"),
        normalization=config["normalization"], layernorm_epsilon=_positive(config, "norm_eps"),
        swiglu=_truth(config, "swiglu"), disable_bias_linear=not _truth(config, "linear_bias"),
        untie_embeddings_and_output_weights=_truth(config, "untied_head"), make_vocab_size_divisible_by=divisible_by,
    )


def _model(**values: Any) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except UserError as error:
        raise UserError(f"config.json: {error}") from error


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    if key not in config and default is _REQUIRED:
        raise UserError(f"config.json has no {key}")
    return config.get(key, default)


def _whole(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> Any:
    """A whole number of at least 1, or null where that is the default."""
    value = _value(config, key, default)
    if (value is not None or default is not None) and (type(value) is not int or value < 1):
        raise UserError(f"config.json: {key} {json.dumps(value)} is not a whole number of at least 1")
    return value


def _positive(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> float:
    value = _value(config, key, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"config.json: {key} {json.dumps(value)} is not a number above 0")
    return float(value)


def _truth(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> bool:
    value = _value(config, key, default)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} {json.dumps(value)} is neither true nor false")
    return value


def _check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, but config.json says {shape}")


def _check_unused(unused: Mapping[str, Tensor], embedding: Tensor, config: ModelConfig) -> None:
    """Refuse tensors that no parameter is made of, but for buffers and a copy of the tied embedding."""
    names = sorted(name for name in unused if _BUFFER.search(name) is None)
    if not config.untie_embeddings_and_output_weights and "lm_head.weight" in names:
        if not torch.equal(unused["lm_head.weight"], embedding):
            raise UserError("config.json ties lm_head.weight to the embedding, but the weights hold another matrix")
        names.remove("lm_head.weight")
    if names:
        raise UserError(
            f"the weights hold {names[0]}, which the model of config.json lacks ({len(names)} such tensors): they do "
            "not belong together"
        )


def _from_llama(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Takes what it uses out of ``theirs``."""
    ours = {
        EMBEDDING: theirs.pop("model.embed_tokens.weight"),
        f"layers.{config.num_layers + 1}.final_layernorm.weight": theirs.pop("model.norm.weight"),
    }
    if config.untie_embeddings_and_output_weights:
        ours[f"layers.{config.num_layers + 2}.weight"] = theirs.pop("lm_head.weight")
    keys = config.num_kv_heads * config.head_size
    fused = {
        "self_attention.query_key_value": {
            "self_attn.q_proj": config.num_attention_heads * config.head_size,
            "self_attn.k_proj": keys, "self_attn.v_proj": keys,
        },
        "mlp.dense_h_to_4h": {"mlp.gate_proj": config.ffn_size, "mlp.up_proj": config.ffn_size},
    }
    for i in range(config.num_layers):
        layer, block = f"model.layers.{i}.", f"layers.{i + 1}."
        for part in ("weight",) if config.disable_bias_linear else ("weight", "bias"):
            for new, rows in fused.items():
                pieces = {f"{layer}{old}.{part}": count for old, count in rows.items()}
                for name, count in pieces.items():
                    _check_shape(name, theirs[name], count, *([config.hidden_size] if part == "weight" else []))
                ours[f"{block}{new}.{part}"] = torch.cat([theirs.pop(name) for name in pieces])
            for old, new in _LLAMA_PLAIN.items():
                if part == "weight" or "norm" not in new:
                    ours[f"{block}{new}.{part}"] = theirs.pop(f"{layer}{old}.{part}")
    return ours


def _from_gpt2(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Takes what it uses out of ``theirs``."""
    prefix = "transformer." if "transformer.wte.weight" in theirs else ""  # the first published files have none
    ours = {
        EMBEDDING: theirs.pop(f"{prefix}wte.weight"),
        "layers.0.position_embeddings.weight": theirs.pop(f"{prefix}wpe.weight"),
    }
    if config.untie_embeddings_and_output_weights:
        ours[f"layers.{config.num_layers + 2}.weight"] = theirs.pop("lm_head.weight")
    for old, new in _gpt2_names(config):
        ours[new] = _transposed(theirs.pop(f"{prefix}{old}"))
    return ours


def _pad(matrix: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - len(matrix)))
