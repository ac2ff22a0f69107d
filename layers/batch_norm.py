"""Batch normalisation, and how a layer with statistics of the batch is run in training.

A layer with moving statistics has two pure forms: `apply`, which normalises by the moving ones, and
`train`, which normalises by those of the batch and returns the next moving ones in `Aux.state`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Aux, Layer, Param, Tree, layer, ones, positive


@layer
class BatchNorm(Layer):
    """(x - mean) / sqrt(var + eps) * weight + bias by channel (Ioffe & Szegedy 2015): [..., dim].

    `apply` takes the moving mean and variance; where only `apply` is called they stay at 0 and 1,
    and the layer is an affine map. Float32 statistics, the result in the type of x.
    """

    dim: int
    eps: float = 1e-5
    momentum: float = 0.1
    """Share of the batch in the moving statistics."""
    affine: bool = True

    def __post_init__(self) -> None:
        positive(dim=self.dim)
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum: {self.momentum}; need 0 to 1")

    def spec(self) -> Tree:
        each = (self.dim,), ("mlp",)
        spec = {"mean": Param(*each, trainable=False), "var": Param(*each, ones, trainable=False)}
        if self.affine:
            spec |= {"weight": Param(*each, ones), "bias": Param(*each)}
        return spec

    def apply(self, params: Tree, x: Array) -> Array:
        return self.normalize(params, x, params["mean"], params["var"])

    def train(self, params: Tree, x: Array, where: Array | None = None) -> tuple[Array, Aux]:
        """By the mean and biased variance of the batch; the moving variance takes the unbiased one.

        `where`, bool [..., 1], says which rows count (None: all). With no row the moving statistics
        stay.
        """
        x32, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
        real = jnp.ones((*x.shape[:-1], 1), bool) if where is None else where
        count = real.sum(dtype=jnp.float32)
        mean = jnp.where(real, x32, 0).sum(axes) / jnp.maximum(count, 1)
        var = jnp.where(real, jnp.square(x32 - mean), 0).sum(axes) / jnp.maximum(count, 1)
        share = self.momentum * (count > 0)
        unbiased = var * count / jnp.maximum(count - 1, 1)

        def move(old: Array, new: Array) -> Array:
            return (old + share * (jax.lax.stop_gradient(new) - old)).astype(old.dtype)

        state = {"mean": move(params["mean"], mean), "var": move(params["var"], unbiased)}
        return self.normalize(params, x, mean, var), Aux(state=state)

    def normalize(self, params: Tree, x: Array, mean: Array, var: Array) -> Array:
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + self.eps)
        y = y * params["weight"] + params["bias"] if self.affine else y
        return y.astype(x.dtype)


def run(
    layer: Any, params: Tree, x: Array, training: bool, where: Array | None = None
) -> tuple[Array, Aux]:
    """An activation or norm in training, where it has a form of its own for that, or outside."""
    if training and hasattr(layer, "train"):
        return layer.train(params, x, where)
    return layer.apply(params, x), Aux()
