"""The training step: state in, state out, compiled once, sharded by declaration."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

# New versions add to the tracing context when this is first imported, as kernels do while they are
# traced: the second call of a program would then be traced and compiled again.
import jax.experimental.pallas.tpu
import jax.numpy as jnp
import jax.sharding as js
import optax

from bestiary.layers.base import Array, Param, Tree, abstract, advance, is_param, map_params, update
from bestiary.train.mesh import placed

if TYPE_CHECKING:
    from bestiary.train.experiment import Experiment

State = dict[str, Any]
"""params and frozen (parameters that are and are not trained), opt, step (batches seen), bad (the
first step with a non-finite loss or gradient, -1 for none), skipped (steps left out)."""


def split(declared: Tree, params: Tree) -> tuple[Tree, Tree]:
    """Trained parameters and the rest, each as the whole tree with None in the other's places."""

    def part(trainable: bool) -> Tree:
        return jax.tree.map(
            lambda p, x: x if p.trainable == trainable else None, declared, params, is_leaf=is_param
        )

    return part(True), part(False)


def merge(trained: Tree, frozen: Tree) -> Tree:
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None
    )


def abstract_state(experiment: "Experiment", mesh: js.Mesh) -> State:
    """Shapes, dtypes and shardings of the state; optimiser moments lie with their parameter."""
    declared = experiment.declare()
    with placed(mesh, experiment.mesh.table):
        params, frozen = split(declared, map_params(lambda p: p.abstract(mesh), declared))
    trained, _ = split(declared, declared)
    tx = experiment.optimizer.build(trained)
    replicated = js.NamedSharding(mesh, js.PartitionSpec())

    homes = dict(jax.tree_util.tree_leaves_with_path(params))

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # a moment sits in the optimiser's state under its parameter's path; a factored one, or a
        # count, has another shape
        suffixes = (homes.get(path[i:]) for i in range(len(path)))
        home = next((p for p in suffixes if p is not None and p.shape == leaf.shape), None)
        sharding = replicated if home is None else home.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt = jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    counts = dict.fromkeys(("step", "bad", "skipped"), scalar)
    return {"params": params, "frozen": frozen, "opt": opt} | counts


def init_state(experiment: "Experiment", mesh: js.Mesh) -> State:
    """The state before the first step, born sharded."""
    model, tx = experiment.model, _transformation(experiment)
    declared = experiment.declare()

    def draw(key: Array) -> State:
        params, frozen = split(declared, model.init(key))
        state = {"params": params, "frozen": frozen, "opt": tx.init(params)}
        return state | {"step": jnp.int32(0), "bad": jnp.int32(-1), "skipped": jnp.int32(0)}

    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(experiment, mesh))
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(experiment.seed))


