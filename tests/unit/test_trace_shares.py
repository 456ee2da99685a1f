"""Shares of a step from hand-made traces, whose every instant is known, and from a real one of PyTorch's profiler."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron.trace_shares import (
    ATTENTION,
    COMMUNICATION,
    DATA,
    HEAD,
    HEADINGS,
    IDLE,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    WINDOW,
    read_trace,
    step_shares,
)

Event = dict[str, Any]
VOCABULARY = frozenset({50_304, 50_264})
MAIN, AUTOGRAD = 7, 8  # threads


def host(name: str, begin: float, end: float, *, cat: str = "cpu_op", tid: int = MAIN, dims: Any = None) -> Event:
    args = {} if dims is None else {"Input Dims": dims}
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": begin, "dur": end - begin, "args": args}


def ranged(name: str, begin: float, end: float) -> Event:
    return host(name, begin, end, cat="user_annotation")


def kernel(name: str, begin: float, end: float, launch: int, stream: int = 20, cat: str = "kernel") -> Event:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": stream, "ts": begin, "dur": end - begin,
            "args": {"correlation": launch}}  # fmt: skip


def launch(at: float, correlation: int, tid: int = MAIN) -> Event:
    return {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": tid, "ts": at, "dur": 1,
            "args": {"correlation": correlation}}  # fmt: skip


def shares(*events: Event) -> dict[str, float]:
    """Non-zero shares, of a window of 1000 microseconds."""
    found = step_shares([ranged(WINDOW, 0, 1000), *events], VOCABULARY)
    assert set(found.shares) == set(HEADINGS)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.seconds == pytest.approx(1e-3)
    return {heading: share for heading, share in found.shares.items() if share}


def test_kernels_by_name_by_caller_and_by_shape() -> None:
    found = shares(
        # A product with the vocabulary, and one without; the same kernel serves both.
        host("aten::linear", 10, 20, dims=[[32, 768], [50_264, 768], []]), launch(12, 1),
        host("aten::mm", 30, 40, dims=[[32, 768], [768, 2048]]), launch(32, 2),
        kernel("nvjet_tst_128x256", 100, 200, 1), kernel("nvjet_tst_128x256", 200, 250, 2),
        # Attention forward by its name, backward by the autograd node that launched it, in another thread.
        kernel("pytorch_flash::flash_fwd_kernel<...>", 250, 280, 3), launch(45, 3),
        host("autograd::engine::evaluate_function: ScaledDotProductFlashAttentionBackward0", 50, 60, tid=AUTOGRAD),
        launch(52, 4, AUTOGRAD), kernel("elementwise_kernel", 280, 300, 4),
        # A compiled pointwise kernel that is named after attention, which it only touches.
        kernel("triton_poi_fused__scaled_dot_product_flash_attention_cat_mul_3", 300, 310, 5), launch(61, 5),
        # The loss: softmax over the last dimension; and by the name of its autograd function.
        host("triton_red_fused_2", 62, 64, dims=[[16_384, 50_304], [16_384]]), launch(63, 6),
        kernel("triton_red_fused_2", 310, 330, 6),
        host("_LinearCrossEntropy", 65, 75), launch(70, 7), kernel("elementwise_kernel", 330, 340, 7),
        # The optimizer: by our range, and by torch's.
        ranged(OPTIMIZER, 80, 90), launch(85, 8), kernel("multi_tensor_apply_kernel", 340, 360, 8),
        ranged("Optimizer.step#AdamW.step", 91, 95), launch(92, 9), kernel("copy", 360, 370, 9, cat="gpu_memcpy"),
        # An embedding's gradient has a vocabulary, but not as the last of its dimensions.
        host("aten::add_", 96, 99, dims=[[50_304, 768], [50_304, 768]]), launch(97, 10),
        kernel("elementwise_kernel", 370, 375, 10),
    )  # fmt: skip
    # 14 of the optimizer's are the host's, while the device had nothing to do.
    expected = {HEAD: 130, PRODUCTS: 50, ATTENTION: 50, OTHER: 15, OPTIMIZER: 30 + 14}
    busy = sum(expected.values())
    assert found == pytest.approx({name: time / 1000 for name, time in (expected | {IDLE: 1000 - busy}).items()})


@pytest.mark.parametrize("name", [
    "ncclDevKernel_ReduceScatter_Sum_f32", "Memcpy PtoP (Device -> Device)",
    "c10d::symmetric_memory::wait_signal_kernel(unsigned int**, int, int)",
])  # fmt: skip
def test_collectives_count_where_nothing_hides_them(name: str) -> None:
    events = [
        ranged(WINDOW, 0, 1000),
        kernel(name, 100, 300, 1, stream=21),
        kernel("gemm", 150, 250, 2),
        kernel("gemm", 240, 260, 3, stream=22),  # two at a time count once
    ]
    found = step_shares(events, VOCABULARY)
    assert found.shares[COMMUNICATION] == pytest.approx(0.090)
    assert found.shares[PRODUCTS] == pytest.approx(0.110)
    assert found.collectives == pytest.approx(0.200)
    assert found.kernels[0].name == name and found.kernels[0].seconds == pytest.approx(200e-6)
    assert (found.kernels[1].name, found.kernels[1].calls) == ("gemm", 2)


def test_an_idle_device_waits_for_what_the_host_does() -> None:
    """The host waits for data from 0 to 400 but the device is busy until 300; then the host steps an optimizer."""
    found = shares(
        ranged(DATA, 0, 400), kernel("gemm", 0, 300, 1),
        ranged(OPTIMIZER, 500, 800), host("aten::_fused_adamw_", 510, 700),
        kernel("copy", 790, 850, 2, cat="gpu_memcpy"),
    )  # fmt: skip
    # The copy belongs to no launch that was seen.
    assert found == pytest.approx({PRODUCTS: 0.3, DATA: 0.1, OPTIMIZER: 0.29, OTHER: 0.06, IDLE: 0.25})


def test_what_lies_outside_the_window_does_not_count() -> None:
    found = shares(kernel("gemm", -50, 100, 1), kernel("gemm", 900, 1200, 2))
    assert found == pytest.approx({PRODUCTS: 0.2, IDLE: 0.8})


def test_a_cpu_belongs_to_its_innermost_operator() -> None:
    found = shares(
        ranged(DATA, 0, 100),
        host("aten::linear", 100, 300, dims=[[4, 8], [8, 8]]), host("aten::mm", 150, 250, dims=[[4, 8], [8, 8]]),
        host("aten::scaled_dot_product_attention", 300, 500), host("aten::mm", 350, 450, dims=[[4, 8], [8, 8]]),
        ranged(OPTIMIZER, 600, 800), host("aten::mul_", 650, 700),
        host("aten::add", 900, 950), host("c10d::allreduce_", 950, 1000),
        host("aten::mm", 0, 1000, tid=99),  # another thread
    )  # fmt: skip
    assert found == pytest.approx(
        {DATA: 0.1, PRODUCTS: 0.2, ATTENTION: 0.2, OPTIMIZER: 0.2, OTHER: 0.05, COMMUNICATION: 0.05, IDLE: 0.2}
    )


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_trace_of_the_profiler(tmp_path: Path, suffix: str) -> None:
    """Time of ours inside two ranges is what the profiler says of them; the head is found by its 50,304 columns."""
    hidden, head, inner = torch.randn(64, 32), torch.randn(50_304, 32), torch.randn(32, 512)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof, record_function(WINDOW):
        with record_function(DATA):
            torch.randn(100_000).sort()
        hidden @ inner
        torch.nn.functional.cross_entropy(hidden @ head.t(), torch.zeros(64, dtype=torch.int64))
    path = tmp_path / f"trace{suffix}"
    prof.export_chrome_trace(str(path))
    events = read_trace(path)
    found = step_shares(events, VOCABULARY)
    spans = {event["name"]: event["dur"] for event in events}
    assert found.seconds * 1e6 == pytest.approx(spans[WINDOW])
    assert found.shares[DATA] == pytest.approx(spans[DATA] / spans[WINDOW], rel=1e-3)
    assert found.shares[HEAD] > found.shares[PRODUCTS] > 0
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares[ATTENTION] == found.shares[COMMUNICATION] == found.collectives == 0


def test_names_need_not_be_well_escaped(tmp_path: Path) -> None:
    content = json.dumps({"traceEvents": [ranged("a?b", 0, 1), {"ph": "M", "name": "process_name"}]})
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        file.write(content.replace("a?b", "a\tb"))
    assert [event["name"] for event in read_trace(tmp_path / "trace.json.gz")] == ["a\tb"]
