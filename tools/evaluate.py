"""Downstream tasks of lm-eval on a checkpoint of ours, AR or MDM.

    python tools/evaluate.py --load DIR --tasks arc_easy,lambada_standard [--eval-method mc --num-mc 32] [--output FILE]
    torchrun --nproc_per_node 8 tools/evaluate.py ...          the same numbers, divided over eight GPUs

Tasks are names that lm-eval knows or paths of YAML files; ``data_files`` in such a file are relative to it, so that a
task of one's own is a YAML and a jsonl beside each other and needs no network (``HF_HUB_OFFLINE=1``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if not sys.stderr.isatty() or "--quiet" in sys.argv or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when torch imports tqdm

import torch

from megatron.config import ParallelConfig
from megatron.distributed.agreement import agree_on_error
from megatron.distributed.topology import Topology, single_process_topology
from megatron.errors import UserError
from megatron.files import finite, write_atomically
from megatron.inference.generation import unmasking_settings
from megatron.inference.hub.unmasking import ORDERS, Unmasking
from megatron.inference.likelihood import CHAIN_ORDERS, ESTIMATORS, METHODS, Estimation
from megatron.inference.loading import LoadedModel, load_model
from megatron.inference.scoring import Scorer
from megatron.initialize import initialize, leave, shut_down
from tools.fetch_gpt2_vocab import FetchError
from tools.output_flag import check_output
from tools.tokenizer_flags import add_tokenizer_flags, tokenizer_config, tokenizer_named

if TYPE_CHECKING:
    from megatron.inference.harness import HarnessModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GENERATIVE = {
    "loglikelihood": ("acc", "acc_stderr"),
    "multiple_choice": ("exact_match", "exact_match_stderr"),
}
"""Metrics of a kind of task that say whether greedy decoding gives the answer."""
BOUNDS = {
    "num_fewshot": (0, sys.maxsize), "limit": (1, sys.maxsize), "max_mc": (1, sys.maxsize),
    "batch_tokens": (1, sys.maxsize), "bootstrap_iters": (0, sys.maxsize), "seed": (0, 2**32 - 1),  # NumPy's seeds
}
ONLY_MDM = (
    "num_mc", "mc_estimator", "mc_tolerance", "max_mc", "chain_order", "gen_order", "gen_tokens_per_step",
    "gen_block_length", "gen_guidance",
)
ONLY_MC = ("mc_estimator", "max_mc")
"""Of Monte Carlo alone. ``num_mc`` and ``mc_tolerance`` too, but the downstream scripts give them with every mode."""


# ---- flags


class Given(argparse.Action):
    """Stores a value, and in ``given`` that the user gave it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store both."""
        setattr(namespace, self.dest, values)
        namespace.given |= {self.dest}


def check_flags(flags: argparse.Namespace) -> None:
    """What can be said before anything is read.

    Raises:
        UserError: a number out of range, a directory that is missing, or a flag that would be ignored.
    """
    for name, (least, most) in BOUNDS.items():
        value = getattr(flags, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{_flag(name)} {value} is out of range: it must be >= {least} and <= {most}")
    if flags.mc_tolerance is not None and not math.isfinite(flags.mc_tolerance):
        raise UserError(f"--mc-tolerance {flags.mc_tolerance} is not a finite number")
    if flags.include_path is not None and not Path(flags.include_path).is_dir():
        raise UserError(f"--include-path {flags.include_path}: no such directory")
    method, others = ("mc", ONLY_MC) if flags.eval_method == "chain" else ("chain", ("chain_order",))
    for name in others:
        if name in flags.given:
            raise UserError(f"{_flag(name)} is for --eval-method {method}, which {flags.eval_method} is not: drop it")


def refuse_other_family(loaded: LoadedModel, flags: argparse.Namespace) -> None:
    """A flag that an AR model ignores is an error."""
    if not loaded.causal:
        return
    if flags.eval_method != "auto":
        raise UserError(
            f"--eval-method {flags.eval_method} is for masked-diffusion models: the likelihood of an AR model is exact"
        )
    for name in ONLY_MDM:
        if name in flags.given:
            raise UserError(f"{_flag(name)} is for masked-diffusion models, which {flags.load} is not: drop it")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---- tasks


def read_tasks(names: Sequence[str]) -> list[str | dict[str, Any]]:
    """Task names as they are; YAML files as configurations whose relative ``data_files`` are found beside them."""
    from lm_eval.tasks._yaml_loader import load_yaml

    specs: list[str | dict[str, Any]] = []
    for name in names:
        path = Path(name).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            specs.append(name)
            continue
        if not path.is_file():
            raise UserError(f"--tasks {name}: no such file")
        try:
            config = dict(load_yaml(path))
        except Exception as error:  # whatever YAML and the file's own functions raise
            raise UserError(f"--tasks {name}: {' '.join(str(error).split())}") from error
        arguments = config.get("dataset_kwargs") or {}
        if not isinstance(arguments, dict):
            raise UserError(f"--tasks {name}: dataset_kwargs: {arguments!r} is no mapping")
        if "data_files" in arguments:
            try:
                files = _beside(arguments["data_files"], path.resolve().parent)
            except TypeError as error:
                raise UserError(f"--tasks {name}: data_files: {error}") from error
            config["dataset_kwargs"] = arguments | {"data_files": files}
        specs.append(config)
    return specs


def _beside(files: Any, directory: Path) -> Any:
    if isinstance(files, dict):
        return {split: _beside(file, directory) for split, file in files.items()}
    if isinstance(files, list):
        return [_beside(file, directory) for file in files]
    if not isinstance(files, str):
        raise TypeError(f"{files!r} is no file name")
    return files if "://" in files else str(directory / files)


def build_tasks(specs: list[str | dict[str, Any]], include_path: str | None) -> tuple[Any, list[Any]]:
    """lm-eval's task manager and its loaded tasks and groups.

    Raises:
        UserError: an unknown name, or a data set that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    # lm-eval reads some ten thousand files to know its tasks: not where all are given as files.
    manager = TaskManager(include_path=include_path, include_defaults=any(isinstance(spec, str) for spec in specs))
    built = []
    for spec in specs:
        try:
            loaded = manager.load([spec])
        except Exception as error:  # unknown names, the network, damaged data: a dozen unrelated types
            name = spec if isinstance(spec, str) else spec.get("task")
            if isinstance(spec, str) and spec not in manager.all_tasks:
                raise UserError(f"--tasks {name}: not a task of lm-eval, nor a YAML file") from error
            said = " ".join(str(error).split()) or f"{type(error).__name__} (is a data file empty?)"
            raise UserError(f"--tasks {name}: {said}") from error
        groups = loaded["groups"]
        built += [groups[spec]] if isinstance(spec, str) and spec in groups else list(loaded["tasks"].values())
    return manager, built


