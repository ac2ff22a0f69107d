"""Normalisations over the last axis: float32 statistics, the result in the type of x."""

from typing import Literal

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Layer, Param, Tree, constant, layer, ones, positive, zeros
from bestiary.layers.linear import scaled


@layer
class RMSNorm(Layer):
    """Root-mean-square norm (Zhang & Sennrich 2019), with both published gain conventions.

    gain "scale" (Llama): y = w * cast(x * rsqrt(mean(x^2) + eps)), w starts at 1.
    gain "offset" (Gemma): y = cast(x * rsqrt(mean(x^2) + eps) * (1 + w)), w starts at 0.
    """

    dim: int
    eps: float = 1e-6
    gain: Literal["scale", "offset"] = "scale"
    start: float = 1.0
    """The initial factor of the normalised x (depth-scaled norms start below 1)."""

    def __post_init__(self) -> None:
        positive(dim=self.dim)

    def spec(self) -> Tree:
        start = self.start - (self.gain == "offset")
        return {"weight": Param((self.dim,), (None,), constant(start))}

    def apply(self, params: Tree, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        w = params["weight"].astype(jnp.float32)
        if self.gain == "offset":
            return scaled(y, 1 + w).astype(x.dtype)
        return scaled(y.astype(x.dtype), w)


@layer
class LayerNorm(Layer):
    """Layer norm (Ba et al. 2016): (x - mean) * rsqrt(var + eps) * weight + bias."""

    dim: int
    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self) -> None:
        positive(dim=self.dim)

    def spec(self) -> Tree:
        spec = {"weight": Param((self.dim,), (None,), ones)}
        return spec | {"bias": Param((self.dim,), (None,), zeros)} if self.bias else spec

    def apply(self, params: Tree, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, -1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        y = scaled(y, params["weight"])
        return (y + params["bias"].astype(jnp.float32) if self.bias else y).astype(x.dtype)
