"""Minimising a function of a parameter tree on all samples at once: L-BFGS or Adam."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from bestiary.layers.base import Array, Tree
from bestiary.train.step import merge, split

Loss = Callable[[Tree, Any], Array]  # (parameters, data) -> scalar
Method = Literal["lbfgs", "adam"]


def minimise(
    loss: Loss,
    declared: Tree,
    params: Tree,
    data: Any,
    *,
    steps: int,
    method: Method = "lbfgs",
    learning_rate: float = 1e-2,
    chunk: int = 5,
    between: Callable[[Tree], Tree] | None = None,
    times: int = 0,
    redraw: Callable[[Tree], Any] | None = None,
) -> Iterator[tuple[int, Tree, Array]]:
    """Yields (step, parameters, loss before that step) after every `chunk` steps and at the end.

    Only what is declared trainable moves. Steps of a chunk run without coming back to Python, and
    `loss` (hashable by identity) is compiled once per shape of the parameters. L-BFGS has a memory
    of 20 steps and a line search that chooses its own lengths; Adam's `learning_rate` falls to 0
    along a cosine over the `steps`. The first `times` chunks begin with `between` of the
    parameters, such as new grids; all but the first with `redraw` of them, other data of the same
    shapes.
    """
    trained, frozen = split(declared, params)
    tx = transformation(method, learning_rate, steps)
    state = tx.init(trained)
    for step in range(0, steps, chunk):
        changed = False
        if between is not None and step < times * chunk:
            trained, frozen = split(declared, between(merge(trained, frozen)))
            changed = True
        if redraw is not None and step:
            data = redraw(merge(trained, frozen))
            changed = True
        if changed and method == "lbfgs":  # what it remembers is of another function
            state = tx.init(trained)
        n = min(chunk, steps - step)
        trained, state, value = advance(
            loss, method, learning_rate, steps, n, trained, frozen, state, data
        )
        yield step + n, merge(trained, frozen), value


def transformation(
    method: Method, learning_rate: float, steps: int
) -> optax.GradientTransformationExtraArgs:
    if method == "lbfgs":
        return optax.lbfgs(memory_size=20)
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.with_extra_args_support(optax.adam(schedule))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def advance(
    loss: Loss,
    method: Method,
    learning_rate: float,
    steps: int,
    n: Any,
    trained: Tree,
    frozen: Tree,
    state: Any,
    data: Any,
) -> tuple[Tree, Any, Array]:
    """`n` steps, a number that may change without compiling anew."""
    tx = transformation(method, learning_rate, steps)

    def objective(trained: Tree) -> Array:
        return loss(merge(trained, frozen), data)

    def step(_: Array, carry: tuple[Tree, Any, Array]) -> tuple[Tree, Any, Array]:
        trained, state, _ = carry
        if method == "lbfgs":  # the line search has value and gradient of where it ended
            value, grad = optax.value_and_grad_from_state(objective)(trained, state=state)
        else:
            value, grad = jax.value_and_grad(objective)(trained)
        updates, state = tx.update(grad, state, trained, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(trained, updates), state, jnp.asarray(value)

    return jax.lax.fori_loop(0, n, step, (trained, state, jnp.float32(0)))