def select_tasks(built: list[Any], flags: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """Those that ``--only-generate`` or ``--only-nll`` leave, and the names of the others."""
    if not (flags.only_generate or flags.only_nll):
        return built, []
    leaves = _leaves(built)
    wanted = ("generate_until", "loglikelihood") if flags.only_generate else (
        "loglikelihood", "multiple_choice", "loglikelihood_rolling"
    )
    kept = [task for task in leaves if task.OUTPUT_TYPE in wanted]
    return kept, [task.task_name for task in leaves if task.OUTPUT_TYPE not in wanted]


def _leaves(built: list[Any]) -> list[Any]:
    return [task for item in built for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])]


def check_fewshot(built: list[Any], num_fewshot: int | None) -> None:
    """Refuse more examples than a task has, by the rules of lm-eval: a task that says 0 is left at that."""
    for task in _leaves(built):
        own, pool = task.get_config("num_fewshot"), getattr(getattr(task, "sampler", None), "df", None)
        wanted = own if own == 0 or num_fewshot is None else num_fewshot
        if not wanted or pool is None:
            continue
        # Where they are of one split, it draws one more, in case the question is among them.
        most = len(pool) - (task.fewshot_cfg.split == task.config.test_split)
        if wanted > most:
            flag = "" if num_fewshot is None else "--num-fewshot: "
            raise UserError(f"{flag}task {task.task_name} has {most} examples at most, not {wanted}")


def drop_metrics(results: dict[str, Any], built: list[Any], flags: argparse.Namespace) -> None:
    """Leave out the metrics that rest on what was not computed: greedy decoding, or likelihoods."""
    if not (flags.only_generate or flags.only_nll):
        return
    for task in built:
        if task.OUTPUT_TYPE in GENERATIVE:
            own = results["results"].get(task.task_name, {})
            for key in [key for key in own if "," in key]:
                if (key.partition(",")[0] in GENERATIVE[task.OUTPUT_TYPE]) == bool(flags.only_nll):
                    del own[key]


