"""The command ``python -m megatron.budget``: what a run would be, before it is started.

    python -m megatron.budget --table                                    every model of utils/model_params.sh
    python -m megatron.budget run --model 425M --flops-factor 10 --gpus 8      size, length, days, disk
    python -m megatron.budget run --model 140M --data 100M --epochs 50 --json
    python -m megatron.budget samples --flops-factor 10 --model 117M     a run's length, for scripts
    python -m megatron.budget memory --model 2298M --gpus 8              what each split needs of a GPU
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron import budget
from megatron.arguments import OneLineParser
from megatron.budget import GPT2_VOCABULARY, MODEL_TABLE, TOKEN_TABLE, ModelRow, SampleBudget
from megatron.config import CheckpointConfig, ModelConfig
from megatron.errors import UserError


@dataclass(frozen=True)
class Sized:
    """A model as far as it is known: ``config`` is None where only the number of its parameters was given."""

    name: str
    parameters: int
    config: ModelConfig | None


def run_figures(options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``run`` prints, by name; sizes in bytes, None where a figure cannot be known.

    FLOPs are those of the samples that are trained on: ``flops`` is 6 N D with the published N, ``model_flops`` what
    the logged MFU counts.
    """
    _at_least_one(options, "gpus", "seq_length", "global_batch_size")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu}: it must be above 0 and at most 1")
    if not options.peak_tflops > 0:
        raise UserError(f"--peak-tflops {options.peak_tflops}: it must be above 0")
    sized = _sized(options)
    unique = None if options.data is None else _tokens_per_epoch(options.data)
    figures: dict[str, Any] = {"model": sized.name, "parameters": sized.parameters, "trained_parameters": None}
    if sized.config is not None:
        figures["trained_parameters"] = budget.parameter_count(sized.config, _padded_vocabulary())
    figures |= {"seq_length": options.seq_length, "global_batch_size": options.global_batch_size}
    length = _length(options, sized.parameters, unique)
    if length is not None:
        figures |= {"unique_tokens": unique, **_length_figures(options, length, unique)}
        figures |= _time_figures(options, length, sized)
    return figures | _disk_figures(figures["trained_parameters"] or sized.parameters)


def _length(options: argparse.Namespace, parameters: int, unique: int | None) -> SampleBudget | None:
    """The length that the flags give, by the rounding of the script that takes the same; None without any."""
    if options.flops_factor is not None:
        if options.epochs is not None:
            raise UserError("--flops-factor and --epochs exclude each other: the budget sets the tokens")
        return budget.budget_from_flops(options.flops_factor * 10**18, parameters, options.seq_length)
    if options.epochs is None and unique is None:
        return None
    if options.epochs is None or unique is None:
        raise UserError("give --flops-factor, or --data with --epochs")
    _at_least_one(options, "epochs")
    return budget.budget_from_epochs(unique, options.epochs, options.seq_length)


def _length_figures(options: argparse.Namespace, length: SampleBudget, unique: int | None) -> dict[str, Any]:
    steps = length.train_samples // options.global_batch_size
    if steps < 1:
        raise UserError(f"{length.train_samples} samples are less than one --global-batch-size: train on more tokens")
    return {
        "epochs": options.epochs or (None if unique is None else length.tokens / unique),
        "tokens": length.tokens,
        "train_samples": length.train_samples,
        "warmup_samples": length.warmup_samples,
        "steps": steps,
    }


def _time_figures(options: argparse.Namespace, length: SampleBudget, sized: Sized) -> dict[str, Any]:
    trained = length.train_samples * options.seq_length
    flops, model_flops = budget.training_flops(sized.parameters, trained), None
    if sized.config is not None:
        model_flops = trained * budget.flops_per_token(
            sized.config, options.seq_length, GPT2_VOCABULARY, causal=options.objective == "ar"
        )
    counted = flops if model_flops is None else model_flops
    peak = options.peak_tflops * 1e12
    return {
        "objective": options.objective,
        "flops": flops,
        "model_flops": model_flops,
        "gpus": options.gpus,
        "mfu": options.mfu,
        "peak_tflops": options.peak_tflops,
        "days": budget.training_days(counted, gpus=options.gpus, mfu=options.mfu, peak=peak),
    }


def _disk_figures(parameters: int) -> dict[str, Any]:
    checkpoint, kept = budget.checkpoint_bytes(parameters), CheckpointConfig.keep_last + CheckpointConfig.keep_best
    return {"checkpoint_bytes": checkpoint, "checkpoints_kept": kept, "disk_bytes": (kept + 1) * checkpoint}


