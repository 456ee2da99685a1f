"""Checkpoints in and out.

    python tools/convert_checkpoint.py from-megatron-deepspeed --objective {ar,mdm} --input DIR --output DIR
                                       --num-attention-heads N [--vocab-size N] [tokenizer flags]
    python tools/convert_checkpoint.py to-hf   --input DIR --output DIR [--load-tag TAG] [--dtype bf16]
    python tools/convert_checkpoint.py from-hf --input DIR --output DIR

``from-...`` write a weights-only checkpoint that the tools here load and that training starts from with ``--finetune
--load``. Nothing that lies in a checkpoint is ever executed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron.config import TokenizerConfig
from megatron.errors import UserError
from megatron.files import describe
from megatron.inference.hf_files import read_directory, write_directory
from megatron.inference.hf_format import OurModel, from_hugging_face, to_hugging_face
from megatron.inference.loading import check_tokenizer, describe_checkpoint, find_checkpoint, save_weights
from megatron.inference.model_card import model_card
from megatron.inference.pipeline_import import ImportOptions, import_pipeline_checkpoint
from megatron.inference.weights import full_weights
from megatron.run_metadata import read_metadata
from megatron.tokenizer import build_tokenizer
from tools.fetch_gpt2_vocab import FetchError
from tools.tokenizer_flags import add_tokenizer_flags, tokenizer_config, tokenizer_named

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SIZES = (
    "--num-attention-heads", "--vocab-size", "--max-position-embeddings", "--seq-length",
    "--make-vocab-size-divisible-by",
)
_PATHS = ("--input", "--output", "--vocab-file", "--merge-file", "--tokenizer-model")


def given_tokenizer(flags: argparse.Namespace) -> TokenizerConfig | None:
    """The tokenizer that flags name, if any."""
    return tokenizer_config(flags) if tokenizer_named(flags) else None


def import_megatron_deepspeed(flags: argparse.Namespace) -> None:
    """``from-megatron-deepspeed``."""
    tokenizer = given_tokenizer(flags)
    tokens = None if tokenizer is None else build_tokenizer(tokenizer).vocab_size
    if tokens is not None and flags.vocab_size not in (None, tokens):
        raise UserError(f"--vocab-size {flags.vocab_size}, but the tokenizer has {tokens} tokens: drop one of them")
    options = ImportOptions(
        objective=flags.objective, num_attention_heads=flags.num_attention_heads,
        vocab_size=tokens if flags.vocab_size is None else flags.vocab_size,
        max_position_embeddings=flags.max_position_embeddings, layernorm_epsilon=flags.layernorm_epsilon,
        rope_theta=flags.rope_theta, make_vocab_size_divisible_by=flags.make_vocab_size_divisible_by,
    )
    found = import_pipeline_checkpoint(Path(flags.input), options)
    save(flags, OurModel(flags.objective, found.config, found.vocabulary, found.weights), tokenizer)


def import_hugging_face(flags: argparse.Namespace) -> None:
    """``from-hf``."""
    source = Path(flags.input)
    tokenizer = given_tokenizer(flags)
    if tokenizer is None and (source / "tokenizer.json").is_file():
        tokenizer = TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(source.resolve()))
    save(flags, from_hugging_face(read_directory(source), flags.make_vocab_size_divisible_by), tokenizer)


def save(flags: argparse.Namespace, model: OurModel, tokenizer: TokenizerConfig | None) -> None:
    """Write an imported model and say what it is."""
    if tokenizer is not None:
        check_tokenizer(build_tokenizer(tokenizer), model.vocabulary, flags.input)
    longest = model.config.max_position_embeddings
    length = longest if flags.seq_length is None else flags.seq_length
    if length > longest:
        raise UserError(f"--seq-length {length} exceeds the model's {longest} positions (--max-position-embeddings)")
    path = save_weights(
        flags.output, model.weights, model=model.config, objective=model.objective, vocabulary=model.vocabulary,
        seq_length=length, tokenizer=tokenizer, source=str(Path(flags.input).resolve()),
    )
    total = sum(value.numel() for value in model.weights.values())
    print(f"{path}: {model.objective.upper()}, {total:,} parameters, {model.vocabulary.num_tokens:,} tokens "
          f"padded to {model.vocabulary.padded_size:,}")


def export_hugging_face(flags: argparse.Namespace) -> None:
    """``to-hf``."""
    path = find_checkpoint(flags.input, flags.load_tag)
    description = describe_checkpoint(path, read_metadata(path))
    config = given_tokenizer(flags) or description.tokenizer
    eod = None
    if config is not None:
        tokenizer = build_tokenizer(config)
        check_tokenizer(tokenizer, description.vocabulary, str(path))
        eod = tokenizer.eod
    ours = OurModel(description.objective, description.model, description.vocabulary, full_weights(path))
    theirs = to_hugging_face(ours, eod)
    output = Path(flags.output)
    card = model_card(description, output.name)
    write_directory(output, theirs, card, DTYPES[flags.dtype], config, eod, description.seq_length)
    print(f"{output}: {theirs.config['architectures'][0]}, {flags.dtype}")
    if config is None:
        print("no tokenizer was written: the checkpoint names none; give --vocab-file and --merge-file to add one")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Bring checkpoints in and out.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    megatron = commands.add_parser("from-megatron-deepspeed", help="import a Megatron-DeepSpeed pipeline checkpoint")
    megatron.add_argument("--objective", choices=("ar", "mdm"), required=True, help="what it was trained for")
    megatron.add_argument("--num-attention-heads", type=int, required=True, metavar="N")
    megatron.add_argument(
        "--vocab-size", type=int, metavar="N",
        help="real tokens, whose mask id is N [the tokenizer's; without one every row of the embedding, AR only]",
    )
    megatron.add_argument("--max-position-embeddings", type=int, metavar="N", help="[2048, or the learned positions]")
    megatron.add_argument("--layernorm-epsilon", type=float, default=1e-5, metavar="X", help="[1e-5]")
    megatron.add_argument("--rope-theta", type=float, default=10000.0, metavar="X", help="[10000]")
    hugging = commands.add_parser("from-hf", help="import a Llama, GPT-2 or exported masked-diffusion model")
    export = commands.add_parser("to-hf", help="export any checkpoint of ours for transformers")
    export.add_argument("--load-tag", metavar="TAG", help="which checkpoint in --input [latest]")
    export.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the written weights [fp32]")
    for command, run in (
        (megatron, import_megatron_deepspeed), (hugging, import_hugging_face), (export, export_hugging_face),
    ):
        command.set_defaults(run=run)
        command.add_argument("--input", required=True, metavar="DIR")
        command.add_argument("--output", required=True, metavar="DIR", help="a new directory")
        if command is not export:
            command.add_argument("--seq-length", type=int, metavar="N", help="tokens a sample [the model's longest]")
            command.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="[128]")
        add_tokenizer_flags(command)
    return parser


def check_sizes(flags: argparse.Namespace) -> None:
    """Raise UserError for a size below 1."""
    for flag in _SIZES:
        value = getattr(flags, flag[2:].replace("-", "_"), None)
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} is out of range: it must be >= 1")


def describe_error(error: Exception, flags: argparse.Namespace) -> str:
    """One line, with the flag that names the file or directory."""
    if isinstance(error, OSError) and error.filename is not None:
        for flag in _PATHS:
            given = getattr(flags, flag[2:].replace("-", "_"))
            if given is not None and Path(error.filename).is_relative_to(given):
                return f"{flag} {error.filename}: {describe(error)}"
    return str(error).replace("--load ", "--input ", 1).replace("--save ", "--output ", 1)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    flags = build_parser().parse_args(arguments)
    try:
        check_sizes(flags)
        flags.run(flags)
    except (UserError, FetchError, OSError) as error:
        print(f"error: {describe_error(error, flags)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
