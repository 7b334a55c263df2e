"""The training run: steps, evaluations, checkpoints, stopping rules, resumption."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlrm.config import RunConfig, to_values
from dlrm.errors import CommError, CrosslaneError
from embedding.comm import Comm
from embedding.heartbeat import Heartbeat
from pipeline.changed_rows import ChangedRows, Reader
from pipeline.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint
from pipeline.checkpoint_async import Saved
from pipeline.config_agreement import agree_config
from pipeline.course import HIGHER_IS_BETTER, Course, Reason, TrainResult, is_better, planned_samples, planned_steps
from pipeline.dedicated import Roles, make_evaluations, watched_ranks
from pipeline.engine import Engine, build_engine
from pipeline.evaluator import Evaluation, final_split
from pipeline.feed import TrainingFeed
from pipeline.flight import Flight
from pipeline.outcomes import Outcomes, RanOverError
from pipeline.plan_report import plan_summary
from pipeline.progress import ProgressWriter
from pipeline.rate_window import RateWindow
from pipeline.resumption import check_resumable, rule_changed
from pipeline.run_trace import RunTrace
from pipeline.saving import RunSaver
from pipeline.schedule import execute, ring_size
from pipeline.stages import S
from pipeline.summary import report_of, write_report
from pipeline.trace import StageClock


class Trainer:
    """One run on this rank (all methods are collective)."""

    def __init__(self, config: RunConfig, *, comm: Comm, threads: int, roles: Roles | None = None) -> None:
        """Build the engine; nothing is written yet.

        Args:
            config: of the run.
            comm: the ranks that train.
            threads: of each rank.
            roles: who evaluates meanwhile; ``None``: the same ranks.

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
        self._roles = roles
        self.engine: Engine = build_engine(
            config,
            comm=comm,
            threads=threads,
            saved=self._latest,
            machines=roles.topology if roles else None,
        )
        self.split = self.engine.dataset.split("train")
        self.steps = planned_steps(config, self.split.rows)
        self.course = Course()
        self._trace = RunTrace(config.trace, device=self.engine.device, comm=comm, directory=self.directory)
        # Of every place of the ring the first batch runs as it is, the second one while it is captured.
        captured = 2 * ring_size(self.engine.train_schedule.rows)
        self._window = RateWindow(captured if self.engine.device.steps_behind else 1)
        readers: list[Reader] = ["checkpoint"] if config.checkpoint.incremental else []
        readers += ["evaluation"] if roles else []
        self._changed = ChangedRows(self.engine.embedding, readers, self.engine.device)
        self._evaluations = make_evaluations(self.engine, self._note_evaluation, roles, self._changed)
        self._outcomes = Outcomes(comm, self._evaluations.done, config.optimizer.lr)
        self._ring: list[Flight] = []
        self._decides = config.train.target or config.train.early_stop
        if self._decides:
            self.engine.dataset.split(config.eval.split)  # refuses a missing split before the first step

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
            watched = watched_ranks(self.engine, self._roles)
            with Heartbeat(*watched, on_lost=self._note_lost), self._make_saver() as self._saver:
                reason = self.course.ended or self._steps()
                result = self._finish(reason)
                self._evaluations.dismiss(result)
            self._close()
            return result
        finally:
            self._evaluations.close()
            self._progress.close()

    def _close(self) -> None:
        """What a run that did not fail leaves to others: no graphs, no communicators of GPUs."""
        for flight in (*self._ring, *self._evaluations.flights()):
            flight.recording.graph = None
        self.engine.close()

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
            carrier=self.engine.carrier_name,
            eval_ranks=self.config.eval.ranks,
            threads=self.engine.threads,
            precision=self.config.precision,
            device=self.engine.device.name,
            plan=plan_summary(self.engine.plan),
            overlap={"train": self.engine.train_schedule.to_values(), "eval": self.engine.eval_schedule.to_values()},
            step=self.course.step,
            steps=self.steps,
            samples=planned_samples(self.config, self.split.rows, self.steps),
        )

    def _steps(self) -> Reason:
        config, engine = self.config, self.engine
        self._make_ring()
        if self._evaluation_due() and (reason := self._judge(self._evaluate(config.eval.split))):
            return reason  # a stop came between this step and its evaluation
        self._feed = TrainingFeed(engine, self.split)
        self._window.reset()
        while True:
            try:
                return self._steps_on()
            except RanOverError as error:
                over = error.with_traceback(None)
            if reason := self._run_again(over):
                return reason
            self._make_ring()

    def _make_ring(self) -> None:
        """Allocate all batches in flight; graphs are captured anew."""
        self._ring.clear()
        for _ in range(ring_size(self.engine.train_schedule.rows)):
            self._ring.append(self.engine.stages.flight(self.config.data.batch_size, training=True))

    def _steps_on(self) -> Reason:
        """Steps from the course's place on.

        Raises:
            RanOverError: a step has to be done again.
        """
        engine = self.engine
        self._trace.start_training(self.course.step)
        with (
            self._feed.batches(self.course.step, self.steps) as batches,
            closing(
                execute(
                    engine.train_schedule.rows,
                    stages=engine.stages,
                    ring=self._ring,
                    batches=batches,
                    device=engine.device,
                    clock=self._trace.clock,
                )
            ) as flights,
        ):
            for flight in flights:
                if reason := self._after_step(flight):
                    return reason
        return "finished"

    def _run_again(self, over: RanOverError) -> Reason | None:
        """Do the step whose exchange ran over, with lists that are long enough; those behind it follow as usual."""
        engine, flight = self.engine, self._ring[0]
        self.course.step = over.step - 1
        self.course.samples -= over.rows
        self._window.take_back(over.rows)
        with (
            self._feed.batches(over.step - 1, over.step) as batches,
            engine.device.streams(("main",)) as streams,
        ):
            engine.stages.run_exact(next(batches), flight, S.dense_update)
            streams.join([engine.device.record()])
            return self._after_step(flight)

    def _after_step(self, flight: Flight) -> Reason | None:
        course, train = self.course, self.config.train
        course.step = step = flight.step
        self._trace.after_step(step)
        course.samples += flight.global_rows
        self._window.add(flight.global_rows)
        self._outcomes.add(step, flight.global_rows, self.engine.stages.outcome(flight))
        stopping, scored = self._outcomes.look(self.engine.device.steps_behind)
        if scored:
            self._evaluations.end()
        self._window.warm_up(flight.global_rows, lambda: self._outcomes.look(0))
        last = step == self.steps
        if step % train.progress_every == 0 or last or stopping:
            self._outcomes.look(0)
            self._write_step(flight, self._outcomes.loss)
        if stopping:
            return "stopped"
        if self._evaluation_due():
            self._outcomes.look(0)
            with self._window.pause():
                if self._decides is None:  # nothing waits for the metrics: they come behind the next steps
                    course.evaluated_step = step
                    self._evaluations.start(self.config.eval.split, step, clock=self._eval_clock())
                elif reason := self._judge(self._evaluate(self.config.eval.split)):
                    return reason
        if train.checkpoint_every and step % train.checkpoint_every == 0 and not last:
            self._outcomes.look(0)
            with self._window.pause():
                self._save()
        return None

    def _evaluation_due(self) -> bool:
        every, step = self.config.train.eval_every, self.course.step
        if not every or not step or step % every or step == self.course.evaluated_step:
            return False
        return step != self.steps or self._decides is not None  # else the closing evaluation follows at once

    def _write_step(self, flight: Flight, loss: float) -> None:
        samples, seconds = self._window.take()
        self.course.train_seconds += seconds
        self.course.timed_samples += samples
        stages_ms = self._trace.clock.take_ms()
        self.course.stages_ms = stages_ms or self.course.stages_ms  # on a GPU traced steps alone are timed
        stages = self.engine.stages
        self._progress.write(
            "step",
            step=flight.step,
            epoch=flight.epoch,
            samples=self.course.samples,
            samples_per_s=samples / seconds if samples else None,
            loss=loss,
            lr=stages.rate(flight.step, stages.dense_lr),
            stages_ms=stages_ms,
            **stages.counts(),
        )

    def _evaluate(self, split: str) -> Evaluation:
        return self._evaluations.run(split, self.course.step, clock=self._eval_clock())

    def _eval_clock(self) -> StageClock | None:
        return None if self._evaluations.elsewhere else self._trace.evaluation()

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
        evaluated_step = self.course.evaluated_step
        if not self._evaluations.elsewhere:
            self._evaluations.end()  # a resumed run does not evaluate this step again
        elif self._evaluations.pending_step == self.course.step:
            evaluated_step = 0  # but one that others are at would be lost
        self.course.seconds = time.perf_counter() - self._began
        self.course.stages = self.engine.stages.state()
        meta = {
            "config": to_values(self.config),
            "model": self.engine.describe_model(),
            "plan": self.engine.plan.to_values(),
            "ranks": self.comm.size,
            "threads": self.engine.threads,
            "course": {**asdict(self.course), "evaluated_step": evaluated_step},
        }
        return self._saver.save(step=self.course.step, meta=meta, name=name)

    def _make_saver(self) -> RunSaver:
        saver = RunSaver(
            self.checkpoints,
            self.engine,
            self.config.checkpoint,
            keep=self.config.train.keep_checkpoints,
            resumed=self._latest,
            changed=self._changed,
            on_saved=self._note_saved,
        )
        if self.config.train.checkpoint_every:
            saver.prepare()
        return saver

    def _note_saved(self, saved: Saved) -> None:
        self._progress.write("save", **saved.to_values())

    def _finish(self, reason: Reason) -> TrainResult:
        self._evaluations.end()
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
            evaluation = self._evaluations.run_here(
                final_split(self.engine), self.course.step, clock=self._trace.evaluation(closing=True)
            )
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
