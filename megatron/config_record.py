"""A configuration as others read it: the start-up banner, and the JSON in a checkpoint's metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.config import RunConfig, concern_types
from megatron.errors import UserError
from megatron.options import Options, flag_of, is_default

# Settings that change no result: where it runs, how fast, and what is written.
_NOT_RESULTS = frozenset(
    (
        "checkpoint_activations",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "no_pipeline_parallel",
        "deepspeed",
        "local_rank",
        "distributed_backend",
        "distributed_timeout_minutes",
        "data_impl",
        "data_cache_path",
        "num_workers",
        "save",
        "save_interval",
        "async_save",
        "keep_last",
        "keep_best",
        "exit_interval",
        "exit_duration_in_mins",
        "exit_signal_handler",
        "kill_switch_file",
    )
)
# Shown resolved to samples, whichever flag set them.
_IN_SAMPLES = {
    "train_samples": ("train_samples", "train_iters"),
    "lr_warmup_samples": ("lr_warmup_samples", "lr_warmup_iters", "lr_warmup_fraction"),
    "lr_decay_samples": ("lr_decay_samples", "lr_decay_iters"),
    "lr_wsd_decay_samples": ("lr_wsd_decay_samples",),
}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return ``config`` as nested values that JSON keeps (tuples become lists); :func:`from_dict` is the inverse."""
    record: dict[str, Any] = {name: _plain(getattr(config, name)) for name in concern_types()}
    record["given"] = sorted(config.given)
    return record


def from_dict(record: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that :func:`to_dict` made ``record`` of; settings it lacks take their defaults.

    Raises UserError for a setting that this version does not know (what it changed cannot be reproduced), for a missing
    required one, and for values that contradict each other.
    """
    known = concern_types()
    unknown = [name for name in record if name not in known and name != "given"]
    concerns: dict[str, Any] = {}
    for name, cls in known.items():
        settings = {f.name for f in dataclasses.fields(cls)}
        values = dict(record.get(name, {}))
        unknown += [f"{name}.{key}" for key in values if key not in settings]
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        missing = sorted(required - values.keys())
        if missing:
            raise UserError(f"recorded configuration lacks {name}.{missing[0]}: it is damaged or of another program")
        if not unknown:
            concerns[name] = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    if unknown:
        raise UserError(
            f"recorded configuration has {', '.join(unknown)}: a newer version wrote it, so use that version"
        )
    return RunConfig(**concerns, given=frozenset(record.get("given", ())))


def describe(config: RunConfig) -> list[str]:
    """Return the lines of the start-up banner: every setting that changes results, ``*`` marking unset defaults."""
    lines = ["configuration (* marks a default that no flag set)"]
    for name in concern_types():
        if name != "logging":
            lines += _wrapped(name, _items(config, getattr(config, name)))
    if config.batch.global_batch_size is not None and not config.evaluation.skip_train:
        lines += _wrapped("schedule", _schedule_items(config))
    dropouts = [f for f in dataclasses.fields(config.model) if f.name.endswith("_dropout")]
    silent = [f for f in dropouts if _unset(config, config.model, f) and getattr(config.model, f.name) > 0]
    if silent:
        names = " and ".join(f"{flag_of(f)} {getattr(config.model, f.name)}" for f in silent)
        lines.append(f"  note: no flag set {names}: dropout is on; give 0 to turn it off")
    return lines


def _plain(concern: Options) -> dict[str, Any]:
    values = {f.name: getattr(concern, f.name) for f in dataclasses.fields(concern)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _unset(config: RunConfig, concern: Options, setting: dataclasses.Field[Any]) -> bool:
    return bool(setting.metadata) and setting.name not in config.given and is_default(concern, setting)


def _items(config: RunConfig, concern: Options) -> list[str]:
    """Return "name value" for every setting of ``concern`` that changes this run's results, marked where unset."""
    model = config.model
    resolved = {
        "ffn_hidden_size": model.ffn_size,
        "kv_channels": model.head_size,
        "num_key_value_heads": model.num_kv_heads,
        "compile": "auto" if config.parallel.compile is None else config.parallel.compile,
    }
    unread = {name for names in _IN_SAMPLES.values() for name in names} | _NOT_RESULTS
    if not model.use_rotary_position_embeddings:
        unread |= {"rope_theta"}
    if config.optimizer.lr_decay_style != "WSD":
        unread |= {"lr_wsd_decay_style"}
    if config.data.data_path is None:
        unread |= {"split"}
    if config.evaluation.eval_windows is not None:
        unread |= {"eval_iters"}
    items = []
    for setting in dataclasses.fields(concern):
        value = resolved.get(setting.name, getattr(concern, setting.name))
        if (
            value is None
            or setting.name in unread
            or setting.metadata.get("only") not in (None, config.objective.objective)
        ):
            continue
        items.append(_item(setting.name, value, unset=_unset(config, concern, setting)))
    return items


def _schedule_items(config: RunConfig) -> list[str]:
    """Return the lengths of training, warm-up and decay in samples, and the tokens of the whole run."""
    items = []
    for name, flags in _IN_SAMPLES.items():
        if name == "lr_wsd_decay_samples" and config.optimizer.lr_decay_style != "WSD":
            continue
        concern = config.batch if name == "train_samples" else config.optimizer
        settings = [setting for setting in dataclasses.fields(concern) if setting.name in flags]
        items.append(_item(name, getattr(config, name), unset=all(_unset(config, concern, f) for f in settings)))
    return [*items, _item("tokens", config.train_samples * config.batch.seq_length, unset=False)]


def _item(name: str, value: Any, *, unset: bool) -> str:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"{name.replace('_', '-')} {value}{'*' if unset else ''}"


def _wrapped(name: str, items: list[str]) -> list[str]:
    """Return ``items`` as lines of at most 118 columns behind ``name``; an item is never broken."""
    lines, line = [], f"  {name:<11}"
    for item in items:
        if len(line) + len(item) > 116 and line.strip() != name:
            lines.append(line)
            line = " " * 13
        line += f" {item},"
    return [*lines, line.rstrip(",")] if items else []
