"""Where the time of profiled steps went: a trace of PyTorch's profiler, every instant of it under one heading.

On a GPU an instant belongs to the kernel that runs then, and a kernel to a heading by its name, by the operators and
ranges that launched it, and by their shapes. Where no kernel runs, the host may be waiting for data or running an
offloaded optimizer; what is left is idle: launches, synchronisation, Python. Collectives count only where nothing else
runs beside them; they include waiting for other ranks. On a CPU an instant belongs to the operator that runs then.

The format is Chrome's trace events as Kineto writes them: "X" events with ``cat``, ``ts`` and ``dur`` in microseconds.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

WINDOW: Final = "profiled steps"
"""Name of the ``record_function`` range around all that counts; the device has nothing to do at both its ends."""
DATA: Final = "data wait"
"""Heading, and range in which the loop waits for its next batch."""
OPTIMIZER: Final = "optimizer"
"""Heading, and range of the optimizer step: clipping, update, and for ZeRO the casts around it."""
COMMUNICATION: Final = "communication"
ATTENTION: Final = "attention"
HEAD: Final = "head and loss"
PRODUCTS: Final = "matrix products"
OTHER: Final = "other"
IDLE: Final = "idle"
HEADINGS: Final = (DATA, HEAD, ATTENTION, PRODUCTS, OTHER, OPTIMIZER, COMMUNICATION, IDLE)

# The first that applies to an operator, or to what called it. Projections of the attention are matrix products.
_PRECEDENCE: Final = (COMMUNICATION, DATA, OPTIMIZER, ATTENTION, HEAD, PRODUCTS)
_COLLECTIVE: Final = re.compile(r"^(c10d::|nccl:|gloo:|record_param_comms|Memcpy PtoP)|nccl", re.IGNORECASE)
_ATTENTION: Final = re.compile(r"attention|flash|fmha|sdpa", re.IGNORECASE)
_LOSS: Final = re.compile(r"cross_?entropy|nll_loss|log_softmax|logsumexp", re.IGNORECASE)
_PRODUCT_OPERATOR: Final = re.compile(r"^aten::(linear|matmul|\w*mm_?)$|^aten::_scaled_mm")
_PRODUCT_KERNEL: Final = re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitk", re.IGNORECASE)
_KERNELS: Final = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES: Final = ("cuda_runtime", "cuda_driver")
_HOST: Final = ("cpu_op", "user_annotation")

Event = Mapping[str, Any]
Segment = tuple[float, float, str]
"""Begin, end in microseconds; heading."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel (on a CPU: one operator, its own time) took in all."""

    name: str
    heading: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Shares:
    """Where the profiled time went.

    Attributes:
        seconds: length of the window. shares: of it, by heading; they sum to 1. collectives: share in which a
        collective ran, alone or beside other kernels. kernels: those that took longest first.
    """

    seconds: float
    shares: dict[str, float]
    collectives: float
    kernels: list[Kernel]


def read_trace(path: Path) -> list[Event]:
    """The complete events of a Chrome trace, ``.json`` or ``.json.gz``."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        content = json.loads(file.read(), strict=False)  # names of kernels are not always escaped
    return [event for event in content["traceEvents"] if event.get("ph") == "X" and "dur" in event]


def step_shares(events: Sequence[Event], vocabulary: frozenset[int]) -> Shares:
    """Put every instant inside the range ``WINDOW`` under a heading.

    ``vocabulary``: sizes of a dimension that tell the head's matrices from others (padded rows, tokens).
    """
    window = next(event for event in events if event["name"] == WINDOW and event["cat"] == "user_annotation")
    begin, end = window["ts"], window["ts"] + window["dur"]
    host: dict[tuple[Any, Any], list[Event]] = defaultdict(list)
    for event in events:
        if event["cat"] in _HOST and not (event["name"] == WINDOW or event["name"].startswith("ProfilerStep")):
            host[event["pid"], event["tid"]].append(event)
    main = list(_host_segments(host[window["pid"], window["tid"]], vocabulary))
    kernels = [event for event in events if event["cat"] in _KERNELS]
    if kernels:
        headings = _headings(kernels, events, host, vocabulary)
        busy = [(k["ts"], k["ts"] + k["dur"], heading) for k, heading in zip(kernels, headings, strict=True)]
        waiting = [(first, last, claim) for first, last, _, claim, _ in main if claim in (DATA, OPTIMIZER)]
        table = _table((k["name"], heading, k["dur"]) for k, heading in zip(kernels, headings, strict=True))
    else:
        busy = [(first, last, heading) for first, last, heading, _, _ in main if heading != IDLE]
        waiting = []
        table = _table((name, heading, last - first) for first, last, heading, _, name in main if name)
    alone = {heading: time / (end - begin) for heading, time in _sweep(busy, waiting, begin, end).items()}
    collective = [segment for segment in busy if segment[2] == COMMUNICATION]
    return Shares(
        seconds=(end - begin) / 1e6,
        shares=alone,
        collectives=_sweep(collective, [], begin, end)[COMMUNICATION] / (end - begin),
        kernels=table,
    )


def _claim(event: Event, vocabulary: frozenset[int]) -> str | None:
    """The heading that an event's own name and shapes speak for."""
    name: str = event["name"]
    if name in (DATA, OPTIMIZER):
        return name
    if name.startswith("Optimizer.step"):
        return OPTIMIZER
    if _COLLECTIVE.search(name):
        return COMMUNICATION
    # A compiled pointwise kernel is named after all operators that it touches; only templates are the operator itself.
    if _ATTENTION.search(name) and not (name.startswith("triton_") and not name.startswith("triton_tem")):
        return ATTENTION
    product = bool(_PRODUCT_OPERATOR.search(name))
    shapes = list(_shapes(event.get("args", {}).get("Input Dims", []))) if event["cat"] == "cpu_op" else []
    logits = any(len(shape) > 1 and shape[-1] in vocabulary for shape in shapes)
    if _LOSS.search(name) or logits or (product and any(size in vocabulary for shape in shapes for size in shape)):
        return HEAD
    return PRODUCTS if product or (event["cat"] == "kernel" and _PRODUCT_KERNEL.search(name)) else None


