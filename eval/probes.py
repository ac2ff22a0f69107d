"""Probes of feed-forwards: they see the hidden activations, measure them or leave some out.

A probe is a pytree that lies beside a feed-forward's parameters under "probe" and is called by
`layers.feedforward.down`: (h, gate, w, ctx) -> (h, metrics). h and gate are [batch, seq, hidden], w
is the last matrix [hidden, dim], in a mixture of experts `ChosenRows`; in a stack of layers the
probe's arrays have the leading axis `layers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bestiary.layers.base import Array, Context, Param, Tree, is_param
from bestiary.layers.probed import ChosenRows

Rows = Array | ChosenRows

CANDIDATES = 65536
"""How many thresholds are tried in each layer."""
_CHUNK = 2**22  # entries of the partial sums that exist at a time


def feedforwards(declared: Tree, path: str = "") -> dict[str, Param]:
    """The last matrices [..., hidden, dim] of feed-forwards, by the path of what holds them.

    A declared matrix is one when it sums over the axis "mlp"; experts are one feed-forward.
    """
    found = {}
    for name, child in declared.items():
        if not is_param(child):
            found |= feedforwards(child, f"{path}/{name}" if path else name)
        elif child.inputs == 1 and child.axes[-2] == "mlp":
            found[path] = child
    return found


def with_probes(params: Tree, probes: Mapping[str, Any], path: str = "") -> Tree:
    """`params` with the probe of each path beside what is there."""
    if not isinstance(params, dict):
        return params
    children = {
        name: with_probes(child, probes, f"{path}/{name}" if path else name)
        for name, child in params.items()
    }
    return children | {"probe": probes[path]} if path in probes else children


def norms(w: Rows) -> Array:
    """||w_i|| of the rows of a last matrix, float32 [hidden], or [batch, seq, hidden] of those that
    each token uses."""
    if isinstance(w, ChosenRows):
        return norms(w.rows)[w.units]
    return jnp.linalg.norm(w.astype(jnp.float32), axis=-1)


def contributions(h: Array, w: Rows) -> Array:
    """||n_i|| = |a_i| ||w_i||: float32, shaped as the hidden activations [..., hidden]."""
    return jnp.abs(h.astype(jnp.float32)) * norms(w)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Keep:
    """Leaves out nothing: what is zero by itself is counted where only a probe lets it be seen."""

    def __call__(self, h: Array, gate: Array, w: Rows, ctx: Context) -> tuple[Array, Tree]:
        del gate, w, ctx
        return h, {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Survey:
    """Reports the smallest contribution |a_i| ||w_i||, every `stride`-th, and |gate| of those."""

    stride: int = field(metadata={"static": True})

    def __call__(self, h: Array, gate: Array, w: Rows, ctx: Context) -> tuple[Array, Tree]:
        sizes, gates = contributions(h, w), jnp.abs(gate.astype(jnp.float32))
        if ctx.segment_ids is not None:  # nan: padding
            real = ctx.segment_ids[..., None] > 0
            sizes, gates = jnp.where(real, sizes, jnp.nan), jnp.where(real, gates, jnp.nan)
        sample = slice(None, None, self.stride)
        return h, {
            "least": jnp.nanmin(sizes),
            "sizes": sizes.ravel()[sample],
            "gates": gates.ravel()[sample],
        }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Curve:
    """Reports "cett" [candidates], summed over tokens: the increments of CETT from one candidate to
    the next.

    Sorting a token's contributions gives its error at every threshold by one cumulative sum.
    """

    least: ArrayLike
    most: ArrayLike
    candidates: int = field(default=CANDIDATES, metadata={"static": True})

    def __call__(self, h: Array, gate: Array, w: Rows, ctx: Context) -> tuple[Array, Tree]:
        del gate
        every = jnp.broadcast_to(jnp.arange(h.shape[-1]), h.shape)
        rows, units = (w.rows, w.units) if isinstance(w, ChosenRows) else (w, every)
        length = jnp.subtract(self.most, self.least)
        step = jnp.maximum(length / (self.candidates - 1), 1e-30)  # 0 where all are alike

        def token(operands: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            a, sizes, units = operands
            order = jnp.argsort(sizes)
            parts = a[order, None].astype(jnp.float32) * rows[units[order]].astype(jnp.float32)
            error = jnp.linalg.norm(jnp.cumsum(parts, 0), axis=-1)
            error = error / jnp.where(error[-1] > 0, error[-1], 1)
            first = jnp.ceil((sizes[order] - self.least) / step)  # candidate that leaves it out
            return jnp.clip(first, 0, self.candidates), jnp.diff(error, prepend=0)

        tokens = [v.reshape(-1, h.shape[-1]) for v in (h, contributions(h, w), units)]
        together = max(1, _CHUNK // (h.shape[-1] * rows.shape[-1]))
        first, increments = jax.lax.map(token, tuple(tokens), batch_size=together)
        if ctx.segment_ids is not None:
            increments = jnp.where(ctx.segment_ids.reshape(-1, 1) > 0, increments, 0)
        sums = jnp.zeros(self.candidates).at[first.astype(jnp.int32)].add(increments, mode="drop")
        return h, {"cett": sums}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cett:
    """Leaves out the activations with |a_i| < threshold / ||w_i||."""

    threshold: ArrayLike

    def __call__(self, h: Array, gate: Array, w: Rows, ctx: Context) -> tuple[Array, Tree]:
        del gate, ctx
        return jnp.where(jnp.abs(h) < self.threshold / norms(w), 0, h), {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fat:
    """FAT-eps: leaves out the activations with |gate| < eps."""

    eps: ArrayLike

    def __call__(self, h: Array, gate: Array, w: Rows, ctx: Context) -> tuple[Array, Tree]:
        del w, ctx
        return jnp.where(jnp.abs(gate) < self.eps, 0, h), {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """Keeps the `share` of all activations of a layer, tokens together, with the largest |gate|."""

    share: float = field(metadata={"static": True})

    def __call__(self, h: Array, gate: Array, w: Rows, ctx: Context) -> tuple[Array, Tree]:
        del w, ctx
        sizes = jnp.abs(gate)
        left_out = min(int(sizes.size * (1 - self.share)), sizes.size - 1)
        least = jnp.sort(sizes.ravel())[left_out]
        return jnp.where(sizes < least, 0, h), {}
