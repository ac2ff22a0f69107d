"""The training run: from an experiment to a run directory, stopped and continued at any moment."""

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jax
from jax.sharding import Mesh

from bestiary.train.checkpoint import EXPERIMENT, restore, saved_steps
from bestiary.train.clock import Clock
from bestiary.train.curves import draw
from bestiary.train.experiment import (
    Experiment,
    experiments,
    load_experiment,
    read_experiment,
    save_experiment,
)
from bestiary.train.initial import given, initial_state
from bestiary.train.loop import Interrupted, Loop, evaluation_batches
from bestiary.train.mesh import placed
from bestiary.train.placement import check
from bestiary.train.runtime import Signals, locked, start
from bestiary.train.step import State, merge
from bestiary.train.tree_json import difference


def run(experiment: Experiment, name: str, *, started: float) -> int:
    """`bestiary train`: returns the exit status, 128 + N when signal N ended the run.

    Raises as `train` does.
    """
    start()
    try:
        run_dir = train(experiment, name, started=started)
    except FloatingPointError as error:
        print(f"bestiary train: error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number
    if jax.process_index() == 0:
        print(f"run: {run_dir}\ncurves: {run_dir / 'curves.png'}")
    return 0


def train(experiment: Experiment, name: str, *, started: float | None = None) -> Path:
    """Trains to the end, from the newest checkpoint if there is one; returns the run directory.

    Args:
      name: of the experiment in `configs`, or any other for an experiment of one's own.
      started: `time.monotonic()` at the start of the program, from which `minutes` count.

    Raises:
      ValueError: impossible combinations, unreadable data, a run directory that holds something
        else; before anything is compiled or written.
      FloatingPointError: a loss or gradient is not finite, in mode "stop".
      Interrupted: SIGINT or SIGTERM came.
    """
    started = time.monotonic() if started is None else started
    run_dir = Path(experiment.run_dir or f"runs/{name}")
    main = jax.process_index() == 0
    with Signals() as signals, ExitStack() as held:
        mesh = experiment.mesh.build()
        check(experiment, mesh)
        if not saved_steps(run_dir):
            given(experiment)  # refuses now what could not be begun from
        data = experiment.data.load()
        data.check(experiment.model)
        if main:
            _claim(run_dir, experiment, name)
            held.enter_context(locked(run_dir))
        restored = restore(run_dir, experiment, mesh)
        state, run = restored or (_initial(experiment, mesh, main), {"step": 0})
        if main and run["step"]:
            what = "is finished" if run["step"] == run["total"] else "goes on"
            print(f"{run_dir} {what} after step {run['step']}", flush=True)
        batches = evaluation_batches(experiment, data)
        clock = Clock(experiment, started, run.get("seconds", 0.0), run.get("total"), batches)
        loop = Loop(experiment, mesh, run_dir, signals, run, clock)
        with placed(mesh, experiment.mesh.table):
            state = loop.go(state, data)
        if main:
            draw(run_dir, experiment.objective.unit)
    if jax.process_count() == 1:
        data.finish(run_dir, experiment.model, merge(state["params"], state["frozen"]))
    return run_dir


def _initial(experiment: Experiment, mesh: Mesh, main: bool) -> State:
    """The first state; says what `initial` gives of it."""
    state, drawn = initial_state(experiment, mesh)
    if main and experiment.initial is not None:
        rest = f"; drawn: {', '.join(drawn)}" if drawn else ""
        print(f"parameters of {experiment.initial}{rest}", flush=True)
    return state


def _claim(run_dir: Path, experiment: Experiment, name: str) -> None:
    """Makes the directory this experiment's. Raises ValueError when it is something else's."""
    file = run_dir / EXPERIMENT
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir: {str(run_dir)!r} is a file; need a folder, or none yet")
    if file.exists():
        for path, (there, here) in difference(read_experiment(file), experiment).items():
            # where a run lies and computes does not change what it computes
            if path.split(".")[0] not in ("run_dir", "mesh"):
                raise ValueError(
                    f"run_dir: {str(run_dir)!r} holds another run, with {path} {there!r}; "
                    f"need this value instead of {here!r}, or another run_dir"
                )
    elif run_dir.exists() and (others := sorted(p.name for p in run_dir.iterdir())):
        raise ValueError(
            f"run_dir: {str(run_dir)!r} holds {others[0]!r} but no run; need a new or empty folder"
        )
    else:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"run_dir: {str(run_dir)!r}: {error.strerror}; need a folder"
            ) from None
    save_experiment(experiment, file)
    if name in experiments():
        changed = {p: new for p, (_, new) in difference(load_experiment(name), experiment).items()}
        text = json.dumps({"experiment": name, "overrides": changed}, indent=2)
        (run_dir / "overrides.json").write_text(text + "\n")
