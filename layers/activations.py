"""Activations: (params, x) -> x, elementwise or over the feature axis."""

import jax
import jax.numpy as jnp

from bestiary.kernels.dispatch import Impl
from bestiary.kernels.poly_norm import poly_norm
from bestiary.layers.base import Array, Layer, Param, Tree, constant, layer, positive, zeros
from bestiary.layers.sharding import pspec


@layer
class Relu(Layer):
    """max(x, 0)."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.relu(x)


@layer
class ReluSquared(Layer):
    """max(x, 0)^2 (So et al. 2021, Primer)."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jnp.square(jax.nn.relu(x))


@layer
class Gelu(Layer):
    """x Phi(x), exact (Hendrycks & Gimpel 2016)."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.gelu(x, approximate=False)


@layer
class GeluTanh(Layer):
    """The tanh approximation of GELU that GPT-2 and Gemma use."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.gelu(x, approximate=True)


@layer
class Silu(Layer):
    """x sigmoid(x)."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.silu(x)


@layer
class Sigmoid(Layer):
    """1 / (1 + exp(-x))."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.sigmoid(x)


@layer
class Tanh(Layer):
    """tanh(x)."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jnp.tanh(x)


@layer
class Softplus(Layer):
    """log(1 + exp(x))."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.softplus(x)


@layer
class LeakyRelu(Layer):
    """x where it is positive, else slope x (Maas et al. 2013)."""

    slope: float = 0.01

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.leaky_relu(x, self.slope)


@layer
class Elu(Layer):
    """x where it is positive, else exp(x) - 1 (Clevert et al. 2015)."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.elu(x)


@layer
class Selu(Layer):
    """ELU, scaled so that it keeps mean 0 and variance 1 (Klambauer et al. 2017)."""

    def apply(self, params: Tree, x: Array) -> Array:
        del params
        return jax.nn.selu(x)


@layer
class PolyReLU(Layer):
    """sum_p a_p relu(x)^p + b (Zhuo et al. 2024, arXiv 2411.03884).

    `weight` holds the highest power first, as in the released code.
    """

    order: int = 3

    def __post_init__(self) -> None:
        positive(order=self.order)

    def spec(self) -> Tree:
        return _polynomial(self.order)

    def apply(self, params: Tree, x: Array) -> Array:
        r = jax.nn.relu(x).astype(jnp.float32)
        return jnp.polyval(jnp.append(params["weight"], params["bias"]), r).astype(x.dtype)


@layer
class PolyNorm(Layer):
    """sum_p a_p x^p / rms(x^p) + b over the features (Zhuo et al. 2024, arXiv 2411.03884, eq. 4).

    `weight` holds the highest power first, as in the released code.
    """

    order: int = 3
    eps: float = 1e-6
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        positive(order=self.order)

    def spec(self) -> Tree:
        return _polynomial(self.order)

    def apply(self, params: Tree, x: Array) -> Array:
        spec = pspec("batch", "seq", "mlp") if x.ndim == 3 else None
        weight, bias = params["weight"], params["bias"]
        return poly_norm(x, weight, bias, eps=self.eps, spec=spec, impl=self.impl)


def _polynomial(order: int) -> Tree:
    return {"weight": Param((order,), (None,), constant(1 / order)), "bias": Param((), (), zeros)}
