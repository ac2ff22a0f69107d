"""The group rational activation of GR-KAN (Yang & Wang 2024, Kolmogorov-Arnold Transformer, arXiv
2409.10594)."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.kernels.dispatch import by_platform
from bestiary.layers.base import Array, Initializer, Layer, Param, Tree, layer, positive

Start = Literal["identity", "swish", "gelu", "gelu_old"]

# a_0..a_5 and b_1..b_4. Errors are the largest on [-3, 3], "gelu" on [-4, 4].
COEFFICIENTS: dict[Start, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "identity": ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    # as released: 1.9e-6
    "swish": (
        (3.0549e-7, 0.50000079, 0.24999783, 0.05326628, 0.00580303, 0.00027520),
        (-4.112e-6, 0.10652899, -1.269e-6, 0.00055023),
    ),
    # fitted for this denominator, by least squares: 0.0024. The released "gelu" was fitted for
    # 1 + |b_1 x + ...|, and is off by 1.46 under the one it runs with.
    "gelu": (
        (-2.2935269e-3, 0.49926732, 0.41301070, 0.11421399, 0.010891863, 9.3608149e-5),
        (0.0, 0.22615913, 1.2767912e-3, 0.0),
    ),
    # as released: 0.0041, but 0.22 on [-5, 5]
    "gelu_old": (
        (-0.00124236, 0.50804971, 0.41586363, 0.13022719, 0.02435590, 0.00290284),
        (-0.06675016, 0.17927646, 0.03746683, 1.656e-10),
    ),
}


@layer
class GroupRational(Layer):
    """F(x) = P(x) / Q(x), learned: [..., features] -> the same.

    P = sum_i a_i x^i to i = 5, one for all features; Q = 1 + sum_i |b_i| |x|^i to i = 4, one for
    each of `groups` equal runs of features. Computed in float32.

    Raises ValueError unless the groups divide the features, and for an unknown start.
    """

    groups: int = 8
    start: Start = "swish"
    """What F is at first, as nearly as it can be; "gelu_old" stands in older checkpoints."""

    def __post_init__(self) -> None:
        positive(groups=self.groups)
        if self.start not in COEFFICIENTS:
            known = ", ".join(get_args(Start))
            raise ValueError(f"start: {self.start!r}; need one of {known}")

    def spec(self) -> Tree:
        a, b = COEFFICIENTS[self.start]
        return {
            "numerator": Param((len(a),), (None,), _rows_of(a)),
            "denominator": Param((self.groups, len(b)), (None, None), _rows_of(b)),
        }

    def apply(self, params: Tree, x: Array) -> Array:
        b = params["denominator"]
        a = jnp.broadcast_to(params["numerator"], (len(b), *params["numerator"].shape))
        return group_rational(x, a, b)


def _rows_of(values: tuple[float, ...]) -> Initializer:
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(values, dtype), shape)


def group_rational(x: Array, a: Array, b: Array) -> Array:
    """F(x) = sum_i a_i x^i / (1 + sum_i |b_i| |x|^i), the sums from 0 and from 1.

    x [..., features] of any float type; a [groups, degree + 1] and b [groups, degree], of a run of
    features each. Absolute values have slope 1 at 0, so that a b of 0 learns. Finite to |x| = 1e7.

    Raises ValueError unless the groups divide the features.
    """
    if x.shape[-1] % len(b):
        raise ValueError(f"groups: {len(b)}; need a divisor of the features {x.shape[-1]}")
    return _group_rational(x, a, b)


@jax.custom_vjp
def _group_rational(x: Array, a: Array, b: Array) -> Array:
    over, under = _by_feature(x, a), _by_feature(x, jnp.abs(b))
    wide, size = x.astype(jnp.float32), jnp.abs(x.astype(jnp.float32))
    return (_polynomial(over, wide) / _polynomial([1.0, *under], size)).astype(x.dtype)


def _forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    return _group_rational(x, a, b), (x, a, b)


def _backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    """CPUs take few rows at a time, since a sum over all would be a pass of its own for every
    coefficient; over several devices rows are sharded, and the sums are left to the partitioner."""
    x, a, b = saved
    at_once, in_blocks = _gradients, _gradients_by_block
    if jax.sharding.get_abstract_mesh().size <= 1:
        at_once = by_platform(in_blocks, {"tpu": at_once, "gpu": at_once})
    dx, *moments = at_once(x, a, b, dy)
    da, db = (m.reshape(len(m), len(b), -1).sum(-1).T for m in moments)
    return dx, da.astype(a.dtype), (db * _sign(b)).astype(b.dtype)


_group_rational.defvjp(_forward, _backward)


def _gradients(x: Array, a: Array, b: Array, dy: Array) -> tuple[Array, ...]:
    """dx, and by feature, summed over the rows, dF/da [degree + 1, features] and dF/d|b|."""
    dx, terms = _terms(x, _by_feature(x, a), _by_feature(x, jnp.abs(b)), dy)
    rows = tuple(range(x.ndim - 1))
    da, db = (jnp.stack([t.sum(rows) for t in part]) for part in terms)
    return dx, da, db


def _gradients_by_block(x: Array, a: Array, b: Array, dy: Array) -> tuple[Array, ...]:
    """The same, block of rows by block: the terms are added up elementwise to one block of sums,
    in the same loop that computes them."""
    features, rows = x.shape[-1], math.prod(x.shape[:-1])
    block = math.gcd(rows, 1 << (_BLOCK // features).bit_length())
    over, under = _by_feature(x, a), _by_feature(x, jnp.abs(b))

    def step(sums: Any, rows: Any) -> Any:
        dx, terms = _terms(rows[0], over, under, rows[1])
        return jax.tree.map(jnp.add, sums, terms), dx

    zeros = jax.tree.map(lambda c: jnp.zeros((block, features)), (over, under))
    blocks = [z.reshape(-1, block, features) for z in (x, dy)]
    sums, dx = jax.lax.scan(step, zeros, blocks)
    da, db = (jnp.stack([t.sum(0) for t in part]) for part in sums)
    return dx.reshape(x.shape), da, db


_BLOCK = 4096  # numbers


def _terms(
    x: Array, a: list[Array], b: list[Array], dy: Array
) -> tuple[Array, tuple[list[Array], list[Array]]]:
    """dx = dy (P' - F Q') / Q, and what every number adds to the gradients of a_i, by x^i / Q, and
    of |b_i|, by -F |x|^i / Q; `b` holds absolute values."""
    wide, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    size = jnp.abs(wide)
    p, slope = _value_and_slope(a, wide)
    q, steepness = _value_and_slope([1.0, *b], size)
    inverse = 1 / q
    u = dy * inverse
    w = u * p * inverse
    dx = (u * slope - w * _sign(wide) * steepness).astype(x.dtype)
    return dx, (_powers(u, wide, len(a)), _powers(-w * size, size, len(b)))


def _by_feature(x: Array, coefficients: Array) -> list[Array]:
    """[groups, n] as n float32 arrays [features]."""
    width = x.shape[-1] // len(coefficients)
    return list(jnp.repeat(coefficients.astype(jnp.float32).T, width, 1))


def _polynomial(coefficients: list[Any], x: Array) -> Array:
    """sum_i c_i x^i, by Horner's rule."""
    return _value_and_slope(coefficients, x)[0]


def _value_and_slope(coefficients: list[Any], x: Array) -> tuple[Array, Array]:
    """sum_i c_i x^i and sum_i i c_i x^(i-1), by Horner's rule."""
    y, slope = coefficients[-1], jnp.float32(0)
    for c in coefficients[-2::-1]:
        slope = slope * x + y
        y = y * x + c
    return y, slope


def _powers(first: Array, x: Array, n: int) -> list[Array]:
    """first, first x, ..., first x^(n-1)."""
    powers = [first]
    for _ in range(n - 1):
        powers.append(powers[-1] * x)
    return powers


def _sign(x: Array) -> Array:
    return jnp.where(x >= 0, 1.0, -1.0)