def _sized(options: argparse.Namespace) -> Sized:
    """The model of ``--model``, ``--parameters``, or ``--num-layers`` with ``--hidden-size``."""
    shape = [name for name in _SHAPE if getattr(options, name) is not None]
    ways = [options.model is not None, options.parameters is not None, bool(shape)]
    if sum(ways) != 1:
        raise UserError("give one of --model, --parameters, or --num-layers with --hidden-size")
    if options.model is not None:
        row = _row(options.model)
        return Sized(row.name, row.parameters, row.model(options.seq_length))
    if options.parameters is not None:
        _at_least_one(options, "parameters")
        return Sized("unknown shape", options.parameters, None)
    if options.num_layers is None or options.hidden_size is None:
        raise UserError("a shape needs --num-layers and --hidden-size")
    _at_least_one(options, *shape)
    layers, width = options.num_layers, options.hidden_size
    heads = options.num_attention_heads or 1
    if options.kv_channels is None and width % heads:
        raise UserError(f"--hidden-size {width} is not divisible by --num-attention-heads {heads}: set --kv-channels")
    config = budget.published_model(
        layers, width, heads, options.kv_channels or width // heads, options.seq_length,
        ffn_hidden_size=options.ffn_hidden_size,
    )  # fmt: skip
    parameters = budget.published_parameter_count(width, layers, ffn=config.ffn_size)
    return Sized(f"{layers} layers of width {width}", parameters, config)


_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size")


def _print_run(options: argparse.Namespace) -> None:
    """Print the figures as one JSON object or as a table."""
    figures = run_figures(options)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in _rows(figures):
        print(f"{name:<12} {value}".rstrip())


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures in words."""
    yield "model", figures["model"]
    trained = figures["trained_parameters"]
    exact = "" if trained is None else f" by the published formula; {trained:,} are trained"
    yield "parameters", f"{figures['parameters']:,}{exact}"
    if "tokens" in figures:
        yield "tokens", f"{figures['tokens']:,}"
        if figures["unique_tokens"] is not None:
            yield "epochs", f"{figures['epochs']:,.4g} over {figures['unique_tokens']:,} unique tokens"
        yield "samples", f"{figures['train_samples']:,} of {figures['seq_length']:,} tokens"
        yield "warm-up", f"{figures['warmup_samples']:,} samples"
        yield "steps", f"{figures['steps']:,} of {figures['global_batch_size']:,} samples"
        yield "FLOPs", f"{figures['flops']:.3e} = 6 N D"
        if figures["model_flops"] is not None:
            kind = "causal" if figures["objective"] == "ar" else "full"
            yield "", f"{figures['model_flops']:.3e} with {kind} attention: what the logged MFU counts"
        count = "6 N D" if figures["model_flops"] is None else "FLOPs with attention"
        machine = f"{figures['gpus']} GPU{'s' if figures['gpus'] > 1 else ''}"
        share = f"{figures['mfu']:.0%} MFU of {figures['peak_tflops']:g} TFLOP/s"
        yield "time", f"{figures['days']:,.3g} days on {machine}, {count} at {share}, validation not counted"
    gigabytes = figures["checkpoint_bytes"] / 1e9
    yield "checkpoint", f"{gigabytes:,.3g} GB: bf16 weights, fp32 weights, two moments"
    kept = f"{figures['checkpoints_kept']} checkpoints (--keep-last, --keep-best) and the one being written"
    yield "disk", f"{figures['disk_bytes'] / 1e9:,.3g} GB for {kept}"


def _print_table() -> None:
    """Print every row of the model table with its parameters in millions, by the published formula."""
    print(f"{'name':>7} {'millions':>9} {'d_model':>8} {'ffn':>6} {'heads':>6} {'head':>5} {'layers':>7}")
    for row in budget.read_model_table().values():
        sizes = f"{row.d_model:>8} {row.ffn:>6} {row.heads:>6} {row.head_size:>5} {row.layers:>7}"
        print(f"{row.name:>7} {row.parameters / 1e6:>9.1f} {sizes}")


def _print_samples(options: argparse.Namespace) -> None:
    """Print the run's length as shell assignments, the names those of the training scripts."""
    _at_least_one(options, "seq_length")
    if options.flops_factor is not None:
        if options.model is None or options.data is not None or options.epochs is not None:
            raise UserError("--flops-factor needs --model, and neither --data nor --epochs: the budget sets the tokens")
        parameters = _row(options.model).parameters
        print(f"MODEL_PARAM_CNT={parameters}")
        length = budget.budget_from_flops(options.flops_factor * 10**18, parameters, options.seq_length)
    else:
        if options.data is None or options.epochs is None or options.model is not None:
            raise UserError("give --flops-factor with --model, or --data with --epochs")
        _at_least_one(options, "epochs")
        length = budget.budget_from_epochs(_tokens_per_epoch(options.data), options.epochs, options.seq_length)
    print(f"TOKENS={length.tokens}")
    print(f"TRAIN_SAMPLES={length.train_samples}")
    print(f"WARMUP_SAMPLES={length.warmup_samples}")


def _print_memory(options: argparse.Namespace) -> None:
    """Print what every sensible split of a model needs."""
    from megatron.memory_cli import print_splits  # it needs torch, which the other commands do not

    _at_least_one(options, "gpus", "micro_batch_size", "global_batch_size", "seq_length")
    print_splits(
        _row(options.model), options.gpus, vocabulary=_padded_vocabulary(), micro_batch_size=options.micro_batch_size,
        global_batch_size=options.global_batch_size, seq_length=options.seq_length, dropout=options.dropout,
        gpu_bytes=1e9 * options.gpu_memory, fp8=options.fp8, gated=options.bias_swiglu_fusion,
    )  # fmt: skip


