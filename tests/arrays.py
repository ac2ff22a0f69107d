"""Drawn parameters, and how near to each other arrays must be: for several test files."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers import Layer, Param
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
