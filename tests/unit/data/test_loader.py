"""Loaders: who gets which sample, resuming, workers that change nothing, errors and signals that arrive."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.batch_schedule import BatchSchedule
from megatron.data import loader
from megatron.data.gpt_dataset import Dataset, GPTDataset, Order
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron.data.loader import build_eval_batches, build_train_loader, evaluation_rows, training_rows
from megatron.errors import UserError
from megatron.objectives.autoregressive import Autoregressive
from megatron.objectives.base import Batch, Confinement, Objective
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.masking_levels import StratifiedLevels
from megatron.seeding import Stream

S = 8


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_documents(np.arange(500) % 97, np.full(50, 10))
    return GPTDataset(IndexedDataset(tmp_path / "d"), range(50), S, Order("exact", 96, seed=1))


def masked_diffusion(schedule: BatchSchedule, confined: bool = False) -> MaskedDiffusion:
    return MaskedDiffusion(seq_length=S, mask_id=97, eod=96, seed=7, mask_stream=Stream.MASK,
                           levels=StratifiedLevels(7, schedule), mask_sampler="bernoulli", loss_weighting="elbo",
                           ar_ratio=0.0, eod_mask_loss=False, confinement=Confinement(96, confined, confined))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[BatchSchedule, int, int]:
    """(schedule, micro-batch size, data-parallel size) that fit one another, with and without a ramp."""
    micro, dp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    unit = micro * dp
    size = unit * draw(st.integers(1, 5))
    ramp = None
    if size > unit and draw(st.booleans()):
        ramp = (unit, unit, draw(st.integers(0, 100)))
    return BatchSchedule(size, ramp), micro, dp


@given(layout=layouts(), train_samples=st.integers(0, 200), steps=st.integers(0, 4))
def test_ranks_together_are_the_global_order(layout: tuple[BatchSchedule, int, int], train_samples: int,
                                             steps: int) -> None:
    """Micro-batch by micro-batch, ranks side by side give 0, 1, 2, ... for any layout; resuming gives the rest."""
    schedule, micro, dp = layout
    ranks = [[rows.samples for rows in training_rows(schedule, 0, train_samples, micro, rank, dp)]
             for rank in range(dp)]
    together = [sample for parts in zip(*ranks, strict=True) for part in parts for sample in part.tolist()]
    end, consumed = 0, 0
    while schedule.batch_at(end).size + end <= train_samples:
        end += schedule.batch_at(end).size
        consumed = end if schedule.batch_at(end).index == steps else consumed
    assert together == list(range(end))
    resumed = [rows.samples for rows in training_rows(schedule, consumed, train_samples, micro, 0, dp)]
    rest = ranks[0][len(ranks[0]) - len(resumed) :]
    assert [rows.tolist() for rows in resumed] == [rows.tolist() for rows in rest]
    assert not resumed or resumed[0][0] == consumed


@given(windows=st.integers(1, 20), num_mc=st.integers(1, 5), micro=st.integers(1, 5), dp=st.integers(1, 4))
def test_evaluation_covers_every_row_once_and_ranks_march_in_step(windows: int, num_mc: int, micro: int,
                                                                  dp: int) -> None:
    ranks = [list(evaluation_rows(windows, num_mc, micro, rank, dp)) for rank in range(dp)]
    assert {len(rank) for rank in ranks} == {-(-windows * num_mc // (micro * dp))}
    rows = []
    for part in (part for rank in ranks for part in rank):
        assert part.mc_ids is not None and part.valid is not None and len(part.samples) == micro
        assert part.samples.max() < windows and part.mc_ids.max() < num_mc
        rows += list(zip(part.samples[part.valid].tolist(), part.mc_ids[part.valid].tolist()))
    assert sorted(rows) == [(window, mc) for window in range(windows) for mc in range(num_mc)]


def train(dataset: Dataset, objective: Objective, schedule: BatchSchedule, **changes: int | bool) -> Iterator[Batch]:
    settings: dict[str, int] = {"consumed_samples": 0, "train_samples": 96, "micro_batch_size": 4, "num_workers": 0}
    return build_train_loader(dataset, objective, schedule, **(settings | changes))  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    fields = [(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in fields)


def test_a_batch_is_the_objective_of_the_samples(dataset: GPTDataset) -> None:
    objective = Autoregressive(S, 96, False, Confinement(96, False, False))
    batches = list(train(dataset, objective, BatchSchedule(16), dp_rank=1, dp_size=2))
    assert len(batches) == 12
    assert batches[1].sample_ids.tolist() == [12, 13, 14, 15]
    expected = torch.from_numpy(np.stack([dataset[sample] for sample in (12, 13, 14, 15)]))
    assert torch.equal(batches[1].inputs, expected[:, :-1]) and torch.equal(batches[1].targets, expected[:, 1:])


@pytest.mark.parametrize("confined", [False, True])  # with and without an attention mask
def test_workers_and_resume_change_nothing(dataset: GPTDataset, confined: bool) -> None:
    """Noise included: masked diffusion with 0 and 2 workers, and from sample 48 on; torch's generator is not used."""
    schedule = BatchSchedule(16, (8, 8, 32))
    objective = masked_diffusion(schedule, confined)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    plain = list(train(dataset, objective, schedule))
    parallel = list(train(dataset, objective, schedule, num_workers=2))
    resumed = list(train(dataset, objective, schedule, num_workers=2, consumed_samples=48))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(plain) == len(parallel) == 24 and len(resumed) == 12
    assert all((batch.attention_mask is not None) == confined for batch in parallel)
    assert all(same(one, other) for one, other in zip(plain, parallel))
    assert all(same(one, other) for one, other in zip(plain[12:], resumed))


