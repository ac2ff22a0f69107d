"""Bases of fast KANs beside splines: bumps, waves and rational functions.

Polynomials are in `kan_polynomials`, wavelets in `kan_wavelets`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import (
    Array,
    Initializer,
    Layer,
    Param,
    Tree,
    layer,
    normal,
    positive,
    uniform,
)
from bestiary.layers.kan_basis import Basis, EdgeAxes, GridBasis, centres, stack


@layer
class Bumps(GridBasis):
    """The base of bumps around `num_centres` points from low to high, in equal steps.

    Raises ValueError for fewer than 2 centres, or `low` not below `high`.
    """

    num_centres: int = 8
    low: float = -1.0
    high: float = 1.0
    norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_centres < 2:
            raise ValueError(f"num_centres: {self.num_centres}; need at least 2")
        if not self.low < self.high:
            raise ValueError(f"low: {self.low}; need less than high={self.high}")

    @property
    def size(self) -> int:
        return self.num_centres

    def domain(self, params: Tree) -> tuple[Any, Any]:
        del params
        return self.low, self.high

    def bump(self, d: Array) -> Array:
        """At a distance d from its centre."""
        raise NotImplementedError

    def functions(self, params: Tree, z: Array) -> Array:
        del params
        c = centres(self.low, self.high, self.num_centres)
        return stack(lambda j: self.bump(z - c[j]), self.size)


@layer
class RBF(Bumps):
    """FastKAN: exp(-(d / h)^2), h the step between centres (Li 2024, arXiv 2405.06721).
    Coefficients start normal with std 0.1."""

    low: float = -2.0
    high: float = 2.0

    def initial(self, inputs: int, outputs: int) -> Initializer:
        del inputs, outputs
        return normal(0.1)

    def bump(self, d: Array) -> Array:
        h = (self.high - self.low) / (self.num_centres - 1)
        return jnp.exp(-jnp.square(d / h))


@layer
class RSWAF(Bumps):
    """FasterKAN: 1 - tanh^2(d); the distance between centres is no factor, as in the released
    forward pass. Coefficients start Xavier-uniform."""

    low: float = -1.2
    high: float = 0.2

    def initial(self, inputs: int, outputs: int) -> Initializer:
        return uniform(math.sqrt(6 / (inputs * self.size + outputs)))

    def bump(self, d: Array) -> Array:
        return 1 - jnp.square(jnp.tanh(d))


@layer
class ReLUBasis(GridBasis):
    """ReLU-KAN: (r relu(z - s_j) relu(e_j - z))^2 with r = 4 G^2 / (k + 1)^2, G intervals of [0, 1]
    and order k (Qiu et al. 2024, arXiv 2406.02075).

    Starts s_j = (j - k) / G and ends e_j = s_j + (k + 1) / G, [size, inputs], are trained.
    Coefficients start uniform in +- 1 / sqrt(size inputs).
    """

    num_intervals: int = 5
    order: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_intervals=self.num_intervals, order=self.order)

    @property
    def size(self) -> int:
        return self.num_intervals + self.order

    @property
    def width(self) -> float:
        return (self.order + 1) / self.num_intervals

    def initial(self, inputs: int, outputs: int) -> Initializer:
        del outputs
        return uniform(1 / math.sqrt(self.size * inputs))

    def spec(self, inputs: int = 1, outputs: int = 1, axes: EdgeAxes = (None, None)) -> Tree:
        def from_(first: float) -> Param:
            def start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
                del key
                steps = jnp.arange(self.size, dtype=jnp.float32) / self.num_intervals
                return jnp.broadcast_to((first + steps)[:, None], shape).astype(dtype)

            return Param((self.size, inputs), (None, axes[0]), start)

        first = -self.order / self.num_intervals
        own = {"start": from_(first), "end": from_(first + self.width)}
        return super().spec(inputs, outputs, axes) | own

    def domain(self, params: Tree) -> tuple[Any, Any]:
        del params
        return 0.0, 1.0

    def functions(self, params: Tree, z: Array) -> Array:
        start, end = (params[name].astype(jnp.float32) for name in ("start", "end"))
        r = 4 / self.width**2

        def bump(j: Any) -> Array:
            return jnp.square(r * jax.nn.relu(z - start[j]) * jax.nn.relu(end[j] - z))

        return stack(bump, self.size)


@layer
class Fourier(Basis):
    """cos(m z), then sin(m z), for m = 1 ... `frequencies`. Coefficients start normal with std 1 /
    sqrt(inputs frequencies)."""

    frequencies: int = 5

    def __post_init__(self) -> None:
        positive(frequencies=self.frequencies)

    @property
    def size(self) -> int:
        return 2 * self.frequencies

    def initial(self, inputs: int, outputs: int) -> Initializer:
        del outputs
        return normal(1 / math.sqrt(inputs * self.frequencies))

    def functions(self, params: Tree, z: Array) -> Array:
        del params
        waves = [stack(lambda j, f=f: f((j + 1) * z), self.frequencies) for f in (jnp.cos, jnp.sin)]
        return jnp.concatenate(waves, -2)


@layer
class Sine(Basis):
    """ActNet: sin(w_j z + p_j) with trained frequencies and phases, less its mean and divided by
    its standard deviation under a standard normal z (Guilhoto & Perdikaris 2024, arXiv
    2410.01990)."""

    num: int = 5

    def __post_init__(self) -> None:
        positive(num=self.num)

    @property
    def size(self) -> int:
        return self.num

    def spec(self, inputs: int = 1, outputs: int = 1, axes: EdgeAxes = (None, None)) -> Tree:
        own = {
            "omega": Param((self.num,), (None,), normal(1)),
            "phase": Param((self.num,), (None,)),
        }
        return super().spec(inputs, outputs, axes) | own

    def functions(self, params: Tree, z: Array) -> Array:
        w, p = (params[name].astype(jnp.float32) for name in ("omega", "phase"))
        mean = jnp.exp(-jnp.square(w) / 2) * jnp.sin(p)
        square = (1 - jnp.exp(-2 * jnp.square(w)) * jnp.cos(2 * p)) / 2
        factor = jax.lax.rsqrt(square - jnp.square(mean) + 1e-6)
        return stack(lambda j: (jnp.sin(w[j] * z + p[j]) - mean[j]) * factor[j], self.size)


@layer
class Rational(Basis):
    """FR-KAN: one function R(z) + act(z) of each input, where R(z) = sum_p a_p z^p / (1 + |sum_q
    b_q z^q|) with both powers from 0 (Aghaei 2024, arXiv 2406.14495).

    Input i has the coefficients of group i mod `groups`: a [numerator, groups], b [denominator,
    groups], uniform in +- 1 / sqrt(groups). `residual` is act (None: none). The coefficients of the
    edges start uniform in +- 1 / sqrt(inputs). Such a KAN has no base branch of its own.
    """

    groups: int = 4
    numerator: int = 3
    denominator: int = 2
    residual: Layer | None = Silu()

    def __post_init__(self) -> None:
        positive(groups=self.groups, numerator=self.numerator, denominator=self.denominator)

    @property
    def size(self) -> int:
        return 1

    def why_numbered(self) -> str | None:
        return None if self.groups == 1 else f"groups {self.groups}; need 1"

    def initial(self, inputs: int, outputs: int) -> Initializer:
        del outputs
        return uniform(1 / math.sqrt(inputs))

    def spec(self, inputs: int = 1, outputs: int = 1, axes: EdgeAxes = (None, None)) -> Tree:
        start = uniform(1 / math.sqrt(self.groups))
        own: Tree = {
            name: Param((n, self.groups), (None, None), start)
            for name, n in (("numerator", self.numerator), ("denominator", self.denominator))
        }
        if self.residual is not None:
            own["residual"] = self.residual
        return super().spec(inputs, outputs, axes) | own

    def functions(self, params: Tree, z: Array) -> Array:
        group = jnp.arange(z.shape[-1]) % self.groups
        a, b = (params[n].astype(jnp.float32)[::-1, group] for n in ("numerator", "denominator"))
        y = jnp.polyval(a, z) / (1 + jnp.abs(jnp.polyval(b, z)))
        if self.residual is not None:
            y += self.residual.apply(params["residual"], z)
        return y[..., None, :]
