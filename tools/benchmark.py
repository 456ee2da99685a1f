"""Measure speed on the machine at hand.

    python tools/benchmark.py train --model 425M --objective mdm --micro-batch-size 16   # tokens/s, MFU, memory
    python tools/benchmark.py train --objective ar --compare bare transformers           # against plain loops
    python tools/benchmark.py fp8 --data-path prefix --model 117M                        # losses in fp8 and in bf16
    python tools/benchmark.py data                                                       # sampler and loader
    python tools/benchmark.py preprocess --input text.jsonl --workers 2                  # against the tokenizer library
    python tools/benchmark.py evaluate --model 425M --input arc_easy.jsonl               # against padding one by one
    python tools/benchmark.py parallel                                                   # several GPUs of one host

``train`` runs the real entry point in a process of its own, DeepSpeed, loader and noise included, on random tokens of a
GPT-2-sized vocabulary, and reads the run's own ``metrics.jsonl``; figures are medians over the steps after the warm-up.
``train --compare bare`` also runs a plain PyTorch loop over the same tokens, ``--compare transformers`` one around
transformers' Llama: ratios are worth more than speeds. Figures are printed, and appended to ``--json`` if it is given.
Absolute times are worth comparing only between runs on one machine at one time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.budget import GPT2_VOCABULARY
from megatron.errors import UserError
from tools import benchmark_evaluation, benchmark_fp8, benchmark_parallel, benchmark_training
from tools.benchmark_runs import ROOT, write_random_data

C4_DOCUMENTS = 208_931
"""Documents of the published 100M-token subset of C4."""
C4_TOKENS_A_DOCUMENT = 478.625835


def benchmark_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the start of the sampler, and what one loader worker delivers with MDM noise."""
    from megatron.batch_schedule import BatchSchedule
    from megatron.config import DataConfig, ObjectiveConfig
    from megatron.data import build_dataset
    from megatron.data.loader import build_train_loader
    from megatron.objectives import build_objective
    from megatron.tokenizer import build_vocabulary

    with tempfile.TemporaryDirectory() as name:
        prefix = Path(name) / "data"
        tokens = write_random_data(prefix, arguments.documents, C4_TOKENS_A_DOCUMENT)
        samples = tokens * arguments.epochs // arguments.seq_length
        memory = _peak_rss()
        began = time.perf_counter()
        config = DataConfig(train_data_path=(str(prefix),))
        dataset = build_dataset(config, "train", samples, arguments.seq_length, 1234, num_tokens=GPT2_VOCABULARY)
        dataset[0], dataset[samples // 2], dataset[samples - 1]
        start_seconds = time.perf_counter() - began
        start_megabytes = _peak_rss() - memory
        schedule = BatchSchedule(256)
        vocabulary = build_vocabulary(GPT2_VOCABULARY, 128)
        config_mdm = ObjectiveConfig(objective="mdm")
        objective = build_objective(config_mdm, vocabulary, GPT2_VOCABULARY - 1, 1234, arguments.seq_length, schedule)
        loader = build_train_loader(
            dataset, objective, schedule, consumed_samples=0, train_samples=samples, micro_batch_size=8, num_workers=1
        )
        rates = []
        for _ in range(arguments.repeats):
            began = time.perf_counter()
            for _ in range(100):
                batch = next(loader)
            rates.append(100 * batch.inputs.numel() / (time.perf_counter() - began))
        loader.close()
    return {
        "documents": arguments.documents,
        "epochs": arguments.epochs,
        "sampler_start_seconds": start_seconds,
        "sampler_start_megabytes": start_megabytes,
        "loader_tokens_per_second_a_worker": statistics.median(rates),
    }


def benchmark_preprocess(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time ``tools/preprocess_data.py`` against the tokenizer library's own batch call on the same text and cores."""
    from megatron.tokenizer import build_tokenizer
    from tools.tokenizer_flags import tokenizer_config

    tokenizer = build_tokenizer(tokenizer_config(arguments))
    texts = [json.loads(line)["text"] for line in Path(arguments.input).read_text(encoding="utf-8").splitlines()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    library, ours = [], []
    os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)  # read when the library's pool first starts
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        for start in range(0, len(texts), 1000):
            tokenizer.encode_batch(texts[start : start + 1000])
        library.append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as name:
            command = [
                sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", arguments.input,
                "--output-prefix", str(Path(name) / "out"), "--append-eod", "--workers", str(arguments.workers),
            ]  # fmt: skip
            command += ["--tokenizer-type", arguments.tokenizer_type] if arguments.tokenizer_type else []
            command += ["--tokenizer-model", arguments.tokenizer_model] if arguments.tokenizer_model else []
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            ours.append(time.perf_counter() - began)
    return {
        "megabytes": megabytes,
        "library_mb_per_second": megabytes / statistics.median(library),
        "preprocess_mb_per_second": megabytes / statistics.median(ours),
        "ratio": statistics.median(library) / statistics.median(ours),
    }


def _peak_rss() -> float:
    """Peak memory of this process in 1e6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="training speed of one row of the model table")
    benchmark_training.add_arguments(train)
    fp8 = commands.add_parser("fp8", help="losses of training in fp8 beside those in bf16, on real text")
    benchmark_fp8.add_arguments(fp8)
    data = commands.add_parser("data", help="sampler start and loader throughput")
    data.add_argument("--documents", type=int, default=C4_DOCUMENTS)
    data.add_argument("--epochs", type=int, default=500)
    data.add_argument("--seq-length", type=int, default=2048)
    data.add_argument("--repeats", type=int, default=9)
    preprocess = commands.add_parser("preprocess", help="tokenization throughput")
    preprocess.add_argument("--input", required=True, help="jsonl with the key text")
    preprocess.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    preprocess.add_argument("--repeats", type=int, default=3)
    from tools.tokenizer_flags import add_tokenizer_flags

    add_tokenizer_flags(preprocess)
    evaluate = commands.add_parser("evaluate", help="multiple-choice likelihoods against padding every request")
    benchmark_evaluation.add_arguments(evaluate)
    parallel = commands.add_parser("parallel", help="several GPUs of one host: parity, scaling, failures")
    benchmark_parallel.add_arguments(parallel)
    for command in (train, fp8, data, preprocess, evaluate, parallel):
        command.add_argument("--json", type=Path, help="also append the figures to this file, one JSON object a line")
    return parser


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    for name, value in figures.items():
        yield f"{name:34s} {value:,.4g}" if isinstance(value, float) else f"{name:34s} {value}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    measure = {
        "train": benchmark_training.benchmark_train, "data": benchmark_data, "preprocess": benchmark_preprocess,
        "evaluate": benchmark_evaluation.benchmark_evaluate, "fp8": benchmark_fp8.benchmark_fp8,
    }
    tables = {"train": benchmark_training.table, "fp8": benchmark_fp8.table}
    try:
        if arguments.command == "parallel":
            return benchmark_parallel.benchmark_parallel(arguments)
        figures = measure[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in tables.get(arguments.command, _lines)(figures):
        print(line)
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