def abstract_batch(experiment: "Experiment", mesh: js.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of one global batch."""
    with placed(mesh, experiment.mesh.table):
        return abstract(experiment.data.declare(), mesh)


def make_step(
    experiment: "Experiment", mesh: js.Mesh
) -> Callable[[State, dict, Array], tuple[State, dict]]:
    """The jitted `step(state, batch, total) -> (state, metrics)`; the state is donated.

    `total` (int32) is the length of the run in steps, which the schedule needs. Metrics are
    float32: loss and what else the objective sums, per weighted target; tokens (the weight of these
    targets), grad_norm, learning_rate and, under "layers", what the layers report; int32: the
    state's bad and skipped. In mode "skip" a step whose loss or gradient is not finite leaves the
    parameters as they were; in mode "stop" it ruins them, and a state whose `bad` is not -1 must
    not be saved.
    """
    tx, declared = _transformation(experiment), experiment.declare()
    trained, _ = split(declared, declared)

    def step(state: State, batch: dict, total: Array) -> tuple[State, dict]:
        gradient, report, frozen = _gradient(experiment, state, batch)
        norm = optax.tree.norm(gradient)
        updates, opt = tx.update(gradient, state["opt"], state["params"])
        rate = experiment.optimizer.learning_rate * experiment.schedule(state["step"], total)
        table_rate = rate * experiment.optimizer.table_scale(state["step"], total)

        def moved(p: Param, value: Array, direction: Array) -> Array:
            return (value + (table_rate if p.table else rate) * direction).astype(value.dtype)

        params = jax.tree.map(moved, trained, state["params"], updates, is_leaf=is_param)
        _, frozen = split(declared, advance(declared, merge(params, frozen)))
        new = {"params": params, "frozen": frozen, "opt": opt}
        finite = jnp.isfinite(report["loss"]) & jnp.isfinite(norm)
        if experiment.nonfinite == "skip":  # old and new state at once: a pass over both
            old = {name: state[name] for name in new}
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        bad = jnp.where(finite | (state["bad"] >= 0), state["bad"], state["step"])
        skipped = state["skipped"] + (~finite & (experiment.nonfinite == "skip"))
        new |= {"step": state["step"] + 1, "bad": bad, "skipped": skipped}
        report |= {"grad_norm": norm, "learning_rate": rate, "bad": bad, "skipped": skipped}
        return new, report

    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(experiment, mesh))
    # metrics everywhere: any process may read them
    replicated = js.NamedSharding(mesh, js.PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))


def make_evaluation(
    experiment: "Experiment", mesh: js.Mesh
) -> Callable[[State, dict], dict[str, Array]]:
    """The jitted `evaluation(state, batch)`: what the objective measures, on every device."""

    def evaluation(params: Tree, frozen: Tree, batch: dict) -> dict[str, Array]:
        return experiment.objective.measure(experiment.model, merge(params, frozen), batch)

    replicated = js.NamedSharding(mesh, js.PartitionSpec())
    program = jax.jit(evaluation, out_shardings=replicated)
    return lambda state, batch: program(state["params"], state["frozen"], batch)


def _gradient(experiment: "Experiment", state: State, batch: dict) -> tuple[Tree, dict, Tree]:
    """Gradient of the mean loss, what to report, and the states after all micro-batches, which hand
    them on."""
    model, objective = experiment.model, experiment.objective
    key = jax.random.fold_in(jax.random.key(experiment.seed), state["step"])

    def loss(params: Tree, frozen: Tree, micro: dict, key: Array) -> tuple[Array, tuple]:
        value, report, states = objective(model, merge(params, frozen), micro, key)
        return value, (report, states)

    def one(frozen: Tree, micro: dict, key: Array) -> tuple[Tree, dict, Tree]:
        gradient, (report, states) = jax.grad(loss, has_aux=True)(
            state["params"], frozen, micro, key
        )
        return gradient, report, update(frozen, states)

    n, frozen = experiment.accumulate, state["frozen"]
    if n == 1:
        gradient, report, frozen = one(frozen, batch, key)
        means = report["means"]
    else:
        # micro-batch i takes every n-th row, so that each is spread over the devices
        micro = {name: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}

        def add(carry: tuple[Tree, Tree], xs: tuple) -> tuple[tuple[Tree, Tree], dict]:
            total, frozen = carry
            gradient, report, frozen = one(frozen, *xs)
            total = jax.tree.map(jnp.add, total, (gradient, report["sums"]))
            return (total, frozen), report["means"]

        shapes = jax.eval_shape(one, frozen, jax.tree.map(lambda x: x[0], micro), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1]["sums"]))
        ((gradient, sums), frozen), means = jax.lax.scan(
            add, (zeros, frozen), (micro, jax.random.split(key, n))
        )
        report = {"sums": sums}
        means = jax.tree.map(lambda x: x.mean(0), means)
    tokens = jnp.maximum(report["sums"].pop("tokens"), 1)
    gradient = jax.tree.map(lambda g: (g / tokens).astype(g.dtype), gradient)
    report = {name: value / tokens for name, value in report["sums"].items()}
    return gradient, report | {"tokens": tokens, "layers": means}, frozen


def _transformation(experiment: "Experiment") -> optax.GradientTransformation:
    trained, _ = split(experiment.declare(), experiment.declare())
    return experiment.optimizer.build(trained)