def test_topology_changes_no_sample(dataset: GPTDataset) -> None:
    """Inputs of every sample are those of one process, for other ranks and micro-batches (weights hold 1/(b*s))."""
    schedule = BatchSchedule(24)
    objective = masked_diffusion(schedule)
    inputs = torch.cat([batch.inputs for batch in train(dataset, objective, schedule)])
    for micro, dp in ((2, 3), (12, 2), (1, 1)):
        for rank in range(dp):
            for batch in train(dataset, objective, schedule, micro_batch_size=micro, dp_rank=rank, dp_size=dp):
                assert torch.equal(batch.inputs, inputs[batch.sample_ids])


def test_workers_send_several_batches_at_a_time_unless_they_are_large(
    dataset: GPTDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 8 positions takes 8 x (3 x 8 + 4) bytes, two numbers of its own, and the list of scored positions."""
    schedule = BatchSchedule(16)
    plain = list(train(dataset, masked_diffusion(schedule), schedule))
    assert loader._Reader(dataset, masked_diffusion(schedule)).bytes_of_row() in range(8 * 28 + 12, 8 * 36 + 13)
    packed: list[int] = []
    unpack = loader._Message.unpack
    monkeypatch.setattr(loader._Message, "unpack", lambda m: packed.append(len(m.parts)) or unpack(m))
    for limit, together in ((2**23, [4] * 6), (2500, [2] * 12), (1, [1] * 24)):
        monkeypatch.setattr(loader, "MESSAGE_BYTES", limit)
        packed.clear()
        found = list(train(dataset, masked_diffusion(schedule), schedule, num_workers=2))
        assert packed == together
        assert all(same(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_batches(dataset: GPTDataset, num_workers: int) -> None:
    raster = GPTDataset(dataset.indexed, dataset.documents, S, Order("raster"))
    objective = masked_diffusion(BatchSchedule(16)).for_evaluation(5, 3)
    whole = list(build_eval_batches(raster, objective, num_windows=5, num_mc=3, micro_batch_size=15))
    ((batch, window_ids, valid),) = whole
    assert window_ids.tolist() == [window for window in range(5) for _ in range(3)] and valid.all()
    assert len({tuple(row.tolist()) for row in batch.inputs}) > 10  # draws of one window differ
    for rank in range(2):
        parts = list(build_eval_batches(raster, objective, num_windows=5, num_mc=3, micro_batch_size=4,
                                        dp_rank=rank, dp_size=2, num_workers=num_workers))
        assert len(parts) == 2
        for step, (part, ids, good) in enumerate(parts):
            for row in range(4):
                number = min(8 * step + 4 * rank + row, 14)  # row of the whole
                assert bool(good[row]) == (8 * step + 4 * rank + row < 15)
                assert int(ids[row]) == number // 3
                assert torch.equal(part.inputs[row], batch.inputs[number])
                assert part.targets[row].tolist() == raster[number // 3][1:].tolist()


def test_a_batch_that_does_not_divide_and_a_resume_inside_one(dataset: GPTDataset) -> None:
    objective = masked_diffusion(BatchSchedule(16))
    with pytest.raises(UserError, match=r"a global batch of 16 samples .* --micro-batch-size 5 on 2"):
        next(train(dataset, objective, BatchSchedule(16), micro_batch_size=5, dp_size=2))
    with pytest.raises(UserError, match="8 consumed samples are not the end of a global batch"):
        next(train(dataset, objective, BatchSchedule(16), consumed_samples=8))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


class Failing(Objective):
    """Raises what it is told to when it meets sample 8."""

    causal = True

    def __init__(self, error: Exception) -> None:
        self.error = error

    def make_batch(self, tokens: Tensor, sample_ids: Tensor, mc_ids: Tensor | None = None) -> Batch:
        if 8 in sample_ids.tolist():
            raise self.error
        return Autoregressive(S, 96, False, Confinement(96, False, False)).make_batch(tokens, sample_ids)

    def for_evaluation(self, num_windows: int, num_mc: int) -> Objective:
        return self


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_arrive_as_they_are(dataset: GPTDataset, num_workers: int) -> None:
    batches = train(dataset, Failing(KeyError("a defect")), BatchSchedule(8), num_workers=num_workers)
    assert [next(batches).sample_ids[0].item() for _ in range(2)] == [0, 4]
    with pytest.raises(KeyError, match="a defect"):
        next(batches)
    assert list(batches) == []  # what had come beside it is not delivered after it
    strange = GPTDataset(dataset.indexed, dataset.documents, S, dataset.order, num_tokens=90)
    batches = train(strange, masked_diffusion(BatchSchedule(8)), BatchSchedule(8), num_workers=num_workers)
    before = children()
    with pytest.raises(UserError) as raised:
        list(batches)
    assert num_workers == 0 or len(before - children()) == 2  # the stream has ended its workers
    assert "holds token id" in str(raised.value) and "\n" not in str(raised.value)


def test_workers_ignore_the_runs_signals_and_end_with_the_stream(dataset: GPTDataset) -> None:
    before = children()
    batches = build_train_loader(dataset, masked_diffusion(BatchSchedule(4)), BatchSchedule(4), consumed_samples=0,
                                 train_samples=96, micro_batch_size=4, num_workers=2)
    next(batches)
    workers = children() - before
    assert len(workers) == 2
    # Signals as a launcher sends them: from another process, to every process of the group.
    for name in ("INT", "TERM", "USR1"):
        subprocess.run(["sh", "-c", " ".join(f"kill -{name} {worker};" for worker in workers)], check=True)
    assert len(list(batches)) == 23
    batches.close()
    assert not children() - before


SCRIPT = """
import sys, time
import numpy as np
from megatron.batch_schedule import BatchSchedule
from megatron.data.gpt_dataset import GPTDataset, Order
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loader import build_train_loader
from megatron.objectives.autoregressive import Autoregressive
from megatron.objectives.base import Confinement

class Slow(Autoregressive):
    def make_batch(self, tokens, sample_ids, mc_ids=None):
        time.sleep(600.0 if 80 in sample_ids.tolist() else 0.0)
        return super().make_batch(tokens, sample_ids, mc_ids)

dataset = GPTDataset(IndexedDataset(sys.argv[1]), range(50), 8, Order("exact", 96, seed=1))
batches = build_train_loader(dataset, Slow(8, 96, False, Confinement(96, False, False)), BatchSchedule(4),
                             consumed_samples=48, train_samples=96, micro_batch_size=4, num_workers=2)
next(batches)
raise SystemExit(3)
"""


def test_a_run_that_fails_ends_though_a_worker_is_busy(dataset: GPTDataset, tmp_path: Path) -> None:
    """An uncaught exception keeps the stream alive until the interpreter ends; a busy worker must not make it hang."""
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run([sys.executable, "-c", SCRIPT, dataset.indexed.prefix], capture_output=True, text=True,
                            timeout=60, env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    assert (result.returncode, result.stderr) == (3, "")


def test_pinned_without_workers(dataset: GPTDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Batch] = []

    def pin(batch: Batch) -> Batch:
        pinned.append(batch)
        return batch

    monkeypatch.setattr(Batch, "pin_memory", pin)
    batches = train(dataset, masked_diffusion(BatchSchedule(16)), BatchSchedule(16), pin_memory=True)
    assert next(batches) is pinned[0] and len(pinned) == 1


@pytest.mark.gpu
def test_pinned_with_workers(dataset: GPTDataset) -> None:
    batch = next(train(dataset, masked_diffusion(BatchSchedule(16)), BatchSchedule(16), pin_memory=True, num_workers=2))
    assert batch.inputs.is_pinned() and batch.weights.is_pinned()
    assert batch.to("cuda", non_blocking=True).inputs.device.type == "cuda"
