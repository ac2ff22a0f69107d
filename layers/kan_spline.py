"""B-splines (de Boor 1978), the basis of the original KAN (Liu et al. 2024, arXiv 2404.19756)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Initializer, Param, Tree, layer, positive
from bestiary.layers.kan_basis import UNROLLED, EdgeAxes, GridBasis, centres, stack


@layer
class BSpline(GridBasis):
    """The `num_intervals` + `order` B-splines of an order on a grid from `low` to `high`.

    The grid goes on by `order` knots beyond both ends, where the functions die out, and comes
    half-open intervals. Equal intervals need no parameters. With `adaptive`, every input has knots
    [num_intervals + 2 order + 1, inputs] of its own, float32 and not trained, that `update_grid`
    moves. Coefficients start as the least-squares fit of noise, uniform in +- noise / (2
    num_intervals), at the knots from `low` to `high` (pykan: noise 0.5 in a layer and 0.3 in a
    network; efficient-kan: 0.1).

    Raises ValueError for fewer intervals than 1, an order below 0, or `low` not below `high`.
    """

    num_intervals: int = 5
    order: int = 3
    low: float = -1.0
    high: float = 1.0
    adaptive: bool = False
    noise: float = 0.1
    unroll: bool = True
    """Trace equal steps one by one. False: as one array, which runs slower, but second derivatives
    of it compile several times as fast."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_intervals=self.num_intervals)
        if self.order < 0:
            raise ValueError(f"order: {self.order}; need at least 0")
        if not self.low < self.high:
            raise ValueError(f"low: {self.low}; need less than high, {self.high}")

    @property
    def size(self) -> int:
        return self.num_intervals + self.order

    @property
    def step(self) -> float:
        return (self.high - self.low) / self.num_intervals

    def spec(self, inputs: int = 1, outputs: int = 1, axes: EdgeAxes = (None, None)) -> Tree:
        spec = super().spec(inputs, outputs, axes)
        if self.adaptive:

            def start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
                del key
                return jnp.broadcast_to(self.knots()[:, None], shape).astype(dtype)

            shape = (self.num_intervals + 2 * self.order + 1, inputs)
            spec["knots"] = Param(shape, (None, None), start, trainable=False)
        return spec

    def knots(self) -> Array:
        """In equal steps, beyond both ends too: float32 [num_intervals + 2 order + 1]."""
        more = self.order * self.step
        return centres(self.low - more, self.high + more, self.num_intervals + 2 * self.order + 1)

    def initial(self, inputs: int, outputs: int) -> Initializer:
        def fit(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            grid = centres(self.low, self.high, self.num_intervals + 1)
            bound = self.noise / (2 * self.num_intervals)
            noise = jax.random.uniform(key, (len(grid), *shape[1:]), dtype, -bound, bound)
            values = self.equal_steps(grid)  # [size, points]
            return jnp.einsum("ps,pio->sio", jnp.linalg.pinv(values), noise)

        del inputs, outputs
        return fit

    def domain(self, params: Tree) -> tuple[Any, Any]:
        if not self.adaptive:
            return self.low, self.high
        knots = params["knots"]
        return knots[self.order], knots[self.order + self.num_intervals]

    def functions(self, params: Tree, z: Array) -> Array:
        if not self.adaptive:
            return self.equal_steps(z)
        knots = jax.lax.stop_gradient(params["knots"]).astype(jnp.float32)
        if self.size <= UNROLLED:
            return jnp.stack(b_splines(z, list(knots), self.order), -2)

        def one(j: Any) -> Array:
            return b_splines(z, [knots[j + m] for m in range(self.order + 2)], self.order)[0]

        return stack(one, self.size)

    def equal_steps(self, z: Array) -> Array:
        u = (z - self.low) / self.step
        middle = (1 - self.order) / 2  # of the support of function 0
        if not self.unroll:
            j = jnp.arange(self.size, dtype=u.dtype)[:, None]
            return cardinal(u[..., None, :] - (j + middle), self.order)
        return stack(lambda j: cardinal(u - (j + middle), self.order), self.size)


def cardinal(v: Array, order: int) -> Array:
    """The B-spline whose knots are 1 apart, around 0: 1/k! sum_m (-1)^m C(k+1, m) (r - m)_+^k with
    r = (k + 1) / 2 - |v|, the distance from the nearer end of the support (Schoenberg 1946)."""
    if order == 0:
        return ((v >= -0.5) & (v < 0.5)).astype(v.dtype)
    r, total = (order + 1) / 2 - jnp.abs(v), jnp.zeros_like(v)
    for m in range(order // 2 + 1):
        total += (-1) ** m * math.comb(order + 1, m) * jnp.maximum(r - m, 0) ** order
    return total / math.factorial(order)


def b_splines(z: Array, knots: list[Array], order: int) -> list[Array]:
    """The len(knots) - order - 1 B-splines between `knots`, by the recursion of Cox and de Boor; a
    term without support is 0."""
    reached = [(z >= t).astype(z.dtype) for t in knots]
    values = [a - b for a, b in zip(reached[:-1], reached[1:], strict=True)]
    for p in range(1, order + 1):
        slopes = [reciprocal(knots[j + p] - knots[j]) for j in range(len(knots) - p)]
        values = [
            (z - knots[j]) * slopes[j] * values[j]
            + (knots[j + p + 1] - z) * slopes[j + 1] * values[j + 1]
            for j in range(len(values) - 1)
        ]
    return values


def reciprocal(width: Array) -> Array:
    return jnp.where(width > 0, 1 / jnp.where(width > 0, width, 1), 0)
