"""The steps of a run in one process: issued ahead of the devices, reported, evaluated and saved."""

import itertools
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import jax.sharding as js
import numpy as np
from jax.experimental import multihost_utils

from bestiary.train.checkpoint import FOLDER, Saver, saved_steps
from bestiary.train.clock import Clock
from bestiary.train.curves import draw
from bestiary.train.dataset import Batch, Loaded
from bestiary.train.experiment import Experiment
from bestiary.train.log import Line, Log, layer_metrics
from bestiary.train.placement import batch_part
from bestiary.train.runtime import Signals
from bestiary.train.step import State, abstract_batch, make_evaluation, make_step

AHEAD = 4  # steps that the host may be ahead of the devices
_REDRAW = 30.0  # seconds between two drawings of the curves


class Interrupted(Exception):
    """A signal ended the run after a checkpoint; the message says how to go on."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Loop:
    """The steps of one process, and what happens between them.

    The host never waits for the step it has just issued: it stays up to `AHEAD` steps in front and
    reads the metrics of steps that are finished by then.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: js.Mesh,
        run_dir: Path,
        signals: Signals,
        run: dict[str, Any],
        clock: Clock,
    ):
        self.experiment, self.run_dir, self.signals = experiment, run_dir, signals
        self.run, self.clock = run, clock
        self.step = make_step(experiment, mesh)
        self.evaluation = make_evaluation(experiment, mesh)
        self.batch = abstract_batch(experiment, mesh)
        self.part = batch_part(self.batch)
        self.replicated = js.NamedSharding(mesh, js.PartitionSpec())
        self.saver = Saver(run_dir, experiment.checkpoints)
        self.log = Log(run_dir, run["step"]) if jax.process_index() == 0 else None
        self.issued = run["step"]
        self.stop = 0
        self.pending: deque[tuple[int, dict[str, Any]]] = deque()
        self.drawn = time.monotonic()

    def go(self, state: State, data: Loaded) -> State:
        """Runs to the end or to a signal, with everything written."""
        try:
            return self._steps(state, data)
        finally:
            self.saver.close()
            if self.log:
                self.log.close()

    def _steps(self, state: State, data: Loaded) -> State:
        experiment, clock, first = self.experiment, self.clock, self.issued
        batches = data.train(experiment.seed, *self.part)
        if "data" in self.run:
            batches.set_state(self.run["data"])
        position, batch = batches.get_state(), self._put(next(batches))
        total, every = self._total(), experiment.evaluation.every
        while self.issued < clock.total and not self.stop:
            before = time.monotonic()
            state, metrics = self.step(state, batch, total)
            self.issued += 1
            self.pending.append((self.issued, metrics))
            position, batch = batches.get_state(), self._put(next(batches))
            if self.issued == first + 1:
                jax.block_until_ready(metrics)
                clock.compiled(time.monotonic() - before, self.issued)
            elif clock.open:  # nothing to wait for in front of an unknown end
                jax.block_until_ready(metrics)
                clock.lap(self.issued)
            self._settle(AHEAD)
            if self._agree():
                total = self._total()
            done = self.issued >= clock.total
            due = done or (every and self.issued % every == 0)
            evaluate = due and data.validation_batches > 0
            save = done or self.stop or self.issued % experiment.checkpoints.every == 0
            if evaluate or save:
                self._settle(1)
                self._require_finite(jax.block_until_ready(metrics))
                found = self._evaluate(state, data) if evaluate else {}
                self._settle(0, found)
                if save:
                    self._save(state, position, found.get("validation_loss"))
        if self.stop:
            name = signal.Signals(self.stop).name
            at = self.run_dir / FOLDER / str(self.issued)
            raise Interrupted(
                self.stop,
                f"stopped by {name}, saved in {at}; the same command continues from there",
            )
        return state

    def _agree(self) -> bool:
        """Hears signals and fits the length of the run, alike in all processes."""
        several = jax.process_count() > 1
        total = self.clock.total
        interval = min(self.experiment.log_every, max(1, total // 100))
        due = self.clock.open or self.issued % interval == 0
        if due and self.issued < total:
            self.clock.fit(self.issued)
        if several and due:
            mine = np.array([self.clock.total, self.signals.number], np.int32)
            everyone = multihost_utils.process_allgather(mine)
            self.clock.total, self.stop = int(everyone[0, 0]), int(everyone[:, 1].max())
        elif not several:
            self.stop = self.signals.number
        return self.clock.total != total

    def _settle(self, keep: int, found: dict[str, float] | None = None) -> None:
        """Waits until at most `keep` steps are unfinished and reports those that are due, and with
        the last what an evaluation found."""
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            jax.block_until_ready(metrics)
            self.clock.lap(step)
            last = step == self.clock.total
            if last or found or step % self.experiment.log_every == 0:
                self._require_finite(metrics)
                self._report(step, metrics, found or {})

    def _report(self, step: int, metrics: dict[str, Any], found: dict[str, float]) -> None:
        if self.log is None:
            return
        metrics = jax.device_get(metrics)
        layers, counts = metrics.pop("layers"), {"skipped": int(metrics.pop("skipped"))}
        del metrics["bad"], metrics["tokens"]
        line: Line = {"step": step} | {name: float(value) for name, value in metrics.items()}
        data, seconds = self.experiment.data, self.clock.step_seconds or self.clock.compile_seconds
        line |= found | {f"{data.unit}_per_second": data.units / seconds}
        line |= {"seconds": self.clock.used} | {k: v for k, v in counts.items() if v}
        if shares := layer_metrics(layers):
            line["layers"] = shares
        if step == self.clock.total:
            line["compilations"] = self.step._cache_size()  # type: ignore[attr-defined]
        self.log.write(line, self.clock.total, self.clock.left(step))
        if found and time.monotonic() - self.drawn > _REDRAW:
            with self.clock.pause("drawing"):
                draw(self.run_dir, self.experiment.objective.unit)
            self.drawn = time.monotonic()

    def _require_finite(self, metrics: dict[str, Any]) -> None:
        bad = int(metrics["bad"])
        if bad < 0 or self.experiment.nonfinite == "skip":
            return
        self.saver.wait()
        steps, rows = saved_steps(self.run_dir), self.experiment.data.batch_size
        good = self.run_dir / FOLDER / str(steps[-1]) if steps else "none"
        raise FloatingPointError(
            f"step {bad + 1}: loss or gradient is not finite at batch {bad} of the data (rows "
            f"{bad * rows} to {(bad + 1) * rows - 1} as shuffled by seed {self.experiment.seed}); "
            f"last good checkpoint: {good}"
        )

    def _evaluate(self, state: State, data: Loaded) -> dict[str, float]:
        """Means over the validation split, or its beginning: "validation_loss" and others."""
        measured, waiting = [], deque()
        with self.clock.pause("evaluation"):
            most = evaluation_batches(self.experiment, data)
            for batch in itertools.islice(data.validation(*self.part), most):
                waiting.append(self.evaluation(state, self._put(batch)))
                if len(waiting) > AHEAD:
                    measured.append(jax.device_get(waiting.popleft()))
            measured += jax.device_get(list(waiting))
        found = self.experiment.objective.summary(measured)
        return {f"validation_{name}": value for name, value in found.items()}

    def _save(self, state: State, position: Any, validation_loss: float | None) -> None:
        with self.clock.pause("save"):
            self.saver.save(
                state,
                {
                    "step": self.issued,
                    "data": position,
                    "total": self.clock.total,
                    "seconds": self.clock.used,
                    "validation_loss": validation_loss,
                },
            )

    def _put(self, batch: Batch) -> dict[str, jax.Array]:
        """This process's rows as part of the global batch, on their way to the devices."""
        return {
            name: jax.make_array_from_process_local_data(whole.sharding, batch[name], whole.shape)
            for name, whole in self.batch.items()
        }

    def _total(self) -> jax.Array:
        return jax.device_put(np.int32(self.clock.total), self.replicated)


def evaluation_batches(experiment: Experiment, data: Loaded) -> int:
    """How many batches of the validation split one evaluation takes."""
    every = data.validation_batches
    return min(experiment.evaluation.batches or every, every)
