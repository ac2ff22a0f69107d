"""Affine maps and token embeddings."""

from typing import Any

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Cost, Layer, Param, Tree, layer, normal, positive, weight
from bestiary.layers.sharding import dot, take


def project(
    equation: str,
    x: Array,
    params: Tree,
    name: str,
    *,
    out: tuple[str | None, ...] | None = None,
) -> Array:
    """`dot` with params[name], plus params[name + "_bias"] where the layer declares one."""
    y, bias = dot(equation, x, params[name], out=out), params.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(y.dtype)


@jax.custom_jvp
def scaled(x: Array, gain: Array) -> Array:
    """x [..., dim] times gain [dim], in the type of x.

    The gradient of the gain is one sum over all axes in front. jax.numpy's own leaves out those of
    length 1, and XLA's CPU code sums [1, seq, dim] over seq alone up to sixty times as slowly.
    """
    return x * gain.astype(x.dtype)


@scaled.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, gain), (dx, d_gain) = primals, tangents
    d_gain = jnp.broadcast_to(d_gain.astype(x.dtype), x.shape)
    return scaled(x, gain), dx * gain.astype(x.dtype) + x * d_gain


@layer
class Linear(Layer):
    """y = x W + b: [..., inputs] -> [..., outputs].

    Weight [inputs, outputs], normal with std gain / sqrt(inputs); `axes` are the logical names of
    its two dimensions.
    """

    inputs: int
    outputs: int
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    bias: bool = False
    gain: float = 1.0

    def __post_init__(self) -> None:
        positive(inputs=self.inputs, outputs=self.outputs)

    def spec(self) -> Tree:
        spec = {"weight": weight((self.inputs, self.outputs), self.axes, gain=self.gain)}
        if self.bias:
            spec["bias"] = Param((self.outputs,), self.axes[1:])
        return spec

    def apply(self, params: Tree, x: Array, dtype: Any = None) -> Array:
        """The result is of `dtype`, by default that of x."""
        y = dot("...i,io->...o", x, params["weight"], dtype=dtype)
        return y + params["bias"].astype(y.dtype) if self.bias else y


@layer
class Embedding(Layer):
    """Token embedding [vocab_size, dim]; the same table serves as a tied output head.

    `scale` multiplies the looked-up rows (Gemma: sqrt(dim), rounded to the compute type).
    """

    vocab_size: int
    dim: int
    scale: float = 1.0
    std: float = 0.02

    def __post_init__(self) -> None:
        positive(vocab_size=self.vocab_size, dim=self.dim)

    def spec(self) -> Tree:
        return {"table": Param((self.vocab_size, self.dim), ("vocab", "embed"), normal(self.std))}

    def cost(self, length: int) -> Cost:
        """A look-up multiplies nothing and reads one row."""
        del length
        table = self.spec()["table"]
        row = table.nbytes / self.vocab_size
        return Cost(0, 0, row, row)

    def head_cost(self) -> Cost:
        """Cost per token of `logits`, the tied head."""
        table = self.spec()["table"]
        return Cost(2 * table.size, 2 * table.size, table.nbytes, table.nbytes)

    def apply(self, params: Tree, ids: Array, dtype: str = "float32") -> Array:
        """Int ids [...] -> [..., dim] in `dtype`; ids outside the vocabulary take the nearest
        row."""
        x = take(params["table"], ids, dtype)
        return x if self.scale == 1.0 else x * jnp.asarray(self.scale, dtype)

    def logits(self, params: Tree, x: Array) -> Array:
        """[..., dim] -> float32 [..., vocab_size] with the transposed table."""
        return dot("...d,vd->...v", x, params["table"], dtype=jnp.float32)