def _row(name: str) -> ModelRow:
    """The row of the model table that ``--model`` names, with or without ``PARAM_``."""
    table, name = budget.read_model_table(), name.removeprefix("PARAM_")
    if name not in table:
        raise _unknown_name("--model", name, table, MODEL_TABLE)
    return table[name]


def _tokens_per_epoch(data: str) -> int:
    """Return the tokens of ``--data``: a number, or a name of the token table."""
    if data.isdecimal() and int(data) > 0:
        return int(data)
    table, name = budget.read_token_table(), data.removeprefix("DATA_")
    if name not in table:
        raise _unknown_name("--data", name, table, TOKEN_TABLE)
    return table[name]


def _unknown_name(flag: str, name: str, table: Iterable[str], path: Path) -> UserError:
    nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)
    return UserError(
        f"{flag} {name} is not in {path}: did you mean {nearest[0]}?" if nearest else f"{path} has no rows"
    )


def _padded_vocabulary() -> int:
    """Rows of the embedding with GPT-2's tokens."""
    from megatron.tokenizer.vocabulary import build_vocabulary

    return build_vocabulary(GPT2_VOCABULARY, ModelConfig.make_vocab_size_divisible_by).padded_size


def _at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Raise UserError for the first of the options that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: it must be >= 1")


def _factor(text: str) -> Fraction:
    """Return the exact value of a decimal such as 6, 0.5 or 1e2."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _add_length(parser: argparse.ArgumentParser) -> None:
    """The flags of a run's length."""
    parser.add_argument("--flops-factor", type=_factor, help="budget in units of 1e18 FLOPs = 6 N D")
    parser.add_argument("--data", help="unique tokens: a number, or a name of utils/epoch_tokens.sh, e.g. 100M")
    parser.add_argument("--epochs", type=int, help="passes over --data")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens per sample [2048]")


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="size, length, days and disk of a run", allow_abbrev=False)
    run.add_argument("--model", help="a row of utils/model_params.sh, e.g. 425M")
    run.add_argument("--parameters", type=int, help="instead of --model: its size; attention is then not counted")
    run.add_argument("--num-layers", type=int, help="instead of --model: a shape (SwiGLU, no biases, tied embeddings)")
    run.add_argument("--hidden-size", type=int, help="width of the shape")
    run.add_argument("--num-attention-heads", type=int, help="of the shape [together as wide as --hidden-size]")
    run.add_argument("--kv-channels", type=int, help="width of one head [hidden size / heads]")
    run.add_argument("--ffn-hidden-size", type=int, help="of the shape [int((4h*2/3)/64)*64]")
    _add_length(run)
    run.add_argument("--global-batch-size", type=int, default=256, help="samples per optimizer step [256]")
    run.add_argument("--objective", choices=("ar", "mdm"), default="mdm",
                     help="causal attention costs half as much [mdm]")  # fmt: skip
    run.add_argument("--gpus", type=int, default=1, help="[1]")
    run.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches [0.4]")
    run.add_argument("--peak-tflops", type=float, default=989, help="of one GPU, dense bf16 [989: H100]")
    run.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m megatron.budget", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print every model of utils/model_params.sh with its size")
    commands = parser.add_subparsers(dest="command", metavar="run|samples|memory")
    _add_run(commands)
    samples = commands.add_parser("samples", help="print a run's length as shell assignments", allow_abbrev=False)
    samples.add_argument("--model", help="a row of utils/model_params.sh, e.g. 117M")
    _add_length(samples)
    memory = commands.add_parser(
        "memory", help="estimate what splits of a run need of each GPU, as a table", allow_abbrev=False
    )
    memory.add_argument("--model", required=True, help="a row of utils/model_params.sh, e.g. 2298M")
    memory.add_argument("--gpus", type=int, default=8, help="GPUs of the run [8]")
    memory.add_argument("--micro-batch-size", type=int, default=8, help="[8]")
    memory.add_argument("--global-batch-size", type=int, default=256, help="[256]")
    memory.add_argument("--seq-length", type=int, default=2048, help="tokens per sample [2048]")
    memory.add_argument("--dropout", type=float, default=0.0, help="--hidden-dropout [0]")
    memory.add_argument("--fp8", action="store_true", help="of a run with --fp8, whose blocks keep less")
    memory.add_argument(
        "--bias-swiglu-fusion", action="store_true",
        help="of a run on Hopper GPUs with SwiGLU inside of products (quack-kernels), whose blocks keep less too",
    )  # fmt: skip
    memory.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="what a GPU has [80]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: the process's own) and return the exit code."""
    prints = {"run": _print_run, "samples": _print_samples, "memory": _print_memory}
    try:
        options = _parser().parse_args(argv)
        if options.table == (options.command is not None):
            raise UserError("give either --table or one of the commands run, samples and memory")
        if options.table:
            _print_table()
        else:
            prints[options.command](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
