"""Merging of parameters: weighted sums, WSM's weights (Tian et al. 2025, arXiv 2507.17634), SLERP,
TIES (Yadav et al. 2023, arXiv 2306.01708) and DARE (Yu et al. 2023, arXiv 2311.03099).

All is computed in float32. What is not a float (a count, a permutation) is taken, not merged.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Param, Tree, is_param

Decay = Literal["mean", "linear", "cosine", "inverse_sqrt", "exponential"]
Sign = Literal["total", "frequency"]

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "inverse_sqrt": lambda x: 1 - math.sqrt(x),
    "exponential": lambda x: 0.1**x,
}


def update_weights(decay: Decay, steps: Sequence[int]) -> list[float]:
    """w_1 ... w_k: what a decay of this shape leaves of each of the k blocks of updates between the
    k + 1 `steps`.

    The decay begins at the first step and ends at the last; the middle of a block stands for it.
    "mean" is the linear decay that comes out as equal weights of all checkpoints.
    """
    k, start, length = len(steps) - 1, steps[0], steps[-1] - steps[0]
    if decay == "mean":
        return [1 - j / (k + 1) for j in range(1, k + 1)]
    middles = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    return [_SHAPES[decay]((middle - start) / length) for middle in middles]


def checkpoint_weights(w: Sequence[float]) -> list[float]:
    """c_0 ... c_k with theta_0 + sum_j w_j (theta_j - theta_{j-1}) = sum_j c_j theta_j.

    c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k; together 1. Raises ValueError unless
    1 >= w_1 >= ... >= w_k >= 0.
    """
    bounded = [1.0, *w, 0.0]
    c = [a - b for a, b in zip(bounded, bounded[1:], strict=False)]
    if not all(x >= 0 for x in c):
        raise ValueError(f"w: {list(w)}; need weights that fall from at most 1 to at least 0")
    return c


def weighted_sum(trees: Iterable[Tree], weights: Sequence[float]) -> Tree:
    """sum_i w_i tree_i, one tree in memory at a time; each leaf keeps its type, and is that of the
    last tree when it is not a float."""

    @partial(jax.jit, donate_argnums=0)
    def add(total: Tree, tree: Tree, weight: Array) -> Tree:
        def one(t: Array, x: Array) -> Array:
            return t + weight * x if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(one, total, tree)

    def wide(x: Array) -> Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.zeros(x.shape, jnp.float32 if floating else x.dtype)

    total = dtypes = None
    for tree, weight in zip(trees, weights, strict=True):
        if total is None:
            total, dtypes = jax.tree.map(wide, tree), jax.tree.map(lambda x: x.dtype, tree)
        total = add(total, tree, jnp.float32(weight))
    return jax.tree.map(lambda x, dtype: x.astype(dtype), total, dtypes)


def slerp(a: Array, b: Array, t: float, *, parallel: float = 0.9995, eps: float = 1e-8) -> Array:
    """Spherical interpolation of two tensors as vectors: a at t = 0, b at t = 1 (Shoemake 1985).

    The angle is that of the unit vectors, the tensors keep their lengths. Linear where the angle's
    cosine is beyond `parallel`; a vector no longer than `eps` is not brought to unit length.
    """

    def unit(x: Array) -> Array:
        norm = jnp.linalg.norm(x.ravel())
        return x / jnp.where(norm > eps, norm, 1)

    cosine = jnp.clip(jnp.vdot(unit(a), unit(b)), -1, 1)
    linear = jnp.abs(cosine) > parallel
    angle = jnp.where(linear, 1, jnp.arccos(cosine))
    left = jnp.where(linear, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    right = jnp.where(linear, t, jnp.sin(t * angle) / jnp.sin(angle))
    return left * a + right * b


def trim(delta: Array, density: float) -> Array:
    """The share `density` of the entries that are largest by magnitude, at least one; else 0."""
    kept = jax.lax.top_k(jnp.abs(delta).ravel(), max(1, int(density * delta.size)))[1]
    return jnp.where(jnp.zeros(delta.size, bool).at[kept].set(True).reshape(delta.shape), delta, 0)


def drop(delta: Array, keep: Array, density: float) -> Array:
    """The entries to `keep`, scaled by 1 / density so that their sum stays the same in the mean."""
    return jnp.where(keep, delta, 0) / density


def agree(
    deltas: Array,
    weights: Array,
    sign: Sign = "total",
    *,
    sign_weighted: bool = False,
    normalize: bool = False,
) -> Array:
    """Elects a sign for every entry and averages the weighted deltas [n, ...] that have it.

    The larger sum ("total") or number ("frequency") of the deltas elects, + on a tie. PEFT's form
    lets them vote unweighted and divides by their number; `sign_weighted` and `normalize` (division
    by the sum of their weights) are mergekit's.
    """
    weighted = deltas * weights.reshape(-1, *[1] * (deltas.ndim - 1))
    voters = weighted if sign_weighted else deltas
    votes = voters if sign == "total" else jnp.sign(voters)
    elected = jnp.where(votes.sum(0) >= 0, 1, -1)
    agreeing = jnp.sign(voters) == elected
    each = weights if normalize else jnp.ones_like(weights)
    count = jnp.tensordot(each, agreeing.astype(jnp.float32), 1)
    return jnp.where(agreeing, weighted, 0).sum(0) / jnp.where(count == 0, 1, count)


def merge_trees(
    declared: Tree, trees: Sequence[Tree], merge: Callable[[list[Array], Array], Array]
) -> Tree:
    """`merge(tensors, key)` of every tensor, float32 [...] from each tree, with a key of its own.

    Every layer and expert of a stack is a tensor. The result has the declared types; what is not a
    float is that of the first tree.
    """

    def one(path: tuple, param: Param, *leaves: Array) -> Array:
        if not jnp.issubdtype(param.dtype, jnp.floating):
            return leaves[0]

        def tensor(xs: tuple[Array, list[Array]]) -> Array:
            key, tensors = xs
            return merge([x.astype(jnp.float32) for x in tensors], key).astype(param.dtype)

        copies = math.prod(param.shape[: param.batch_ndim])
        name = jax.tree_util.keystr(path)
        keys = jax.random.split(jax.random.key(zlib.crc32(name.encode())), copies)
        stacked = [x.reshape(copies, *param.shape[param.batch_ndim :]) for x in leaves]
        return jax.lax.map(tensor, (keys, stacked)).reshape(param.shape)

    return jax.tree_util.tree_map_with_path(one, declared, *trees, is_leaf=is_param)
