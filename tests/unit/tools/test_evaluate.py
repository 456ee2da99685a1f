"""Tasks of our own through lm-eval, offline: equal to our own likelihoods, alike on one rank and on two."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.config import ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.inference.hub.unmasking import Unmasking
from megatron.inference.likelihood import Estimation, Request, likelihoods
from megatron.inference.loading import LoadedModel, load_model, save_weights
from megatron.inference.scoring import Scorer
from megatron.model.gpt import build_layers, initialize_weights
from megatron.model.sharding import SequentialGPT
from megatron.tokenizer import build_vocabulary

if "CI" not in os.environ:  # there these tests run, or the build fails
    pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
TASKS = ROOT / "tests" / "eval_tasks"
ALL = ",".join(str(TASKS / f"{name}.yaml") for name in ("opposites", "last_word", "passages", "continue"))


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, and no caches in the user's home."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path) -> Callable[[str], Path]:
    """``checkpoint(objective)``: a random tiny model over bytes."""

    made: dict[str, Path] = {}

    def make(objective: str) -> Path:
        if objective not in made:
            config = ModelConfig(
                num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=96, ffn_hidden_size=48,
                normalization="rmsnorm", use_rotary_position_embeddings=True, swiglu=True, disable_bias_linear=True,
                init_method_std=0.2,
            )
            vocabulary = build_vocabulary(257, 8)
            layers = build_layers(config, vocabulary.padded_size, 257, causal=True)
            initialize_weights(layers, config, seed=1)
            made[objective] = tmp_path_factory.mktemp(objective) / "run"
            save_weights(
                made[objective], dict(SequentialGPT(layers, config).named_parameters()), model=config,
                objective=objective, vocabulary=vocabulary, seq_length=96, source="test",
                tokenizer=TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(byte_tokenizer)),
            )
        return made[objective]

    return make


def run(directory: Path, output: Path, *flags: str) -> dict[str, Any]:
    from tools.evaluate import main

    arguments = ["--load", str(directory), "--output", str(output), "--bootstrap-iters", "10", "--quiet", *flags]
    assert main(arguments) == 0
    return json.loads(output.read_text())  # type: ignore[no-any-return]


def choices() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / "opposites.jsonl").read_text().splitlines()]


def expected_accuracy(loaded: LoadedModel, estimation: Estimation) -> float:
    """Accuracy by our own API, every question put alone."""
    from megatron.inference.harness import group_of

    scorer = Scorer(loaded.model, loaded.causal, 256, 2048)
    right = 0
    for index, line in enumerate(choices()):
        context = tuple(f"Question: {line['question']}\nAnswer:".encode())
        group = group_of("opposites", index)
        requests = [Request(context, tuple(f" {choice}".encode()), group) for choice in line["choices"]]
        values = [found.log_prob for found in likelihoods(scorer, requests, estimation, 257)]
        right += values.index(max(values)) == line["gold"]
    return right / len(choices())


@pytest.mark.parametrize(
    ("objective", "flags", "estimation"),
    [
        ("ar", (), Estimation()),
        ("mdm", ("--num-mc", "6"), Estimation(num_mc=6)),
        ("mdm", ("--num-mc", "6", "--mc-estimator", "bernoulli"), Estimation(num_mc=6, estimator="bernoulli")),
        ("mdm", ("--eval-method", "chain"), Estimation(method="chain")),
    ],
)
def test_every_kind_of_task(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    objective: str, flags: tuple[str, ...], estimation: Estimation,
) -> None:
    directory = checkpoint(objective)
    results = run(directory, tmp_path / "results.json", "--tasks", ALL, *flags)
    found = results["results"]
    assert found["opposites"]["acc,none"] == pytest.approx(expected_accuracy(load_model(directory), estimation))
    assert 0 < found["opposites"]["acc_stderr,none"] < 1
    assert found["last_word"]["perplexity,none"] > 1 and found["last_word"]["acc,none"] == 0
    assert found["passages"]["bits_per_byte,none"] > 1
    assert found["continue"]["exact_match,none"] == 0
    ours = results["megatron"]
    assert ours["objective"] == objective and ours["requests"] == 8 * 3 + 6 + 3
    uncertain = objective == "mdm" and estimation.method != "chain"
    assert (ours["mean_stderr_of_a_log_likelihood"] > 0) is uncertain
    printed = capsys.readouterr().out
    assert "|opposites|" in printed and ("standard error of a log likelihood" in printed) is uncertain


def two_ranks(directory: Path, cache: Path, *flags: str) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of the tool in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable, str(ROOT / "tools" / "evaluate.py"), "--load", str(directory), "--bootstrap-iters", "10", *flags
    ]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0].decode() for process in ranks]
    return [process.returncode for process in ranks], outputs


def test_two_ranks_give_the_results_of_one(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory, flags = checkpoint("mdm"), ("--tasks", ALL, "--num-mc", "4", "--log-samples")
    alone = run(directory, tmp_path / "alone.json", *flags)
    codes, outputs = two_ranks(directory, tmp_path / "cache", "--output", str(tmp_path / "two.json"), *flags)
    assert codes == [0, 0], outputs
    assert "|opposites|" in outputs[0] and "|opposites|" not in outputs[1]
    two = json.loads((tmp_path / "two.json").read_text())
    for task, values in alone["results"].items():
        for key, value in values.items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert two["results"][task][key] == expected, (task, key)
    for one, other in zip(alone["samples"]["continue"], two["samples"]["continue"], strict=True):
        assert one["resps"] == other["resps"]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_only_generate_and_only_nll(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    directory = checkpoint(objective)
    found = run(directory, tmp_path / "a.json", "--tasks", ALL, "--only-generate")
    assert set(found["results"]) == {"last_word", "continue"}
    assert "acc,none" in found["results"]["last_word"] and "perplexity,none" not in found["results"]["last_word"]
    assert found["megatron"]["left_out"] == ["opposites", "passages"] and "left out" in capsys.readouterr().out
    found = run(directory, tmp_path / "b.json", "--tasks", ALL, "--only-nll")
    assert set(found["results"]) == {"opposites", "last_word", "passages"}
    assert "acc,none" not in found["results"]["last_word"] and "perplexity,none" in found["results"]["last_word"]
    assert "acc,none" in found["results"]["opposites"]


@pytest.mark.parametrize(("kind", "flags", "left"), [
    ("multiple_choice", {"only_nll": True, "only_generate": False}, {"acc,none", "acc_stderr,none"}),
    ("loglikelihood", {"only_nll": True, "only_generate": False}, {"exact_match,none", "exact_match_stderr,none"}),
    ("loglikelihood", {"only_nll": False, "only_generate": True}, {"acc,none", "acc_stderr,none"}),
    ("generate_until", {"only_nll": False, "only_generate": True}, None),
    ("multiple_choice", {"only_nll": False, "only_generate": False}, None),
])  # fmt: skip
def test_metrics_of_what_was_not_computed_go(kind: str, flags: dict[str, bool], left: set[str] | None) -> None:
    """exact_match of a choice is whether it would be decoded, as lm-eval has it; shown, it would be 0."""
    from tools.evaluate import drop_metrics

    every = {"acc,none", "acc_stderr,none", "exact_match,none", "exact_match_stderr,none"}
    results = {"results": {"t": {"alias": "t"} | dict.fromkeys(every, 0.0)}}
    drop_metrics(results, [SimpleNamespace(OUTPUT_TYPE=kind, task_name="t")], argparse.Namespace(**flags))
    assert set(results["results"]["t"]) == {"alias"} | (every if left is None else left)


def test_wrong_input_ends_with_one_line(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval import tasks

    from tools.evaluate import main

    index = tasks.TaskManager(include_defaults=False)  # the whole index takes many seconds
    monkeypatch.setattr(tasks, "TaskManager", lambda **settings: index)
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\n")
    data = "dataset_path: json\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: q\n"
    (tmp_path / "empty.jsonl").touch()
    for name, files in (("text", "abc"), ("number", "{data_files: {test: 3}}"), ("empty", "{data_files: empty.jsonl}")):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}dataset_kwargs: {files}\n")
    ar = str(checkpoint("ar"))
    few = ["--load", ar, "--tasks", str(TASKS / "opposites.yaml"), "--num-fewshot"]
    out = "is out of range: it must be >="
    for flags, message in (
        (["--load", ar, "--tasks", "no_such_task"], "--tasks no_such_task: not a task"),
        (["--load", ar, "--tasks", str(tmp_path / "none.yaml")], "no such file"),
        (["--load", ar, "--tasks", str(broken)], "none.jsonl"),
        (["--load", str(tmp_path), "--tasks", ALL], "holds no checkpoint"),
        (["--load", ar, "--tasks", ALL, "--eval-method", "mc"], "--eval-method mc is for masked"),
        (["--load", ar, "--tasks", str(TASKS / "opposites.yaml"), "--only-generate"], "none of them"),
        (["--load", ar, "--tasks", ALL, "--gen-tokens-per-step", "0"], "tokens_per_step"),
        (["--load", ar, "--tasks", ALL, "--gen-guidance", "nan"], "guidance nan is not a finite number"),
        (["--load", ar, "--tasks", str(tmp_path / "text.yaml")], "text.yaml: dataset_kwargs: 'abc' is no mapping"),
        (["--load", ar, "--tasks", str(tmp_path / "number.yaml")], "number.yaml: data_files: 3 is no file name"),
        (["--load", ar, "--tasks", str(tmp_path / "empty.yaml")], "empty: StopIteration (is a data file empty?)"),
        (["--load", ar, "--tasks", ALL, "--include-path", "none"], "--include-path none: no such directory"),
        (["--load", ar, "--tasks", ALL, "--limit", "0"], f"--limit 0 {out} 1"),
        (["--load", ar, "--tasks", ALL, "--seed", "-1"], f"--seed -1 {out} 0 and <= 4294967295"),
        (["--load", ar, "--tasks", ALL, "--seed", "4294967296"], f"--seed 4294967296 {out} 0 and <= 4294967295"),
        (["--load", ar, "--tasks", ALL, "--batch-tokens", "0"], f"--batch-tokens 0 {out} 1"),
        (["--load", ar, "--tasks", ALL, "--bootstrap-iters", "-1"], f"--bootstrap-iters -1 {out} 0"),
        (["--load", ar, "--tasks", ALL, "--max-mc", "-1"], f"--max-mc -1 {out} 1"),
        (["--load", ar, "--tasks", ALL, "--mc-tolerance", "inf"], "--mc-tolerance inf is not a finite number"),
        ([*few, "-1"], f"--num-fewshot -1 {out} 0"),
        ([*few, "9"], "--num-fewshot: task opposites has 8 examples at most, not 9"),
    ):
        assert main([*flags, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "flag",
    [
        "--num-mc 32", "--mc-estimator exact", "--mc-tolerance 0.1", "--max-mc 2048", "--gen-order random",
        "--gen-tokens-per-step 1", "--gen-block-length 4", "--gen-guidance 0",
    ],
)
def test_an_ar_model_refuses_what_it_would_ignore(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """Given by the user, that is, also with its default."""
    from tools.evaluate import main

    directory = str(checkpoint("ar"))
    assert main(["--load", directory, "--tasks", str(TASKS / "opposites.yaml"), *flag.split()]) == 2
    refused = f"{flag.split()[0]} is for masked-diffusion models, which {directory} is not: drop it"
    assert capsys.readouterr().err == f"error: {refused}\n"


def test_methods_refuse_the_flags_of_others(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.evaluate import main

    task = str(TASKS / "opposites.yaml")
    for objective, flags, message in (
        ("ar", "--eval-method chain", "--eval-method chain is for masked-diffusion models: the likelihood of an AR"),
        ("mdm", "--chain-order random", "--chain-order is for --eval-method chain, which auto is not: drop it"),
        ("mdm", "--eval-method mc --chain-order random", "--chain-order is for --eval-method chain, which mc is not"),
        ("mdm", "--eval-method chain --mc-estimator exact", "--mc-estimator is for --eval-method mc, which chain"),
        ("mdm", "--eval-method chain --max-mc 9", "--max-mc is for --eval-method mc, which chain is not: drop it"),
    ):
        assert main(["--load", str(checkpoint(objective)), "--tasks", task, *flags.split(), "--quiet"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    # As MODE=chain of the downstream script has it.
    flags = "--eval-method chain --only-nll --num-mc 8 --mc-tolerance 0.5 --limit 2 --quiet"
    assert main(["--load", str(checkpoint("mdm")), "--tasks", task, *flags.split()]) == 0


@pytest.mark.parametrize(("split", "most"), [("", 8), ("fewshot_split: test", 7)])
def test_as_many_examples_as_the_documents_give(
    checkpoint: Callable[[str], Path], tmp_path: Path, split: str, most: int
) -> None:
    """Of the questions' own split lm-eval draws one more, in case the question is among them."""
    from tools.evaluate import main

    task = tmp_path / "task.yaml"
    text = (TASKS / "opposites.yaml").read_text().replace("opposites.jsonl", str(TASKS / "opposites.jsonl"))
    task.write_text(f"{text}{split}\n")
    flags = ["--load", str(checkpoint("ar")), "--tasks", str(task), "--limit", "2", "--quiet", "--num-fewshot"]
    assert main([*flags, str(most)]) == 0
    assert main([*flags, str(most + 1)]) == 2
    task.write_text(f"{text}{split}\nnum_fewshot: 0\n")
    assert main([*flags, str(most + 1)]) == 0, "lm-eval leaves such a task at 0"


