"""Speed of multiple-choice likelihoods: ours against padding every request to the window, one request at a time.

Called by ``tools/benchmark.py evaluate``. Weights are random: what a model says is of no account for speed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.budget import GPT2_VOCABULARY
from megatron.inference.forward import final_hidden, token_scores
from megatron.inference.likelihood import Estimation, Request, likelihoods
from megatron.inference.mask_draws import levels, mask_noise, monte_carlo
from megatron.inference.scoring import Scorer
from megatron.model.gpt import build_layers, initialize_weights
from megatron.model.sharding import SequentialGPT
from megatron.tokenizer import Vocabulary, build_tokenizer, build_vocabulary
from tools.benchmark_runs import table_row
from tools.tokenizer_flags import add_tokenizer_flags, tokenizer_config

PROMPT_TOKENS, ANSWER_TOKENS, CHOICES = 30.0, 4.5, 4
"""Mean lengths of ARC-easy's questions and answers in GPT-2 tokens, for questions made up of random tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``benchmark.py evaluate``."""
    parser.add_argument("--model", default="425M", help="row of utils/model_params.sh [425M]")
    parser.add_argument("--objective", choices=("ar", "mdm"), default="mdm")
    parser.add_argument("--input", help="jsonl with the keys query and choices [questions of random tokens]")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--num-mc", type=int, default=32)
    parser.add_argument("--estimator", choices=("exact", "bernoulli"), default="bernoulli",
                        help="bernoulli is the published one; exact has less noise in about as many passes [bernoulli]")
    parser.add_argument("--seq-length", type=int, default=2048, help="the window that the baseline pads to [2048]")
    parser.add_argument("--batch-tokens", type=int, help="positions of a batch [65536 on a GPU, 4096 on a CPU]")
    parser.add_argument("--baseline-requests", type=int, default=8, help="requests that the baseline is timed on [8]")
    parser.add_argument("--baseline-micro-batch", type=int, default=8, help="rows the baseline sends at once [8]")
    parser.add_argument("--repeats", type=int, default=3)
    add_tokenizer_flags(parser)


def benchmark_evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Requests a second of both ways, with the same precision, head and draws."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = build_vocabulary(GPT2_VOCABULARY, 128)
    model = _model(arguments, vocabulary, device)
    requests = _requests(arguments)
    causal = arguments.objective == "ar"
    batch_tokens = arguments.batch_tokens or (65536 if device.type == "cuda" else 4096)
    scorer = Scorer(model, causal, GPT2_VOCABULARY - 1, batch_tokens)
    estimation = Estimation(num_mc=arguments.num_mc, estimator=arguments.estimator, greedy=False)
    likelihoods(scorer, requests[: 4 * CHOICES], estimation, vocabulary.mask_id)  # warm-up
    ours = []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        likelihoods(scorer, requests, estimation, vocabulary.mask_id)
        ours.append(len(requests) / (time.perf_counter() - began))
    few = requests[: arguments.baseline_requests]
    baseline = []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        for request in few:
            _one_by_one(model, causal, request, arguments, vocabulary.mask_id, device)
        baseline.append(len(few) / (time.perf_counter() - began))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "requests": len(requests),
        "mean_tokens": float(np.mean([len(r.context) + len(r.continuation) for r in requests])),
        "requests_per_second": float(np.median(ours)),
        "first_time_per_second": ours[0],
        "padded_one_by_one_per_second": float(np.median(baseline)),
        "ratio": float(np.median(ours) / np.median(baseline)),
    }


def _model(arguments: argparse.Namespace, vocabulary: Vocabulary, device: torch.device) -> SequentialGPT:
    config = table_row(arguments.model).model(arguments.seq_length)
    with device:
        layers = build_layers(config, vocabulary.padded_size, vocabulary.num_tokens, arguments.objective == "ar")
    initialize_weights(layers, config, 1234)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return SequentialGPT(layers, config).to(dtype).eval().requires_grad_(False)


def _requests(arguments: argparse.Namespace) -> list[Request]:
    if arguments.input is None:
        random = np.random.default_rng(0)
        made = []
        for group in range(arguments.questions):
            context = tuple(random.integers(0, GPT2_VOCABULARY - 1, 1 + random.poisson(PROMPT_TOKENS - 1)).tolist())
            for _ in range(CHOICES):
                answer = random.integers(0, GPT2_VOCABULARY - 1, 1 + random.poisson(ANSWER_TOKENS - 1))
                made.append(Request(context, tuple(answer.tolist()), group))
        return made
    tokenizer = build_tokenizer(tokenizer_config(arguments))
    lines = Path(arguments.input).read_text(encoding="utf-8").splitlines()[: arguments.questions]
    found = []
    for group, line in enumerate(map(json.loads, lines)):
        context = tuple(tokenizer.encode(f"{line['query']}\nAnswer:"))
        found += [Request(context, tuple(tokenizer.encode(f" {choice}")), group) for choice in line["choices"]]
    return found


@torch.no_grad()
def _one_by_one(
    model: SequentialGPT, causal: bool, request: Request, arguments: argparse.Namespace, mask_id: int,
    device: torch.device,
) -> float:
    """The baseline: every draw of one request is a row padded to the window; scored only where it must be."""
    length, start = len(request.continuation), len(request.context)
    tokens = np.array(request.context + request.continuation)
    padded = np.full((1 if causal else arguments.num_mc, arguments.seq_length), GPT2_VOCABULARY - 1)
    padded[:, : len(tokens)] = tokens
    if causal:
        masks, weights = np.ones((1, length), dtype=bool), np.ones(1)
    else:
        noise = mask_noise(request.group, 0, arguments.num_mc, length)
        draws = monte_carlo(levels(request.group, 0, arguments.num_mc), noise, arguments.estimator)
        masks, weights = draws.masks[draws.index], draws.weights
        padded[:, start : start + length][masks] = mask_id
    total = 0.0
    for first in range(0, len(padded), arguments.baseline_micro_batch):
        rows = slice(first, first + arguments.baseline_micro_batch)
        inputs = torch.from_numpy(padded[rows]).to(device)
        positions = torch.arange(arguments.seq_length, device=device).expand(inputs.shape)
        hidden = final_hidden(model, inputs, positions)
        row, place = np.nonzero(masks[rows])
        if len(row) == 0:
            continue
        where = torch.from_numpy(row * arguments.seq_length + start - causal + place).to(device)
        targets = torch.from_numpy(np.asarray(request.continuation)[place]).to(device)
        nll, _, _ = token_scores(model, hidden.flatten(0, 1).index_select(0, where), targets)
        total += float((nll.cpu().numpy() * weights[rows][row]).sum())
    return total / len(padded)
