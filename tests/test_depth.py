"""Mixture of depths: who passes, against a loop, and decoding by what the token tells."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.layers import GLU, Attention, MixtureOfDepths, RMSNorm, Silu
from bestiary.layers.base import Context
from bestiary.zoo.decoder import Block

DIM, LENGTH = 12, 10
BLOCK = Block(
    mixer=Attention(dim=DIM, num_heads=2, num_kv_heads=1, head_dim=6),
    ffn=GLU(dim=DIM, hidden=20, activation=Silu()),
    norm=RMSNorm(dim=DIM),
)
LAYER = MixtureOfDepths(dim=DIM, block=BLOCK, capacity=0.4)
PARAMS = LAYER.init(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (3, LENGTH, DIM))


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_best_of_every_sequence_pass_in_order() -> None:
    y, _, _ = LAYER.apply(PARAMS, X)
    r = np.asarray(X @ PARAMS["router"])[..., 0]
    for b in range(len(X)):
        best = np.sort(np.argsort(-r[b])[:4])
        ctx = Context(positions=jnp.asarray(best)[None])
        inside, _, _ = BLOCK.apply(PARAMS["block"], X[b : b + 1, best], ctx)
        expected = np.array(X[b])
        expected[best] += r[b, best, None] * (np.asarray(inside[0]) - expected[best])
        close(y[b], expected)


def test_padding_does_not_pass() -> None:
    segments = jnp.where(jnp.arange(LENGTH) < 4, 1, 0)[None].repeat(3, 0)
    positions = jnp.arange(LENGTH)[None].repeat(3, 0)
    y, _, _ = LAYER.apply(PARAMS, X, Context(positions=positions, segment_ids=segments))
    whole, _, _ = dataclasses.replace(LAYER, capacity=1.0).apply(PARAMS, X[:, :4])
    close(y[:, :4], whole)
    close(y[:, 4:], X[:, 4:])


def test_decoding_equals_prefill_by_the_sign() -> None:
    """One after another, and all at once: those with r > 0 pass and are seen by later ones."""

    def run(sizes: list[int]) -> jax.Array:
        cache, parts, start = LAYER.init_cache(3, LENGTH), [], 0
        for size in sizes:
            positions = jnp.arange(start, start + size)[None].repeat(3, 0)
            here = X[:, start : start + size]
            y, cache, _ = STEP(PARAMS, here, Context(positions=positions), cache)
            parts.append(y)
            start += size
        return jnp.concatenate(parts, 1)

    together = run([LENGTH])
    close(run([6, 1, 1, 1, 1]), together)
    r = np.asarray(X @ PARAMS["router"])[..., 0]
    close(together[r <= 0], X[r <= 0])
    assert (np.abs(together[r > 0] - X[r > 0]).max(-1) > 1e-4).all()


STEP = jax.jit(LAYER.apply)


def test_the_prediction_teaches_who_passes() -> None:
    """The loss falls to nothing where the signs tell, and rises with those that do not."""
    r = np.asarray(X @ PARAMS["router"])[..., 0]
    passes = np.zeros_like(r)
    np.put_along_axis(passes, np.argsort(-r, 1)[:, :4], 1.0, 1)
    p = 1 / (1 + np.exp(-r))
    expected = -np.where(passes > 0, np.log(p), np.log(1 - p)).mean()
    _, _, aux = LAYER.apply(PARAMS, X)
    close(aux.losses["depth"], LAYER.predict * expected)
    close(aux.metrics["predicted"], ((r > 0) == (passes > 0)).mean())


def test_a_layer_costs_what_passes() -> None:
    whole = BLOCK.cost(LENGTH)
    assert LAYER.cost(LENGTH).flops < 0.45 * whole.flops
    assert LAYER.count().total == BLOCK.count().total + DIM


@pytest.mark.parametrize("capacity", [0.0, 1.5])
def test_impossible_capacities_are_refused(capacity: float) -> None:
    with pytest.raises(ValueError, match=f"^capacity: {capacity}; need 0 < capacity <= 1$"):
        dataclasses.replace(LAYER, capacity=capacity)
