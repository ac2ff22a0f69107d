"""Data-driven tuning of a hyper-parameter: the value that is best for tasks on average.

Balcan et al. 2025, arXiv 2501.13734: the hyper-parameter mixes two activations (see
`layers.Interpolated`), the tasks are drawn from one distribution, and the value chosen on some is
to serve the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bestiary.layers.base import Array, Layer, Tree

Utility = Callable[[Tree, Array], Array]  # (task, alpha) -> float32 scalar, the larger the better


@dataclass(frozen=True)
class Tuned:
    """What `tune` finds."""

    alphas: np.ndarray
    """float32 [values]."""
    utility: np.ndarray
    """float32 [tasks, values]."""

    @property
    def mean(self) -> np.ndarray:
        """Mean utility by value: [values]."""
        return self.utility.mean(0)

    @property
    def best(self) -> float:
        """The value with the best mean."""
        return float(self.alphas[self.mean.argmax()])

    def gap(self, num_tasks: int, draws: int = 100, seed: int = 0) -> float:
        """How much the mean utility of the value chosen on `num_tasks` tasks falls on others.

        The mean over random splits of the tasks into `num_tasks` and as many others; it shrinks
        about as 1 / sqrt(num_tasks).

        Raises:
          ValueError: fewer than 2 num_tasks tasks.
        """
        if not 1 <= num_tasks <= len(self.utility) // 2:
            raise ValueError(
                f"num_tasks: {num_tasks}; need 1 to half of the {len(self.utility)} tasks"
            )
        random, gaps = np.random.default_rng(seed), []
        for _ in range(draws):
            order = random.permutation(len(self.utility))
            seen, other = (
                self.utility[order[i * num_tasks : (i + 1) * num_tasks]].mean(0) for i in (0, 1)
            )
            choice = seen.argmax()
            gaps.append(seen[choice] - other[choice])
        return float(np.mean(gaps))


def tune(utility: Utility, tasks: Tree, alphas: Array) -> Tuned:
    """The utility of every value for every task, all computed at once.

    Args:
      utility: trains on a task and says how well; a pure function (see `regression`).
      tasks: arrays whose first axis is the task.
      alphas: float32 [values].
    """
    by_alpha = jax.vmap(utility, in_axes=(None, 0))
    values = jax.jit(jax.vmap(by_alpha, in_axes=(0, None)))(tasks, alphas)
    return Tuned(np.asarray(alphas), np.asarray(values))


def regression(
    model: Layer, *, steps: int = 500, learning_rate: float = 1e-2, seed: int = 0
) -> Utility:
    """Minus the mean squared error on new points after `steps` of Adam on the whole of a task.

    Args:
      model: (params, x [rows, inputs]) -> [rows, outputs] whose `Interpolated` activations hold a
        fixed alpha, for which the tuned value is put everywhere. A task is a dict of x, y and, the
        new points, new_x, new_y.

    The utility is differentiable by alpha, through all steps: `jax.grad` of its mean over tasks is
    the hyper-gradient.
    """

    def loss(params: Tree, alpha: Array, x: Array, y: Array) -> Array:
        return jnp.square(model.apply(with_alpha(params, alpha), x) - y).mean()

    def utility(task: Tree, alpha: Array) -> Array:
        tx = optax.adam(learning_rate)
        params = model.init(jax.random.key(seed))

        @partial(jax.checkpoint, prevent_cse=False)
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, alpha, task["x"], task["y"]), state)
            return (optax.apply_updates(params, updates), state), None

        start = (params, tx.init(params))
        (params, _), _ = jax.lax.scan(step, start, length=steps)
        return -loss(params, alpha, task["new_x"], task["new_y"])

    return utility


def with_alpha(params: Tree, alpha: Array) -> Tree:
    """`params` with `alpha` for every entry of that name."""
    return {
        name: alpha if name == "alpha" else with_alpha(x, alpha) if isinstance(x, dict) else x
        for name, x in params.items()
    }