# ---- the run


def evaluate(flags: argparse.Namespace, topology: Topology) -> dict[str, Any] | None:
    """Evaluate; returns lm-eval's results with a key ``megatron`` of ours, None on every rank but the first."""
    import lm_eval

    check_flags(flags)
    estimation = Estimation(
        method=flags.eval_method, num_mc=flags.num_mc, estimator=flags.mc_estimator, tolerance=flags.mc_tolerance,
        max_mc=max(flags.max_mc, flags.num_mc), order=flags.chain_order, log_probs=not flags.only_generate,
        greedy=not flags.only_nll,
    )
    unmasking = unmasking_settings(
        order=flags.gen_order, tokens_per_step=flags.gen_tokens_per_step, block_length=flags.gen_block_length,
        guidance=flags.gen_guidance,
    )
    with agree_on_error(topology):
        if topology.is_first and flags.output is not None:
            check_output(flags.output)
    with agree_on_error(topology):
        manager, built = build_tasks(read_tasks(flags.tasks), flags.include_path)
        tasks, dropped = select_tasks(built, flags)
        if not tasks:
            raise UserError(f"--tasks {','.join(flags.tasks)}: --only-generate or --only-nll leaves none of them")
        check_fewshot(tasks, flags.num_fewshot)
        model = build_model(flags, topology, estimation, unmasking)
    loaded = model.loaded
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the results
        results = lm_eval.simple_evaluate(
            model=model, tasks=tasks, num_fewshot=flags.num_fewshot, limit=flags.limit, task_manager=manager,
            log_samples=flags.log_samples, bootstrap_iters=flags.bootstrap_iters, random_seed=flags.seed,
            numpy_random_seed=flags.seed, torch_random_seed=flags.seed, fewshot_random_seed=flags.seed,
        )
    if not topology.is_first:
        return None
    assert results is not None
    drop_metrics(results, tasks, flags)
    results["megatron"] = {
        "checkpoint": str(loaded.description.path), "objective": loaded.description.objective,
        "likelihood": "exact" if loaded.causal else "chain rule" if flags.eval_method == "chain"
        else "lower bound (Monte Carlo ELBO)",
        "estimation": dataclasses.asdict(estimation), "unmasking": dataclasses.asdict(model.unmasking),
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."), "left_out": dropped,
        "seconds": time.perf_counter() - start, **model.statistics.as_json(),
    }
    return dict(results)


def build_model(
    flags: argparse.Namespace, topology: Topology, estimation: Estimation, unmasking: Unmasking
) -> HarnessModel:
    """The checkpoint's model behind lm-eval's interface."""
    from megatron.inference.harness import HarnessModel

    loaded = load_model(
        flags.load, flags.load_tag, topology.device, DTYPES[flags.dtype or default_dtype(topology.device)],
        tokenizer_config(flags) if tokenizer_named(flags) else None,
    )
    refuse_other_family(loaded, flags)
    scorer = Scorer(
        loaded.model, loaded.causal, loaded.needs_tokenizer().eod,
        flags.batch_tokens or default_batch_tokens(topology.device), topology,
        Progress() if topology.is_first and not flags.quiet else None,
    )
    return HarnessModel(loaded, scorer, estimation, unmasking, flags.seed)


def default_dtype(device: torch.device) -> str:
    """bf16 where it is fast."""
    return "bf16" if device.type == "cuda" else "fp32"


def default_batch_tokens(device: torch.device) -> int:
    """Positions of a batch that keep the device busy."""
    return 65536 if device.type == "cuda" else 4096


