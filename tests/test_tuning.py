"""Tuning on many tasks: every utility as by hand, the choice, the gap, the hyper-gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close

from bestiary.layers import Interpolated, Relu, ReluSquared
from bestiary.layers.perceptron import perceptron
from bestiary.train.tuning import Tuned, regression, tune, with_alpha

MIX = Interpolated(first=Relu(), second=ReluSquared())
MODEL = perceptron((1, 6, 1), lambda width: MIX)


def tasks(n: int) -> dict[str, Any]:
    """Parabolas, which squared ReLUs fit well."""
    rng = np.random.default_rng(0)
    x, new = rng.uniform(-1, 1, (2, n, 12, 1)).astype(np.float32)
    a = rng.uniform(1, 3, (n, 1, 1)).astype(np.float32)
    return {"x": x, "y": a * x**2, "new_x": new, "new_y": a * new**2}


def test_equals_training_one_by_one() -> None:
    all_tasks, alphas = tasks(3), jnp.array([0.0, 0.3, 1.0])
    utility = regression(MODEL, steps=20, learning_rate=0.03)
    found = tune(utility, all_tasks, alphas)
    assert found.utility.shape == (3, 3)
    own = jax.tree.map(lambda x: x[2], all_tasks)
    close(found.utility[2, 1], utility(own, alphas[1]), 1e-4)
    assert found.best == alphas[found.mean.argmax()]
    # the hyper-gradient, against differences
    gradient = jax.jit(jax.grad(utility, 1))(own, jnp.float32(0.3))
    step = 1e-2
    ends = jax.jit(jax.vmap(lambda a: utility(own, a)))(jnp.array([0.3 - step, 0.3 + step]))
    close(gradient, (ends[1] - ends[0]) / (2 * step), 2e-2)


def test_alpha_is_put_everywhere() -> None:
    model = perceptron((1, 3, 2, 1), lambda width: MIX)
    params = model.init(jax.random.key(0))
    for alpha, end in ((1.0, Relu()), (0.0, ReluSquared())):
        plain = perceptron((1, 3, 2, 1), lambda width, end=end: end)
        x = jnp.linspace(-2, 2, 7)[:, None]
        close(model.apply(with_alpha(params, jnp.float32(alpha)), x), plain.apply(params, x))


def test_the_gap_shrinks_with_the_tasks() -> None:
    """Utilities that are noise around one curve: about as 1 / sqrt(num_tasks)."""
    rng = np.random.default_rng(1)
    alphas = np.linspace(0, 1, 21)
    noise = rng.normal(0, 0.3, (256, 21))
    found = Tuned(alphas, -np.square(alphas - 0.4) + noise)
    assert abs(found.best - 0.4) < 0.3
    gaps = [found.gap(n) for n in (2, 8, 32, 128)]
    ratios = [a / b for a, b in zip(gaps, gaps[1:], strict=False)]
    assert all(1.4 < ratio < 3 for ratio in ratios), gaps  # 2 for every four times as many
    with pytest.raises(ValueError, match="^num_tasks: 129; need 1 to half of the 256 tasks$"):
        found.gap(129)
