"""The README of an exported model: what it is, how it was trained, on how much data, and how good it is."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.budget import parameter_count, training_flops
from megatron.config import concern_types
from megatron.errors import UserError
from megatron.inference.hf_format import model_type
from megatron.inference.loading import Description
from megatron.metrics import read_metrics

_RECIPE = (
    ("optimizer: AdamW", "optimizer", ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad")),
    ("learning rate", "optimizer", ("lr", "min_lr", "lr_decay_style", "lr_warmup_samples", "lr_warmup_fraction")),
    ("batch", "batch", ("global_batch_size", "rampup_batch_size", "seq_length")),
    ("regularisation", "model", ("attention_dropout", "hidden_dropout", "init_method_std")),
    ("precision", "optimizer", ("bf16", "fp16", "fp8")),
    ("objective", "objective", (
        "time_sampler", "mask_sampler", "loss_weighting", "ar_ratio", "low_noise_start", "eod_mask_loss",
        "reset_position_ids", "reset_attention_mask", "randmask_ratio", "num_order_list",
    )),
    ("data order", "data", ("epoch_rule", "unique_tokens")),
    ("seed", "parallel", ("seed",)),
)

_CAUSAL_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
```"""

_MASKED_USE = """The model fills positions that hold the mask id, `config.mask_token_id`; its code comes with it.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("{path}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(prompt, max_new_tokens=32)[0]))
```"""


def model_card(description: Description, name: str) -> str:
    """Markdown with the YAML head that the Hugging Face hub reads; ``name`` is the directory's."""
    causal = description.causal
    family = "An autoregressive language model" if causal else "A masked-diffusion language model"
    head = ["---", "library_name: transformers", f"pipeline_tag: {'text-generation' if causal else 'fill-mask'}",
            "tags:", f"- {'autoregressive' if causal else 'masked-diffusion'}", "---"]
    parts = [
        "\n".join(head),
        f"# {name}\n\n{family} of {_parameters(description):,} parameters.",
        "## Use\n\n" + (_CAUSAL_USE if causal else _MASKED_USE).format(path=name),
        "## Shape\n\n" + _table(_shape(description)),
        "## Training\n\n" + _table(_recipe(description) + _budget(description)),
        "## Losses\n\n" + _losses(description),
        "## Origin\n\n" + _table(_origin(description)),
    ]
    return "\n\n".join(parts) + "\n"


def _parameters(description: Description) -> int:
    return parameter_count(description.model, description.vocabulary.num_tokens + (not description.causal))


def _shape(description: Description) -> list[tuple[str, str]]:
    model, vocabulary = description.model, description.vocabulary
    positions = f"rotary, theta {model.rope_theta:g}" if model.use_rotary_position_embeddings else "learned"
    return [
        ("architecture", model_type(model, description.objective)),
        ("layers, width, heads, key/value heads, head width", f"{model.num_layers}, {model.hidden_size}, "
         f"{model.num_attention_heads}, {model.num_kv_heads}, {model.head_size}"),
        ("MLP", f"{'SwiGLU' if model.swiglu else 'GELU'}, {model.ffn_size}"),
        ("normalisation", f"{model.normalization}, epsilon {model.layernorm_epsilon:g}"),
        ("positions", positions),
        ("embedding and head", "separate" if model.untie_embeddings_and_output_weights else "tied"),
        ("tokens", f"{vocabulary.num_tokens:,}" + ("" if description.causal else f", mask id {vocabulary.mask_id}")),
        ("sequence length", f"{description.seq_length:,}"),
    ]


def _recipe(description: Description) -> list[tuple[str, str]]:
    """Recorded settings, those that this objective does not read left out."""
    config, types = description.metadata.config, concern_types()
    if description.metadata.consumed_tokens == 0:
        return []
    rows = []
    for title, concern, names in _RECIPE:
        values = config.get(concern, {})
        readers = {setting.name: setting.metadata.get("only") for setting in dataclasses.fields(types[concern])}
        known = [
            f"{name.replace('_', '-')} {_plain(values[name])}" for name in names
            if values.get(name) is not None and readers.get(name) in (None, description.objective)
        ]
        if known:
            rows.append((title, ", ".join(known)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _budget(description: Description) -> list[tuple[str, str]]:
    """Data and compute, as far as they are recorded."""
    metadata = description.metadata
    if metadata.consumed_tokens == 0:
        return [("data budget", "not recorded: the weights were imported")]
    flops = training_flops(_parameters(description), metadata.consumed_tokens)
    rows = [
        ("steps", f"{metadata.iteration:,}"),
        ("tokens seen", f"{metadata.consumed_tokens:,}"),
        ("compute", f"{flops:.3g} FLOPs (6 x parameters x tokens)"),
    ]
    unique = _unique_tokens(description)
    if unique is not None:
        rows.append(("unique tokens", f"{unique:,}: {metadata.consumed_tokens / unique:.2f} epochs"))
    return rows


def _events(description: Description, kind: str) -> list[dict[str, Any]]:
    """Events of the run's log, which lies beside the checkpoints; none where it is missing or damaged."""
    try:
        return read_metrics(description.path.parent / "metrics.jsonl", kind)
    except (UserError, OSError):
        return []


def _unique_tokens(description: Description) -> int | None:
    """Tokens of one epoch."""
    starts = [event for event in _events(description, "meta") if event.get("tokens_per_epoch")]
    return int(starts[-1]["tokens_per_epoch"]) if starts else None


def _losses(description: Description) -> str:
    validation = description.metadata.validation
    if validation is None:
        text = "No validation loss was recorded for these weights."
    else:
        error = "" if validation.stderr is None else f" +/- {validation.stderr:.4f} (standard error)"
        kind = "negative log-likelihood"
        if not description.causal:
            kind = f"negative ELBO, an upper bound of the {kind}"
        text = f"Validation: {validation.loss:.4f}{error} nats a token; {kind}."
    step = description.metadata.iteration
    logged = [event for event in _events(description, "train") if event["iteration"] <= step]
    if step == 0 or not logged:
        return text
    last = logged[-1]
    return f"{text}\n\nTraining, as last logged (step {last['iteration']:,}): {last['loss']:.4f} nats a token."


def _origin(description: Description) -> list[tuple[str, str]]:
    metadata = description.metadata
    rows = [("checkpoint", metadata.tag), ("program", f"commit {metadata.git_commit or 'unknown'}")]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in metadata.versions.items())))
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