OUTPUTS = [
    ("", "--output is empty"), (".", "--output .: is a directory"), ("/dev/null", "no regular file"),
    ("/proc/x/y.json", "--output /proc/x/y.json: cannot be written"), ("lost/y.json", "lost/y.json: cannot be written"),
    ("old.json/y.json", "old.json/y.json: cannot be written: Not a directory"), ("x" * 251, "File name too long"),
]


@pytest.mark.parametrize(("output", "message"), OUTPUTS)
def test_an_impossible_output_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    from tools.evaluate import main

    monkeypatch.chdir(tmp_path)
    Path("old.json").write_text("old")
    Path("lost").symlink_to("nowhere")
    assert main(["--load", "no checkpoint", "--tasks", ALL, "--output", output]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: --output") and error.count("\n") == 1, error
    assert sorted(os.listdir()) == ["lost", "old.json"] and Path("old.json").read_text() == "old"


def test_a_possible_output_is_tried_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.evaluate import main

    (tmp_path / "old.json").write_text("old")
    for output in ("old.json", "new.json", "deep/down/new.json"):
        assert main(["--load", "no checkpoint", "--tasks", "none.yaml", "--output", str(tmp_path / output)]) == 2
        assert "none.yaml: no such file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["old.json"] and (tmp_path / "old.json").read_text() == "old"


def test_no_rank_goes_on_without_an_output(tmp_path: Path) -> None:
    codes, outputs = two_ranks(tmp_path, tmp_path / "cache", "--tasks", ALL, "--output", str(tmp_path))
    assert codes == [2, 2], outputs
    assert f"error: --output {tmp_path}: is a directory" in outputs[0] and "error" not in outputs[1]


# ---- the adapter alone


def harness(directory: Path, **estimation: Any) -> Any:
    from megatron.inference.harness import HarnessModel

    loaded = load_model(directory)
    scorer = Scorer(loaded.model, loaded.causal, 256, 2048)
    return HarnessModel(loaded, scorer, Estimation(**estimation), Unmasking())


def instance(*args: Any, document: int = 0) -> SimpleNamespace:
    return SimpleNamespace(args=args, task_name="t", doc_id=document)


def test_spaces_between_context_and_continuation_belong_to_the_continuation(
    checkpoint: Callable[[str], Path],
) -> None:
    model = harness(checkpoint("ar"))
    pairs = model.encode_pairs([("ab ", "cd"), ("ab", " cd"), ("", "x"), ("  ", "y")])
    assert pairs == [(list(b"ab"), list(b" cd"))] * 2 + [([256], list(b"x")), ([256], list(b"  y"))]


def test_an_answer_without_a_token_of_its_own_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its probability would be 1, and it would win every question."""
    model = harness(checkpoint("ar"))
    monkeypatch.setattr(model, "encode_pairs", lambda pairs: [([97], []), ([97], [98])])
    with pytest.raises(UserError, match=r"task t, document 7: answer 'n' has no token of its own"):
        model.loglikelihood([instance("so i", "n", document=7), instance("so i", "q", document=7)])


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_long_contexts_lose_their_beginning_and_are_counted(
    checkpoint: Callable[[str], Path], objective: str
) -> None:
    model = harness(checkpoint(objective), num_mc=3)
    kept = 96 - 2 + (objective == "ar")
    text = "".join(chr(97 + i % 26) for i in range(150))
    (long,) = model.loglikelihood([instance(text, "zz")])
    assert model.statistics.truncated == 1
    (short,) = model.loglikelihood([instance(text[-kept:], "zz")])
    assert long == short and model.statistics.truncated == 1
    with pytest.raises(UserError, match="does not fit"):
        model.loglikelihood([instance("a", "z" * 97)])


def test_likelihoods_beyond_the_tolerance_are_counted(checkpoint: Callable[[str], Path]) -> None:
    few = [instance("abc", "defghijk", document=i) for i in range(4)]
    model = harness(checkpoint("mdm"), num_mc=4, max_mc=8, tolerance=1e-6)
    model.loglikelihood([*few, instance("abc", "de")])  # two tokens are enumerated: no error
    assert model.statistics.unsure == 4 and model.statistics.as_json()["beyond_tolerance"] == 4
    model = harness(checkpoint("mdm"), num_mc=4, max_mc=8, tolerance=1e6)
    model.loglikelihood(few)
    assert model.statistics.unsure == 0


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_generation_stops_at_strings_and_asks_nothing_unknown(
    checkpoint: Callable[[str], Path], objective: str
) -> None:
    model = harness(checkpoint(objective))
    settings = {"until": [], "max_gen_toks": 10, "do_sample": False, "temperature": 0.0}
    whole, other = model.generate_until([instance("abc", settings), instance("hello world", settings)])
    assert len(whole) > 2
    stop = whole[2]
    cut, same = model.generate_until(
        [instance("abc", settings | {"until": [stop]}), instance("hello world", settings)]
    )
    assert cut == whole[: whole.index(stop)] and same == other
    with pytest.raises(UserError, match="num_beams"):
        model.generate_until([instance("abc", settings | {"num_beams": 4})])
    model.generate_until([instance("abc", settings | {"max_gen_toks": 500})])
    assert model.statistics.shortened == 1


def test_bf16_is_close_to_fp32(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("mdm")
    loaded = load_model(directory, dtype=torch.bfloat16)
    request = [Request(tuple(b"abc"), tuple(b" def"), 0)]
    exact, rounded = (
        likelihoods(Scorer(m.model, False, 256, 2048), request, Estimation(num_mc=15), 257)[0].log_prob
        for m in (load_model(directory), loaded)
    )
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact
