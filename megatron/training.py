"""Pretraining, to be read from top to bottom: prepare, train, measure, save, stop."""

from __future__ import annotations

import functools
import math
import resource
from typing import Any, Literal

import torch

from megatron import budget
from megatron.checkpointing import CheckpointStore, PendingSave
from megatron.config import RunConfig
from megatron.config_checks import micro_batches
from megatron.data.loader import BatchStream, build_train_loader
from megatron.data.lockstep import LockstepBatches
from megatron.distributed.agreement import agree_on_error, any_rank, gather_objects
from megatron.engine import StepResult
from megatron.errors import OneRankError, UserError
from megatron.evaluation import Measurement, Validator
from megatron.interval import Interval
from megatron.metrics import MetricsWriter, TrainRecord, ValidationRecord, metrics_path
from megatron.profiling import StepProfiler, in_words
from megatron.run import Run, banner
from megatron.run_metadata import CheckpointMetadata, Validation, describe_run, other_model
from megatron.stopping import StopController
from megatron.trace_shares import Shares


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def pretrain(run: Run, start_time: float) -> None:
    """Train ``run`` from where it stands to its end, or to where something stops it. A collective call.

    Raises:
        UserError: ``--save`` or a log cannot be written; CheckpointError: a save failed; NotFinite: training diverged.
    """
    config, topology = run.config, run.topology
    store = None if config.checkpoint.save is None else CheckpointStore(config.checkpoint.save)
    remarks = list(run.remarks)
    if store is not None and not config.evaluation.skip_train:
        with agree_on_error(topology):
            for stored in store.stored() if topology.rank == 0 else ():
                if different := other_model(stored, config, run.vocabulary):
                    raise UserError(
                        f"--save {config.checkpoint.save} holds checkpoints of another model ({stored.tag}: "
                        f"{'; '.join(different)}), which this run would overwrite: name another directory"
                    )
        store.prepare(topology)
        remark = store.begin(run.progress.iteration if run.progress.iteration else None, topology)
        remarks += [remark] if remark else []
    with agree_on_error(topology):
        metrics = MetricsWriter(
            config.logging,
            metrics_path(config.logging, config.checkpoint),
            topology,
            total_iterations=0 if config.evaluation.skip_train else _total_iterations(run),
            resumed_iteration=run.progress.iteration or None,
            append=config.evaluation.skip_train,
            settings=_settings(run),
        )
    with metrics, StopController(config.checkpoint, topology, start_time) as stop:
        for line in [*banner(run), *(f"  note: {remark}" for remark in remarks)]:
            metrics.log(line)
        metrics.meta("start", run.progress.iteration, **_settings(run))
        loop = Loop(run, store, metrics, stop)
        if config.evaluation.skip_train:
            loop.measure("valid", run.validator)
        else:
            loop.train()
        loop.measure("test", run.tester)


