"""Activations with learned shapes: (params, x) -> x, elementwise with parameters by channel."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Aux, Layer, Param, Tree, constant, layer, positive, zeros
from bestiary.layers.batch_norm import BatchNorm

Mixing = Literal["fixed", "learned"]


@layer
class PReLU(Layer):
    """max(x, 0) + alpha min(x, 0) (He et al. 2015): [..., dim], or any shape with one alpha."""

    dim: int | None = None
    """Channels, each with an alpha of its own; None: one alpha for all."""
    start: float = 0.25

    def __post_init__(self) -> None:
        positive(dim=self.dim)

    def spec(self) -> Tree:
        shape, axes = ((), ()) if self.dim is None else ((self.dim,), ("mlp",))
        return {"alpha": Param(shape, axes, constant(self.start))}

    def apply(self, params: Tree, x: Array) -> Array:
        return jnp.where(x > 0, x, params["alpha"].astype(x.dtype) * x)


@layer
class Dice(Layer):
    """p x + (1 - p) alpha x, p = sigmoid((x - mean) / sqrt(var + eps)) (Zhou et al. 2018, eq. 3):

    a PReLU whose turning point follows the data. [..., dim]; alpha starts at 0. `apply` takes the
    moving statistics, `train` those of the batch (see `batch_norm`): a program that calls `apply`
    alone leaves them at 0 and 1. With an affine norm as in DeepCTR.
    """

    dim: int
    eps: float = 1e-8
    momentum: float = 0.1
    affine: bool = False

    def __post_init__(self) -> None:
        self.norm  # noqa: B018  refuses what it cannot be

    @property
    def norm(self) -> BatchNorm:
        return BatchNorm(dim=self.dim, eps=self.eps, momentum=self.momentum, affine=self.affine)

    def spec(self) -> Tree:
        return {"norm": self.norm, "alpha": Param((self.dim,), ("mlp",), zeros)}

    def apply(self, params: Tree, x: Array) -> Array:
        return self.mix(params, x, self.norm.apply(params["norm"], x))

    def train(self, params: Tree, x: Array, where: Array | None = None) -> tuple[Array, Aux]:
        """`where`, bool [..., 1]: which rows the statistics count."""
        z, aux = self.norm.train(params["norm"], x, where)
        return self.mix(params, x, z), Aux.join(norm=aux)

    def mix(self, params: Tree, x: Array, z: Array) -> Array:
        p = jax.nn.sigmoid(z)
        return p * x + (1 - p) * params["alpha"].astype(x.dtype) * x


@layer
class Interpolated(Layer):
    """alpha first(x) + (1 - alpha) second(x) (Balcan et al. 2025, arXiv 2501.13734).

    alpha is a fixed entry of the parameters, over which a program may map (see `train.tuning`), or
    the sigmoid of a learned one.
    """

    first: Layer
    second: Layer
    alpha: float = 0.5
    kind: Mixing = "fixed"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Mixing):
            raise ValueError(f"kind: {self.kind!r}; need one of {', '.join(get_args(Mixing))}")
        inside = 0 < self.alpha < 1 if self.kind == "learned" else 0 <= self.alpha <= 1
        if not inside:
            ends = "between 0 and 1, without both" if self.kind == "learned" else "0 to 1"
            raise ValueError(f"alpha: {self.alpha}; need {ends} where it is {self.kind}")

    def spec(self) -> Tree:
        spec: Tree = {"first": self.first, "second": self.second}
        if self.kind == "fixed":
            return spec | {"alpha": Param((), (), constant(self.alpha), trainable=False)}
        logit = math.log(self.alpha / (1 - self.alpha))
        return spec | {"logit": Param((), (), constant(logit))}

    def apply(self, params: Tree, x: Array) -> Array:
        alpha = params["alpha"] if self.kind == "fixed" else jax.nn.sigmoid(params["logit"])
        alpha = alpha.astype(x.dtype)
        first = self.first.apply(params["first"], x)
        return alpha * first + (1 - alpha) * self.second.apply(params["second"], x)
