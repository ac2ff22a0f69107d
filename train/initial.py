"""The state before the first step: drawn, or with the parameters of another run."""

import jax
import jax.sharding as js

from bestiary.layers.base import flatten
from bestiary.train.checkpoint import load_run
from bestiary.train.experiment import Experiment
from bestiary.train.step import State, init_state, merge, split


def initial_state(experiment: Experiment, mesh: js.Mesh) -> tuple[State, list[str]]:
    """The state, and the paths of the parameters that `experiment.initial` did not give.

    Raises ValueError before anything is compiled when it is no run, or has no parameter of this
    model.
    """
    if experiment.initial is None:
        return init_state(experiment, mesh), []
    try:
        theirs = dict(flatten(load_run(experiment.initial, mesh=mesh)[1]))
    except ValueError as error:
        raise ValueError(f"initial: {error}") from None
    declared = dict(flatten(experiment.declare()))
    taken = {n: x for n, x in theirs.items() if n in declared and x.shape == declared[n].shape}
    if not taken:
        raise ValueError(
            f"initial: {experiment.initial!r} has no parameter of this model's paths and shapes"
        )
    state = init_state(experiment, mesh)

    def one(path: tuple, mine: jax.Array) -> jax.Array:
        given = taken.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return mine if given is None else jax.device_put(given.astype(mine.dtype), mine.sharding)

    params = merge(state["params"], state["frozen"])
    params = jax.tree_util.tree_map_with_path(one, params)
    params, frozen = split(experiment.declare(), params)
    return state | {"params": params, "frozen": frozen}, sorted(declared.keys() - taken.keys())