class Loop:
    """The training loop and what it remembers between steps."""

    def __init__(self, run: Run, store: CheckpointStore | None, metrics: MetricsWriter, stop: StopController) -> None:
        self.run = run
        self.config: RunConfig = run.config
        self.topology = run.topology
        self.progress = run.progress
        self.store = store
        self.metrics = metrics
        self.stop = stop
        self.interval = Interval()
        self.launched: StepResult | None = None  # the last step, as long as nobody has asked what became of it
        # Validation loss of the current weights, and of the checkpoints that --keep-best keeps, lowest first.
        self.measured: tuple[int, Measurement] | None = None
        self.best_losses = [] if store is None else _validation_losses(store, run.progress.iteration)
        self.lowest_loss = min(self.best_losses, default=math.inf)  # of all measurements, saved or not
        self.saved_at = run.progress.iteration
        self.pending: tuple[PendingSave, float] | None = None  # and the seconds that training waited for it
        self.bad_steps_in_a_row = 0
        with agree_on_error(self.topology):
            self.profiler = StepProfiler(self.config.logging, self.topology, run.vocabulary, self.profiled)

    def train(self) -> None:
        """Step until the samples are used up, then measure and save; or until a stop is agreed on, then save."""
        try:
            self._train()
        except Exception as error:
            # What ended every rank alike may still wait for all of them; another failure leaves a hidden directory.
            alike = isinstance(error, NotFinite | UserError) and not isinstance(error, OneRankError)
            if alike or self.topology.world_size == 1:
                self.finish_save()
            raise

    def _train(self) -> None:
        if not self._another_step():
            self.metrics.log(f"nothing left to train: iteration {self.progress.iteration} was the last")
            self._retain()  # which a crash after the last save may have cut short
            return
        stream = self._loader()
        batches = LockstepBatches(stream, self.config.batch.micro_batch_size, self.config.batch.seq_length)
        reason, last = None, False
        while reason is None and not last:
            self.profiler.begin_step(self.progress.iteration + 1)
            self.step(batches)
            iteration = self.progress.iteration
            with self.interval.paused():
                self.profiler.end_step(iteration)
            if self.pending is not None and not any_rank(self.topology, not self.pending[0].written):
                self.finish_save()
            last = not self._another_step()
            if last or iteration % self.config.logging.log_interval == 0:
                self.close_interval()
            # Before the save of the same step, so that the checkpoint knows how good it is.
            if last or self._due(self.config.evaluation.eval_interval):
                self.validate()
            if last or self._due(self.config.checkpoint.save_interval):
                self.save(wait=last)
            reason = self.stop.should_stop(iteration)  # also after the last step: a kill switch is removed
        stream.close()
        self.profiler.finish()
        self.close_interval()
        self.settle()
        self.save(wait=True)
        self.finish_save()
        self.metrics.meta("finished" if last else "stopped", self.progress.iteration, reason=reason)
        if not last:
            self.metrics.log(f"stopped after iteration {self.progress.iteration}: {reason}")

    def step(self, batches: LockstepBatches) -> None:
        """One optimizer step on the next global batch."""
        run, progress = self.run, self.progress
        size = run.schedule.batch_at(progress.samples).size
        assert run.learning_rate is not None
        rate = run.learning_rate.at(progress.samples)
        count = micro_batches(self.config.batch.micro_batch_size, self.topology.data_parallel_size, size)
        result = run.engine.train_batch(
            batches, count, rate, meanwhile=self.settle, by_graphs=not self.profiler.is_running
        )
        if any_rank(self.topology, batches.error is not None):
            with agree_on_error(self.topology):
                if batches.error is not None:
                    raise batches.error
        progress.iteration += 1
        progress.samples += size
        self.launched = result
        self.interval.begin(result, rate, size)
        self.metrics.progress(progress.iteration)

    def settle(self) -> None:
        """See what became of the last step, and write the log line that waits for it.

        Called when the device has the first micro-batch of the next step to work at, so that it never waits for the
        host to look; and before anything that needs to know.
        """
        result, self.launched = self.launched, None
        if result is not None:
            self.interval.end(result)
            if result.applied:
                self.bad_steps_in_a_row = 0
            else:
                self._not_applied(result)
        if self.interval.is_closed:
            self.log()

    def close_interval(self) -> None:
        """A log line is due: it is written when the last step has come to its end."""
        if self.interval.steps and not self.interval.is_closed:
            fp16 = self.config.optimizer.fp16
            self.interval.close(self.topology, self.run.engine.loss_scale if fp16 else None)

    def _not_applied(self, result: StepResult) -> None:
        """A step that changed nothing: fp16 found its loss scale too large, or loss or gradient is not finite."""
        self.progress.skipped_steps += 1
        bad = [
            (float(loss), ids.tolist())
            for loss, ids in zip(result.micro_losses, result.sample_ids, strict=True)
            if not math.isfinite(float(loss))
        ]
        if self.config.optimizer.fp16 and not any_rank(self.topology, bool(bad)):
            return
        self.interval.nan_steps += 1
        self.progress.nan_steps += 1
        self.bad_steps_in_a_row += 1
        found = [entry for entries in gather_objects(self.topology, bad) for entry in entries]
        where = (
            "; ".join(f"loss {loss} on samples {ids}" for loss, ids in found)
            or "the losses are finite, the gradient is not"
        )
        self.metrics.log(f"warning: iteration {self.progress.iteration} is not finite and was not applied: {where}")
        self.metrics.meta("not_finite", self.progress.iteration, samples=[ids for _, ids in found])
        if self.bad_steps_in_a_row >= self.config.optimizer.max_nan_steps:
            saved = (
                "no checkpoint was saved"
                if self.store is None
                else f"checkpoints in {self.store.directory} are untouched"
            )
            raise NotFinite(
                f"{self.bad_steps_in_a_row} steps in a row were not finite (--max-nan-steps), the last is iteration "
                f"{self.progress.iteration}: {saved}; lower --lr or look at the samples named above"
            )

    def log(self) -> None:
        """Write what happened since the last log line."""
        interval, run = self.interval, self.run
        loss = interval.mean_loss()
        seconds = interval.seconds()
        tokens_per_second = interval.samples * run.tokens_per_sample / seconds
        flops = tokens_per_second * run.flops_per_token / self.topology.world_size
        peak = budget.peak_flops(torch.cuda.get_device_name()) if self.topology.device.type == "cuda" else None
        self.metrics.train(
            TrainRecord(
                **self._position(),
                loss=loss,
                total_iterations=_total_iterations(run),
                lr=interval.rate,
                grad_norm=interval.grad_norm,
                batch_size=interval.batch_size,
                loss_scale=interval.loss_scale,
                seconds_per_step=seconds / interval.steps,
                tokens_per_second=tokens_per_second,
                tflops=flops / 1e12,
                mfu=None if peak is None else flops / peak,
                memory_gb=_peak_memory(self.topology.device),
                skipped_steps=interval.applied.count(False),
                nan_steps=interval.nan_steps,
            )
        )
        self.interval = Interval()

    def validate(self) -> None:
        """Measure the current weights unless that was done, and save them if they are among the best."""
        run = self.run
        self.settle()
        if run.validator is None or (self.measured is not None and self.measured[0] == self.progress.iteration):
            return
        measurement = self.measure("valid", run.validator)
        assert measurement is not None
        self.measured = (self.progress.iteration, measurement)
        keep = self.config.checkpoint.keep_best
        among_best = keep > 0 and (len(self.best_losses) < keep or measurement.loss < self.best_losses[keep - 1])
        if among_best and math.isfinite(measurement.loss):
            self.save()

    def measure(self, kind: Literal["valid", "test"], validator: Validator | None) -> Measurement | None:
        """Measure the current weights on one data set and write the result."""
        if validator is None:
            return None
        with self.interval.paused() as pause:
            measurement = validator.measure(self.run.engine)
        self.metrics.pause(pause.seconds)
        # --skip-train may measure other windows than the checkpoints' losses are of.
        trains = not self.config.evaluation.skip_train
        is_best = kind == "valid" and trains and measurement.loss < self.lowest_loss
        if is_best:
            self.lowest_loss = measurement.loss
        self.metrics.validation(
            ValidationRecord(
                **self._position(),
                kind=kind,
                loss=measurement.loss,
                stderr=None if math.isnan(measurement.stderr) else measurement.stderr,
                ppl=measurement.perplexity,
                bits_per_byte=measurement.bits_per_byte,
                windows=measurement.windows,
                num_mc=measurement.num_mc,
                seconds=measurement.seconds,
                is_best=is_best,
            )
        )
        return measurement

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint unless this step has one. With ``--async-save`` and without ``wait``, only begin to."""
        if self.store is None or self.saved_at == self.progress.iteration:
            return
        self.settle()
        self.finish_save()
        metadata, engine = self._metadata(), self.run.engine
        if metadata.validation is not None and math.isfinite(metadata.validation.loss):
            self.best_losses = sorted([*self.best_losses, metadata.validation.loss])
        background = engine.saves_in_background and not wait
        write = functools.partial(engine.save, background=background)
        with self.interval.paused() as pause:
            pending = self.store.start_save(write, metadata, self.topology)
        self.metrics.pause(pause.seconds)
        self.pending = pending, pause.seconds
        self.saved_at = self.progress.iteration
        if not background:
            self.finish_save()

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any; then delete those that need not stay."""
        if self.store is None or self.pending is None:
            return
        (pending, seconds), self.pending = self.pending, None
        with self.interval.paused() as pause:
            self.store.finish_save(pending, self.topology)
            self._retain()
        self.metrics.pause(pause.seconds)
        times = {"seconds": round(seconds + pause.seconds, 3), "write_seconds": round(pending.seconds, 3)}
        self.metrics.meta("saved", pending.metadata.iteration, tag=pending.metadata.tag, **times)

    def _metadata(self) -> CheckpointMetadata:
        """What this run is and where it stands, for the checkpoint of this step."""
        validation = None
        if self.measured is not None and self.measured[0] == self.progress.iteration:
            measurement = self.measured[1]
            validation = Validation(measurement.loss, None if math.isnan(measurement.stderr) else measurement.stderr)
        progress = self.progress
        return describe_run(
            self.config,
            self.run.vocabulary,
            self.topology,
            iteration=progress.iteration,
            consumed_samples=progress.samples,
            commit=self.run.commit,
            validation=validation,
            extra={
                "skipped_steps": progress.skipped_steps,
                "nan_steps": progress.nan_steps,
                "engine": self.run.engine.layout,
            },
        )

    def profiled(self, shares: Shares, steps: int) -> None:
        """Write where the time of the profiled steps went."""
        self.metrics.log(in_words(shares, steps))
        fields = {"steps": steps, "seconds": shares.seconds, "shares": shares.shares, "collectives": shares.collectives}
        self.metrics.meta("profiled", self.progress.iteration, **fields)

    def _retain(self) -> None:
        """Delete the checkpoints that need not stay."""
        if self.store is not None:
            self.store.retain(self.config.checkpoint.keep_last, self.config.checkpoint.keep_best, self.topology)

    def _loader(self) -> BatchStream:
        run = self.run
        assert run.train_data is not None
        return build_train_loader(
            run.train_data,
            run.objective,
            run.schedule,
            consumed_samples=self.progress.samples,
            train_samples=self.config.train_samples,
            micro_batch_size=self.config.batch.micro_batch_size,
            dp_rank=self.topology.data_parallel_rank,
            dp_size=self.topology.data_parallel_size,
            num_workers=self.config.data.num_workers if self.topology.reads_data else 0,
            pin_memory=self.topology.device.type == "cuda",
        )

    def _another_step(self) -> bool:
        """Whether a whole global batch is left: a last partial one is not begun, as in Megatron."""
        return (
            self.progress.samples + self.run.schedule.batch_at(self.progress.samples).size <= self.config.train_samples
        )

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.iteration % interval == 0

    def _position(self) -> dict[str, Any]:
        """Where training stands, as every record states it."""
        run, progress = self.run, self.progress
        tokens = progress.samples * run.tokens_per_sample
        return {
            "iteration": progress.iteration,
            "samples": progress.samples,
            "tokens": tokens,
            "epoch": run.epochs(progress.samples),
            "flops": float(tokens * run.flops_per_token),
            "flops_no_embeddings": float(budget.training_flops(run.parameters - run.embedding_parameters, tokens)),
        }