def _shapes(dims: Any) -> Iterator[list[int]]:
    """The shapes in Kineto's "Input Dims", in which a list of tensors is one level deeper."""
    if not isinstance(dims, list):
        return
    if dims and all(isinstance(size, int) for size in dims):
        yield dims
        return
    for inner in dims:
        yield from _shapes(inner)


def _first(claims: Iterable[str | None]) -> str:
    found = set(claims)
    return next((heading for heading in _PRECEDENCE if heading in found), OTHER)


def _nested(spans: Iterable[Event]) -> list[Event]:
    """Spans of one thread, outer before inner."""
    return sorted(spans, key=lambda event: (event["ts"], -event["dur"]))


def _headings(
    kernels: Sequence[Event], events: Iterable[Event], host: Mapping[tuple[Any, Any], list[Event]],
    vocabulary: frozenset[int],
) -> list[str]:
    """The heading of every kernel: by itself, and by the operators and ranges around its launch."""
    launches: dict[tuple[Any, Any], list[Event]] = defaultdict(list)
    for event in events:
        if event["cat"] in _LAUNCHES and "correlation" in event.get("args", {}):
            launches[event["pid"], event["tid"]].append(event)
    around: dict[int, tuple[str | None, ...]] = {}
    for thread, own in launches.items():
        stack: list[tuple[float, str | None]] = []
        for event in _nested([*host.get(thread, []), *own]):
            while stack and stack[-1][0] <= event["ts"]:
                stack.pop()
            if event["cat"] in _LAUNCHES:
                around[event["args"]["correlation"]] = tuple({claim for _, claim in stack})
            else:
                stack.append((event["ts"] + event["dur"], _claim(event, vocabulary)))
    own_claims: dict[str, str | None] = {}
    for kernel in kernels:
        if kernel["name"] not in own_claims:
            own_claims[kernel["name"]] = _claim(kernel, vocabulary)
    return [
        _first((own_claims[k["name"]], *around.get(k.get("args", {}).get("correlation"), ()))) for k in kernels
    ]


def _host_segments(
    spans: Sequence[Event], vocabulary: frozenset[int]
) -> Iterator[tuple[float, float, str, str | None, str]]:
    """Cut one thread's time where an operator or range begins or ends.

    Yields (begin, end, heading, range, operator): the heading where the CPU itself computes, ``IDLE`` outside
    operators; the range is ``DATA`` or ``OPTIMIZER`` inside those, else None; operator is "" outside operators.
    """
    stack: list[tuple[float, str | None, str]] = []  # end, claim, operator
    at = 0.0

    def segment(until: float) -> Iterator[tuple[float, float, str, str | None, str]]:
        if stack and until > at:
            claims = [claim for _, claim, _ in stack]
            inside = next((claim for claim in (DATA, OPTIMIZER) if claim in claims), None)
            operator = stack[-1][2]
            heading = _first(claims) if operator else (inside or IDLE)
            yield at, until, heading, inside, operator

    for event in [*_nested(spans), None]:
        begin = float("inf") if event is None else event["ts"]
        while stack and stack[-1][0] <= begin:
            yield from segment(stack[-1][0])
            at = max(at, stack.pop()[0])
        if event is None:
            return
        yield from segment(begin)
        at = max(at, begin)
        operator = event["name"] if event["cat"] == "cpu_op" else ""
        stack.append((begin + event["dur"], _claim(event, vocabulary), operator))


def _sweep(busy: Sequence[Segment], waiting: Sequence[Segment], begin: float, end: float) -> dict[str, float]:
    """Microseconds between ``begin`` and ``end`` by heading; each instant counts once.

    Computation goes before collectives, these before what the host waits for (``waiting``), and that before idleness.
    """
    compute = [heading for heading in HEADINGS if heading not in (COMMUNICATION, DATA, IDLE)]
    ranks = [(True, heading) for heading in (*compute, DATA, COMMUNICATION)] + [(False, DATA), (False, OPTIMIZER)]
    order = {key: rank for rank, key in enumerate(ranks)}
    marks: list[tuple[float, int, int]] = []
    for is_busy, segments in ((True, busy), (False, waiting)):
        for first, last, heading in segments:
            first, last = max(first, begin), min(last, end)
            if last > first:
                rank = order[is_busy, heading]
                marks += [(first, rank, 1), (last, rank, -1)]
    marks.sort()
    active, at = [0] * len(ranks), begin
    found = dict.fromkeys(HEADINGS, 0.0)
    for time, rank, change in [*marks, (end, 0, 0)]:
        heading = next((ranks[i][1] for i, count in enumerate(active) if count), IDLE)
        found[heading] += time - at
        at = time
        active[rank] += change
    return found


def _table(rows: Iterable[tuple[str, str, float]]) -> list[Kernel]:
    """Time and calls by name and heading, longest first."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for name, heading, microseconds in rows:
        seconds[name, heading] += microseconds / 1e6
        calls[name, heading] += 1
    kernels = [Kernel(name, heading, time, calls[name, heading]) for (name, heading), time in seconds.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)
