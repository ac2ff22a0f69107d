"""Drawn parameters, what is run with them, and how near to each other arrays must be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers import DEFAULT_RULES, Layer, Param, use_rules
from bestiary.layers.base import map_params


def close(actual: Any, expected: Any, rtol: float = 2e-5) -> None:
    """Equal to `rtol` of the largest entry."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def draw(layer: Layer, seed: int = 0) -> Any:
    """Parameters that leave none of a layer's parts without effect."""
    rng = np.random.default_rng(seed)

    def one(p: Param) -> jax.Array:
        scale, mean = (0.3, 1.0) if p.inputs is None else (p.shape[p.batch_ndim] ** -0.5, 0.0)
        return jnp.asarray(rng.normal(mean, scale, p.shape), jnp.float32)

    return map_params(one, layer.declare())


def here_and_on(
    mesh: jax.sharding.Mesh, layer: Layer, apply: Callable[[Any, Any], Any], params: Any, x: Any
) -> tuple[Any, Any]:
    """apply(params, x) and its gradients by both, on one device, and with the layer's parameters on
    the mesh."""

    def run(params: Any, x: Any) -> Any:
        y, pull = jax.vjp(apply, params, x)
        return y, pull(jnp.cos(y))

    expected = jax.jit(run)(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, layer.abstract(mesh)))
        return expected, jax.jit(run)(placed, x)


def next_byte_loss(model: Any) -> Callable[[Any], tuple[jax.Array, Any]]:
    """Of a decoder's parameters: the loss on two short rows, and its gradient."""
    tokens = jnp.arange(20).reshape(2, 10)

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> jax.Array:
        scores = jax.nn.log_softmax(model.apply(params, tokens)[0][:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()

    return loss
