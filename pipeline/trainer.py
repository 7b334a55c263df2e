"""The training run: steps, evaluations, checkpoints, stopping rules, resumption."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.config import RunConfig, to_values
from dlrm.errors import CommError, CrosslaneError
from embedding.comm import Comm
from embedding.heartbeat import Heartbeat
from pipeline import stop
from pipeline.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint
from pipeline.checkpoint_async import Saved
from pipeline.config_agreement import agree_config
from pipeline.course import HIGHER_IS_BETTER, Course, Reason, TrainResult, is_better
from pipeline.engine import Engine, build_engine
from pipeline.evaluator import BackgroundEvaluations, Evaluation, final_split
from pipeline.feed import training_batches
from pipeline.flight import Flight
from pipeline.loader import steps_per_epoch
from pipeline.plan_report import plan_summary
from pipeline.progress import ProgressWriter
from pipeline.resumption import check_resumable, rule_changed
from pipeline.run_trace import RunTrace
from pipeline.saving import RunSaver
from pipeline.schedule import execute, ring_size
from pipeline.stages import Outcome
from pipeline.summary import report_of, write_report


class Trainer:
    """One run on this rank (all methods are collective)."""

    def __init__(self, config: RunConfig, *, comm: Comm, threads: int) -> None:
        """Build the engine; nothing is written yet.

        Raises:
            CrosslaneError: the config, the data or the weights to start from are wrong.
        """
        agree_config(config, comm)
        self.config = config
        self.comm = comm
        self.directory = Path(config.run.directory)
        self.checkpoints = self.directory / "checkpoints"
        latest = latest_checkpoint(self.checkpoints)
        self._latest = None if latest is None else open_checkpoint(latest, comm=comm)
        self.engine: Engine = build_engine(config, comm=comm, threads=threads, saved=self._latest)
        self.split = self.engine.dataset.split("train")
        self.steps = self._planned_steps()
        self.course = Course()
        self._trace = RunTrace(config.trace, device=self.engine.device, comm=comm, directory=self.directory)
        self._control = np.zeros(3)
        self._issued: deque[tuple[int, Outcome]] = deque()
        self._loss = 0.0
        # Of every place of the ring the first batch runs as it is, the second one while it is captured.
        captured = 2 * ring_size(self.engine.train_schedule.rows)
        self._cold_steps = captured if self.engine.device.steps_behind else 1
        self._evaluations = BackgroundEvaluations(self.engine, self._note_evaluation)
        self._decides = config.train.target or config.train.early_stop
        if self._decides:
            self.engine.dataset.split(config.eval.split)  # refuses a missing split before the first step

    def _planned_steps(self) -> int:
        train, data = self.config.train, self.config.data
        limits = []
        if train.epochs is not None:
            limits.append(train.epochs * steps_per_epoch(self.split.rows, data.batch_size, data.drop_last))
        if train.max_steps is not None:
            limits.append(train.max_steps)
        return min(limits)

    def _planned_samples(self) -> int:
        data, rows = self.config.data, self.split.rows
        per_epoch = steps_per_epoch(rows, data.batch_size, data.drop_last)
        epochs, rest = divmod(self.steps, max(per_epoch, 1))
        return epochs * min(rows, per_epoch * data.batch_size) + rest * data.batch_size

    def run(self) -> TrainResult:
        """Train to the end, or to a stop, then evaluate and report.

        Raises:
            CrosslaneError: the loss is not a number, or a checkpoint or the data are damaged.
        """
        began = time.perf_counter()
        self._prepare_directory()
        self._progress = ProgressWriter(self.directory / "progress.jsonl" if self.comm.rank == 0 else None)
        try:
            self._resume_or_initialise()
            self._began = began - self.course.seconds
            self._write_start()
            with Heartbeat(self.comm, self.engine.topology, on_lost=self._note_lost), self._make_saver() as self._saver:
                reason = self.course.ended or self._steps()
                return self._finish(reason)
        finally:
            self._evaluations.close()
            self._progress.close()

    def _note_lost(self, sentence: str) -> None:
        self._progress.write(
            "error", error="CommError", message=sentence, exit_code=CommError.exit_code, rank=self.comm.rank
        )

    def _prepare_directory(self) -> None:
        if self.comm.rank == 0:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CrosslaneError(
                    f"run.directory: {self.directory} cannot be written ({error.strerror}); choose another"
                ) from None
        self.comm.barrier()

    def _resume_or_initialise(self) -> None:
        checkpoint = self._latest
        if checkpoint is not None:
            check_resumable(checkpoint, self.config)
            self.engine.load_checkpoint(checkpoint, states=True)
            self.course = Course(**checkpoint.meta["course"])
            self.engine.stages.restore(self.course.stages)
            if rule_changed(checkpoint, self.config, "early_stop", "metric"):
                self.course.best, self.course.evaluations_since_best = None, 0  # of another metric
            if self._asks_for_more(checkpoint):
                self.course.ended = None
        elif self.config.run.init is not None:
            self.engine.load_weights(self.config.run.init)

    def _asks_for_more(self, checkpoint: Checkpoint) -> bool:
        """Whether the config now goes beyond the end that the run came to."""
        ended = self.course.ended
        if ended in {"target", "early_stop"}:
            return rule_changed(checkpoint, self.config, ended)
        return ended == "finished" and self.course.step < self.steps

    def _write_start(self) -> None:
        self._progress.write(
            "start",
            run=self.config.name,
            ranks=self.comm.size,
            threads=self.engine.threads,
            precision=self.config.precision,
            device=self.engine.device.name,
            plan=plan_summary(self.engine.plan),
            overlap={"train": self.engine.train_schedule.to_values(), "eval": self.engine.eval_schedule.to_values()},
            step=self.course.step,
            steps=self.steps,
            samples=self._planned_samples(),
        )

    def _steps(self) -> Reason:
        config, engine = self.config, self.engine
        capacity = -(-config.data.batch_size // self.comm.size)
        ring = [engine.stages.flight(capacity, training=True) for _ in range(ring_size(engine.train_schedule.rows))]
        if self._evaluation_due() and (reason := self._judge(self._evaluate(config.eval.split))):
            return reason  # a stop came between this step and its evaluation
        self._trace.start_training(self.course.step)
        with training_batches(engine, self.split, start_step=self.course.step, stop_step=self.steps) as batches:
            self._reset_window()
            for flight in execute(
                engine.train_schedule.rows,
                stages=engine.stages,
                ring=ring,
                batches=batches,
                device=engine.device,
                clock=self._trace.clock,
            ):
                if reason := self._after_step(flight):
                    return reason
        return "finished"

    def _after_step(self, flight: Flight) -> Reason | None:
        course, train = self.course, self.config.train
        course.step = step = flight.step
        self._trace.after_step(step)
        course.samples += flight.global_rows
        self._window_steps += 1
        self._window_samples += flight.global_rows
        self._issued.append((step, self.engine.stages.outcome(flight)))
        stopping, scored = self._look(self.engine.device.steps_behind)
        if scored:
            self._evaluations.end()
        self._warm_up(flight)
        last = step == self.steps
        if step % train.progress_every == 0 or last or stopping:
            self._look(0)
            self._write_step(flight, self._loss)
        if stopping:
            return "stopped"
        if self._evaluation_due():
            self._look(0)
            with self._pause():
                if self._decides is None:  # nothing waits for the metrics: they come behind the next steps
                    course.evaluated_step = step
                    self._evaluations.start(self.config.eval.split, step, clock=self._trace.evaluation())
                elif reason := self._judge(self._evaluate(self.config.eval.split)):
                    return reason
        if train.checkpoint_every and step % train.checkpoint_every == 0 and not last:
            self._look(0)
            with self._pause():
                self._save()
        return None

    def _look(self, behind: int) -> tuple[bool, bool]:
        """Look at the losses of all steps but the last ``behind``; (whether to stop, whether all have scored).

        Raises:
            CrosslaneError: a loss is not a number.
        """
        stopping = scored = False
        if len(self._issued) <= behind:
            _, stopping, scored = self._agree(0.0)
        while len(self._issued) > behind:
            step, outcome = self._issued.popleft()
            self._loss, stop_now, scored_now = self._agree(outcome.loss())
            stopping, scored = stopping or stop_now, scored or scored_now
            if not math.isfinite(self._loss):
                raise CrosslaneError(
                    f"loss is {self._loss} at step {step}; lower optimizer.lr (now {self.config.optimizer.lr}) or "
                    f"lengthen learning_rate.warmup_steps; the last checkpoint is kept"
                )
        return stopping, scored

    def _warm_up(self, flight: Flight) -> None:
        """Leave a process's first steps out of the rate: kernels are compiled, and on a GPU measured and captured."""
        if self._cold_steps:
            self._cold_steps -= 1
            if not self._cold_steps:
                self._look(0)
            self._cold_seconds = time.perf_counter() - self._window_start
            self._cold_samples += flight.global_rows

    def _evaluation_due(self) -> bool:
        every, step = self.config.train.eval_every, self.course.step
        if not every or not step or step % every or step == self.course.evaluated_step:
            return False
        return step != self.steps or self._decides is not None  # else the closing evaluation follows at once

    def _agree(self, loss: float) -> tuple[float, bool, bool]:
        """Sum of the losses, whether any rank was asked to stop, whether all have scored: one all-reduce a step."""
        self._control[:] = loss, stop.requested(), self._evaluations.done()
        self.comm.all_reduce(self._control).wait()
        return float(self._control[0]), bool(self._control[1]), self._control[2] == self.comm.size

    def _reset_window(self) -> None:
        self._window_start = time.perf_counter()
        self._window_steps = self._window_samples = 0
        self._cold_seconds = 0.0
        self._cold_samples = 0

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Leave what happens inside out of the training rate."""
        start = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - start

    def _write_step(self, flight: Flight, loss: float) -> None:
        # The first step of a process compiles its kernels where they are not cached, and is left out of the rate.
        seconds = time.perf_counter() - self._window_start - self._cold_seconds
        samples = self._window_samples - self._cold_samples
        self.course.train_seconds += seconds
        self.course.timed_samples += samples
        self.course.stages_ms = self._trace.clock.take_ms()
        stages = self.engine.stages
        self._progress.write(
            "step",
            step=flight.step,
            epoch=flight.epoch,
            samples=self.course.samples,
            samples_per_s=samples / seconds if samples else None,
            loss=loss,
            lr=stages.rate(flight.step, stages.dense_lr),
            stages_ms=self.course.stages_ms,
            **stages.counts(),
        )
        self._reset_window()

    def _evaluate(self, split: str, *, closing: bool = False) -> Evaluation:
        return self._evaluations.run(split, self.course.step, clock=self._trace.evaluation(closing=closing))

    def _note_evaluation(self, evaluation: Evaluation, step: int) -> None:
        self._progress.write("eval", step=step, **evaluation.to_values())

    def _judge(self, evaluation: Evaluation) -> Reason | None:
        """Apply the stopping rules to an evaluation; keeps the best weights for early stopping."""
        train, course = self.config.train, self.course
        course.evaluated_step = course.step
        values = evaluation.metrics.to_values()
        if train.early_stop:
            value = values[train.early_stop.metric]
            if value is not None and (course.best is None or is_better(train.early_stop.metric, value, course.best)):
                course.best, course.best_step, course.evaluations_since_best = value, course.step, 0
                self._save("best")
            else:
                course.evaluations_since_best += 1
        if train.target and (value := values[train.target.metric]) is not None:
            beyond = value - train.target.value
            if (beyond if train.target.metric in HIGHER_IS_BETTER else -beyond) >= 0:
                return "target"
        if train.early_stop and course.evaluations_since_best >= train.early_stop.patience:
            return "early_stop"
        return None

    def _save(self, name: str | None = None) -> Path:
        self._evaluations.end()  # a resumed run does not evaluate this step again
        self.course.seconds = time.perf_counter() - self._began
        self.course.stages = self.engine.stages.state()
        meta = {
            "config": to_values(self.config),
            "model": self.engine.describe_model(),
            "plan": self.engine.plan.to_values(),
            "ranks": self.comm.size,
            "threads": self.engine.threads,
            "course": asdict(self.course),
        }
        return self._saver.save(step=self.course.step, meta=meta, name=name)

    def _make_saver(self) -> RunSaver:
        saver = RunSaver(
            self.checkpoints,
            self.engine,
            self.config.checkpoint,
            keep=self.config.train.keep_checkpoints,
            resumed=self._latest,
            on_saved=self._note_saved,
        )
        if self.config.train.checkpoint_every:
            saver.prepare()
        return saver

    def _note_saved(self, saved: Saved) -> None:
        self._progress.write("save", **saved.to_values())

    def _finish(self, reason: Reason) -> TrainResult:
        resumed_at_end = self.course.ended is not None
        self.course.ended = None if reason == "stopped" else reason
        checkpoint = latest_checkpoint(self.checkpoints) if resumed_at_end else None
        checkpoint = checkpoint or self._save()
        report: dict[str, Any] = {}
        if reason != "stopped":
            if self.config.train.early_stop and self.course.best_step:
                checkpoint = self.checkpoints / "best"
                self._saver.wait()
                self.engine.load_checkpoint(open_checkpoint(checkpoint, comm=self.comm), states=False)
            evaluation = self._evaluate(final_split(self.engine), closing=True)
            self._trace.write()
            self._saver.wait()  # nothing is reported of a run whose last checkpoint is not on disk
            if self.comm.rank == 0:
                report = report_of(
                    self.engine,
                    evaluation,
                    progress=self.directory / "progress.jsonl",
                    stop={
                        "reason": reason,
                        "step": self.course.step,
                        "checkpoint": str(checkpoint),
                        "seconds": time.perf_counter() - self._began,
                        "train_seconds": self.course.train_seconds,
                        "samples": self.course.samples,
                        "samples_per_s": self.course.timed_samples / self.course.train_seconds
                        if self.course.timed_samples
                        else None,
                        "stages_ms": self.course.stages_ms,
                        **self.engine.stages.counts(),
                    },
                )
                write_report(self.directory, report)
        else:
            self._trace.write()
        self._saver.wait()
        self._progress.write("end", step=self.course.step, reason=reason, seconds=time.perf_counter() - self._began)
        return TrainResult(self.directory, self.course.step, reason, checkpoint, report)