class Progress:
    """A line now and then, or one that is rewritten on a terminal: sequences scored."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Say how far the present request type is."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._last > (0.2 if terminal else 30):
            end = "\r" if terminal else "\n"
            print(f"{done:,} of {total:,} sequences scored", end=end, file=sys.stderr, flush=True)
            self._last = now


def report(results: dict[str, Any], loaded_from: str, output: str | None) -> None:
    """Print lm-eval's table and what it does not say; write everything to ``output``."""
    from lm_eval.utils import handle_non_serializable, make_table

    ours = results["megatron"]
    print(f"{loaded_from}: {ours['objective'].upper()}, likelihood: {ours['likelihood']}")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    error = ours["mean_stderr_of_a_log_likelihood"]
    if error:
        print(f"standard error of a log likelihood, mean: {error:.3f} nats; the Stderr column is over questions")
    for key, text in (("truncated_contexts", "requests lost the beginning of their context, to fit the model's window"),
                      ("shortened_generations", "generations got fewer tokens than the task asked for"),
                      ("beyond_tolerance", "likelihoods are known less well than --mc-tolerance says: raise --max-mc")):
        if ours[key]:
            print(f"note: {ours[key]:,} {text}")
    if ours["left_out"]:
        print(f"note: left out, as --only-generate or --only-nll says: {', '.join(ours['left_out'])}")
    if output is not None:
        # Through JSON once, so that what it has no word for (functions, NaN) becomes text or null.
        plain = json.loads(json.dumps(results, default=handle_non_serializable))
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(output), json.dumps(finite(plain), indent=1, allow_nan=False) + "\n")
        print(f"written to {output}")


def names(text: str) -> list[str]:
    """A list with commas between its members."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("give at least one name")
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Downstream tasks on a checkpoint.", allow_abbrev=False)
    parser.set_defaults(given=frozenset())
    add, mdm = parser.add_argument, functools.partial(parser.add_argument, action=Given)
    add("--load", required=True, metavar="DIR", help="checkpoint directory")
    add("--load-tag", metavar="TAG", help="which checkpoint in it [latest]")
    add("--tasks", required=True, type=names, metavar="A,B", help="names of lm-eval tasks, or paths of YAML files")
    add("--include-path", metavar="DIR", help="a directory of further task YAMLs")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question [the task's]")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--eval-method", choices=METHODS, default="auto", help="MDM: auto is mc [auto]")
    mdm("--num-mc", type=int, default=32, metavar="N", help="MDM: Monte Carlo draws [32]")
    mdm("--mc-estimator", choices=ESTIMATORS, default="exact", help="MDM: exact counts or Bernoulli masks [exact]")
    mdm("--mc-tolerance", type=float, metavar="X", help="MDM: draw on until the standard error is X nats")
    mdm("--max-mc", type=int, default=1024, metavar="N", help="with --mc-tolerance: at most N draws [1024]")
    mdm("--chain-order", choices=CHAIN_ORDERS, default=CHAIN_ORDERS[0], help="MDM, chain: order [left-to-right]")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-generate", action="store_true", help="only what is decoded, no likelihoods")
    only.add_argument("--only-nll", action="store_true", help="only likelihoods, nothing is decoded")
    mdm("--gen-order", choices=ORDERS, default="confidence", help="MDM, generation tasks: order [confidence]")
    mdm("--gen-tokens-per-step", type=int, default=1, metavar="N", help="MDM, generation tasks [1]")
    mdm("--gen-block-length", type=int, metavar="N", help="MDM, generation tasks: semi-autoregressive blocks")
    mdm("--gen-guidance", type=float, default=0.0, metavar="W", help="MDM, generation tasks [0]")
    add("--batch-tokens", type=int, metavar="N", help="positions of a batch [65536 on a GPU, 4096 on a CPU]")
    add("--dtype", choices=tuple(DTYPES), help="of weights and activations [bf16 on a GPU, fp32 on a CPU]")
    add("--bootstrap-iters", type=int, default=10000, metavar="N", help="resamplings for a perplexity's error [10000]")
    add("--seed", type=int, default=1234, help="of few-shot examples and sampling [1234]")
    add("--output", metavar="FILE", help="write the results as JSON")
    add("--log-samples", action="store_true", help="with every question and answer in them")
    add("--quiet", action="store_true", help="no progress on standard error")
    add_tokenizer_flags(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    flags = build_parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        print("error: lm-eval is not installed: pip install -e '.[eval]'", file=sys.stderr)
        return 2
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        if "WORLD_SIZE" in os.environ:
            topology = initialize(ParallelConfig())
        else:
            topology = single_process_topology("cuda" if torch.cuda.is_available() else "cpu")
        results = evaluate(flags, topology)
        with agree_on_error(topology):
            if results is not None:
                report(results, flags.load, flags.output)
    except (UserError, FetchError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks fail alike
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shut_down()
    return 0


if __name__ == "__main__":
    leave(main())