def _validation_losses(store: CheckpointStore, iteration: int) -> list[float]:
    """Validation losses of the checkpoints up to ``iteration``, lowest first."""
    stored = [m.validation.loss for m in store.checkpoints() if m.validation is not None and m.iteration <= iteration]
    return sorted(stored)


def _total_iterations(run: Run) -> int:
    """Steps of the whole run: the index that the last whole global batch ends with."""
    last = run.schedule.batch_at(run.config.train_samples)
    return last.index


def _settings(run: Run) -> dict[str, Any]:
    """What tables and fits want to know of a run: written to metrics.jsonl and W&B at its start."""
    config = run.config
    return {
        "objective": config.objective.objective,
        "parameters": run.parameters,
        "tokens_per_epoch": 0 if run.train_data is None else run.train_data.tokens_per_epoch,
        "valid_windows": None if run.validator is None else run.validator.fingerprint(),
        "loss_conditions": list(config.objective.loss_conditions),
        "train_samples": config.train_samples,
        "weight_decay": config.optimizer.weight_decay,
        "attention_dropout": config.model.attention_dropout,
        "hidden_dropout": config.model.hidden_dropout,
        "lr": config.optimizer.lr,
        "seed": config.parallel.seed,
        "num_layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
        "seq_length": config.batch.seq_length,
        "global_batch_size": config.batch.global_batch_size,
    }


def _peak_memory(device: torch.device) -> float:
    """Peak memory in 1e9 bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
