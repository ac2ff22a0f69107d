"""Clipped ReLUs, which stop the huge activations that bit flips in weights make."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Layer, Param, Tree, constant, layer, positive

Kind = Literal["zero", "saturate", "smooth"]


@layer
class Clipped(Layer):
    """A ReLU bounded by lambda, the parameter "bound"; NaN and infinities become 0.

    "zero": x where 0 <= x <= lambda, else 0 (FT-ClipAct: Hoang et al. 2020, arXiv 1912.00941).
    "saturate": min(max(x, 0), lambda) (Ranger: Chen et al. 2021).
    "smooth": max(0, x - x sigmoid(slope (x - lambda))), differentiable in lambda (FitAct; HyReLU of
    ProAct: Mousavi et al. 2024, arXiv 2406.06313).

    The released code lets NaN through, which compares false with every bound.
    """

    kind: Kind = "zero"
    neurons: int | None = None
    """Size of the last axis, each entry of which has a bound of its own; None: one for the
    layer."""
    slope: float = 20.0
    start: float = 6.0
    """The bound until a profile gives another (see `eval.clipping`)."""

    def __post_init__(self) -> None:
        positive(neurons=self.neurons)
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: {self.kind!r}; need one of {', '.join(get_args(Kind))}")
        if not self.slope > 0:
            raise ValueError(f"slope: {self.slope}; need more than 0")

    def spec(self) -> Tree:
        shape, axes = ((), ()) if self.neurons is None else ((self.neurons,), ("mlp",))
        return {"bound": Param(shape, axes, constant(self.start))}

    def apply(self, params: Tree, x: Array) -> Array:
        x, bound = finite(x), finite(params["bound"].astype(x.dtype))
        if self.kind == "zero":
            return jnp.where((x >= 0) & (x <= bound), x, 0)
        if self.kind == "saturate":
            return jnp.minimum(jax.nn.relu(x), bound)
        return jax.nn.relu(x - x * jax.nn.sigmoid(self.slope * (x - bound)))


def finite(x: Array) -> Array:
    """x with 0 for NaN and infinities."""
    return jnp.where(jnp.isfinite(x), x, 0)
