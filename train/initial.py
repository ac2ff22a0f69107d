"""The state before the first step: drawn, or with the parameters of another run."""

from pathlib import Path

import jax
import jax.sharding as js

from bestiary.layers.base import flatten
from bestiary.train.checkpoint import EXPERIMENT, load_run, saved_steps
from bestiary.train.experiment import Experiment, read_experiment
from bestiary.train.step import State, init_state, merge, split


def given(experiment: Experiment) -> set[str]:
    """The paths of the parameters that the run `experiment.initial` gives.

    Raises ValueError, without reading any array, when that is no run, has no checkpoint yet or no
    parameter of this model.
    """
    if experiment.initial is None:
        return set()
    run_dir = Path(experiment.initial)
    if not (run_dir / EXPERIMENT).is_file() or not saved_steps(run_dir):
        raise ValueError(f"initial: {experiment.initial!r}; need a run that has a checkpoint")
    theirs = dict(flatten(read_experiment(run_dir / EXPERIMENT).declare()))
    ours = dict(flatten(experiment.declare()))
    names = {n for n, p in ours.items() if n in theirs and p.shape == theirs[n].shape}
    if not names:
        raise ValueError(
            f"initial: {experiment.initial!r} has no parameter of this model's paths and shapes"
        )
    return names


def initial_state(experiment: Experiment, mesh: js.Mesh) -> tuple[State, list[str]]:
    """The state, and the paths of the parameters that `experiment.initial` did not give.

    Raises ValueError as `given` does.
    """
    if experiment.initial is None:
        return init_state(experiment, mesh), []
    names = given(experiment)
    theirs = dict(flatten(load_run(experiment.initial, mesh=mesh)[1]))
    state = init_state(experiment, mesh)

    def one(path: tuple, mine: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return (
            jax.device_put(theirs[name].astype(mine.dtype), mine.sharding)
            if name in names
            else mine
        )

    declared = experiment.declare()
    params = merge(state["params"], state["frozen"])
    params, frozen = split(declared, jax.tree_util.tree_map_with_path(one, params))
    drawn = {name for name, _ in flatten(declared)} - names
    return state | {"params": params, "frozen": frozen}, sorted(drawn)
