"""Text from a checkpoint of ours, AR or MDM.

    python tools/generate.py --load DIR --prompt "Once upon a time" --max-new-tokens 64
    python tools/generate.py --load MDM_DIR --prompt "The <|mask:6|> was never seen again." --order random

Without ``--prompt``, each line of standard input is one. On a terminal one text is shown as it grows: AR token by
token, MDM being unmasked. The same flags and seed give the same text. From Python: ``megatron.inference.generation``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.inference.generation import Sampling, fill_masks, generate_autoregressive, unmasking_settings
from megatron.inference.hub.unmasking import ORDERS
from megatron.inference.infilling import HOLE, encode_with_holes
from megatron.inference.loading import LoadedModel, load_model
from megatron.tokenizer import Tokenizer
from tools.fetch_gpt2_vocab import FetchError
from tools.live_text import LiveText
from tools.tokenizer_flags import add_tokenizer_flags, tokenizer_config, tokenizer_named

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ONLY_AR = ("top_k", "top_p")
ONLY_MDM = ("order", "tokens_per_step", "block_length", "guidance")


def autoregressive(loaded: LoadedModel, prompts: Sequence[str], flags: argparse.Namespace, live: bool) -> list[str]:
    """Continue every prompt; returns prompts with their continuations."""
    tokenizer = loaded.needs_tokenizer()
    for prompt in prompts:
        if HOLE.search(prompt):
            raise UserError("a prompt has holes (<|mask|>), which only masked-diffusion models fill")
    sampling = Sampling(flags.temperature, flags.top_k, 1.0 if flags.top_p is None else flags.top_p)
    stream = Stream(tokenizer, prompts[0]) if live else None
    rows = generate_autoregressive(
        loaded, [tokenizer.encode(prompt) for prompt in prompts], flags.max_new_tokens, sampling, flags.seed,
        on_token=None if stream is None else stream,
    )
    if stream is not None:
        stream.finish()
    return [prompt + tokenizer.decode(row) for prompt, row in zip(prompts, rows, strict=True)]


class Stream:
    """Prints a growing text; a character that is not complete yet waits."""

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        print(prompt, end="", flush=True)

    def __call__(self, row: int, token: int) -> None:
        """One more token."""
        self._ids.append(token)
        if not self._tokenizer.decode(self._ids).endswith("\ufffd"):
            self._catch_up()

    def finish(self) -> None:
        """Print what waited for more, and end the line."""
        self._catch_up()
        print()

    def _catch_up(self) -> None:
        text = self._tokenizer.decode(self._ids)
        print(text[self._shown :], end="", flush=True)
        self._shown = len(text)


def masked_diffusion(loaded: LoadedModel, prompts: Sequence[str], flags: argparse.Namespace, live: bool) -> list[str]:
    """Fill the holes of every prompt; one without holes is continued. Returns whole texts."""
    tokenizer, mask_id = loaded.needs_tokenizer(), loaded.vocabulary.mask_id
    settings = unmasking_settings(
        order=flags.order or "confidence",
        tokens_per_step=1 if flags.tokens_per_step is None else flags.tokens_per_step,
        block_length=flags.block_length,
        temperature=flags.temperature,
        guidance=flags.guidance or 0.0,
    )
    rows, starts = [], []
    for prompt in prompts:
        row = encode_with_holes(prompt, tokenizer, mask_id, loaded.seq_length)
        starts.append(len(row))
        if mask_id not in row:
            # As in training, a text begins after the end of another.
            row = row or [tokenizer.eod]
            room = loaded.seq_length - len(row)
            if room < 1:
                raise UserError(f"a prompt of {len(row)} tokens leaves no room in {loaded.seq_length}: shorten it")
            row += [mask_id] * min(flags.max_new_tokens, room)
        rows.append(row)
    display = LiveText(tokenizer, mask_id, sys.stdout) if live else None

    def on_step(tokens: Tensor, remaining: Tensor) -> None:
        if display is not None:
            display.show(tokens[0].tolist())

    if display is not None:
        display.start(rows[0])
    filled = fill_masks(loaded, rows, settings, flags.seed, on_step)
    if display is not None:
        display.finish(filled[0])
    return [_text(row, start, tokenizer) for row, start in zip(filled, starts, strict=True)]


def _text(row: list[int], start: int, tokenizer: Tokenizer) -> str:
    """A continuation (what follows ``start``) ends with its document; holes and prompts are shown whole."""
    new = row[start:]
    end = new.index(tokenizer.eod) if tokenizer.eod in new else len(new)
    return tokenizer.decode([token for token in row[: start + end] if token != tokenizer.eod])


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """``--prompt``, else the lines of ``--prompt-file`` or of standard input; each ``--num-samples`` times."""
    prompts: list[str] = flags.prompt or []
    if prompts and flags.prompt_file is not None:
        raise UserError("--prompt-file is not read where --prompt is given: drop one of them")
    if not prompts:
        lines = _standard_input() if flags.prompt_file is None else _lines(flags.prompt_file)
        prompts = [line.rstrip("\n") for line in lines if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt, --prompt-file or lines on standard input")
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python reads bytes that are none
            raise UserError(f"{'--prompt' if flags.prompt else 'standard input'}: {prompt!a} is not UTF-8")
    return [prompt for prompt in prompts for _ in range(flags.num_samples)]


def _lines(name: str) -> list[str]:
    data = Path(name).read_bytes()
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"--prompt-file {name}: line {line} is not UTF-8") from error


def _standard_input() -> list[str]:
    try:
        return list(sys.stdin)
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8") from error


def refuse_other_family(loaded: LoadedModel, flags: argparse.Namespace) -> None:
    """A flag that this kind of model ignores is an error."""
    names, kind = (ONLY_MDM, "masked-diffusion") if loaded.causal else (ONLY_AR, "autoregressive")
    for name in names:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for {kind} models, which {flags.load} is not: drop it")


def generate(flags: argparse.Namespace) -> None:
    """Load, generate, print."""
    if flags.max_new_tokens < 1 or flags.num_samples < 1:
        raise UserError("--max-new-tokens and --num-samples start at 1")
    if not -(2**63) <= flags.seed < 2**64:  # what torch takes
        raise UserError(f"--seed {flags.seed} is out of range: it must be >= {-(2**63)} and < {2**64}")
    prompts = read_prompts(flags)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[flags.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    loaded = load_model(
        flags.load, flags.load_tag, device, dtype, tokenizer_config(flags) if tokenizer_named(flags) else None
    )
    refuse_other_family(loaded, flags)
    live = sys.stdout.isatty() and len(prompts) == 1 and not flags.no_live
    texts = (autoregressive if loaded.causal else masked_diffusion)(loaded, prompts, flags, live)
    if not live:
        print("\n---\n".join(texts))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Text from a checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="checkpoint directory")
    add("--load-tag", metavar="TAG", help="which checkpoint in it [latest]")
    add("--prompt", action="append", metavar="TEXT", help="may be repeated; MDM: <|mask:N|> is a hole of N tokens")
    add("--prompt-file", metavar="FILE", help="a prompt a line [standard input]")
    add("--num-samples", type=int, default=1, metavar="N", help="texts of each prompt [1]")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="after a prompt without holes [64]")
    add("--temperature", type=float, default=1.0, metavar="X", help="0 takes the most probable token [1]")
    add("--top-k", type=int, metavar="N", help="AR: only the N most probable tokens")
    add("--top-p", type=float, metavar="X", help="AR: only the most probable tokens that together reach X")
    add("--order", choices=ORDERS, help="MDM: which positions are filled first [confidence]")
    add("--tokens-per-step", type=int, metavar="N", help="MDM: positions filled in a step [1]")
    add("--block-length", type=int, metavar="N", help="MDM: fill in blocks of N from left to right")
    add("--guidance", type=float, metavar="W", help="MDM: classifier-free guidance [0]")
    add("--seed", type=int, default=1234, help="of the sampling [1234]")
    add("--dtype", choices=tuple(DTYPES), help="[bf16 on a GPU, fp32 on a CPU]")
    add("--no-live", action="store_true", help="print the finished text only, also on a terminal")
    add_tokenizer_flags(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    flags = build_parser().parse_args(arguments)
    try:
        generate(flags)
    except (UserError, FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
