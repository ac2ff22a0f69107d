"""Performer (Choromanski et al. 2020, arXiv 2009.14794): softmax attention by positive orthogonal
random features, FAVOR+.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.layers import linear_attention as linear
from bestiary.layers.attention import HEADS
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Tree,
    constant,
    layer,
    positive,
    weight,
)
from bestiary.layers.causal_conv import Places, recurrent, recurrent_spec
from bestiary.layers.linear import project
from bestiary.layers.rope import Rope

NONE = -1e30  # the largest exponent of no keys: finite, so that differences are
FLOOR = 1e-30  # of sums of weights: a query that no feature joins to any key gets 0


@layer
class Performer(Layer):
    """Causal attention [batch, seq, dim] -> the same, whose weights exp(q k / sqrt(head_dim)) are
    estimated without bias by phi(q) phi(k), phi(x) = exp(w x - |x|^2 / 2) / sqrt(num_features).

    Its trained parameters are those of a multi-head `Attention`. The features' directions w are
    drawn once, orthogonal to each other, and not trained. The cache is constant in length: per head
    the keys' sums, and their largest exponent. Raises ValueError when `chunk` is not a power of two
    or the rotated width is odd.
    """

    dim: int
    num_heads: int
    head_dim: int
    num_features: int = 256
    """The estimate's variance falls as 1 / num_features; the paper likes head_dim log(head_dim)."""
    rope: Rope | None = Rope()
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""
    chunk: int = 64
    """Tokens of one step; any gives the same result."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_heads=self.num_heads, head_dim=self.head_dim)
        positive(num_features=self.num_features)
        linear.power_of_two(self.chunk)
        if self.rope:
            self.rope.frequencies(self.head_dim)  # refuses an odd width

    def spec(self) -> Tree:
        shape, axes = (self.dim, self.num_heads, self.head_dim), ("embed", "heads", "head")
        features = (self.num_heads, self.head_dim, self.num_features)
        return {
            **{name: weight(shape, axes) for name in ("query", "key", "value")},
            "features": Param(features, ("heads", "head", None), orthogonal, trainable=False),
            "out": weight(
                (*shape[1:], self.dim), axes[1:] + axes[:1], inputs=2, gain=self.out_gain
            ),
        }

    def cost(self, length: int) -> Cost:
        """Adds the features of queries and keys, and the recurrence in chunks."""
        features = 4 * self.head_dim * self.num_features
        sums = linear.cost(length, self.num_features, self.head_dim + 1, self.chunk)
        return super().cost(length) + (sums + Cost(features, features)) * self.num_heads

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        del length, dtype
        sums = (batch, self.num_heads, self.num_features, self.head_dim + 1)
        peak = Param((batch, self.num_heads), ("batch", "heads"), constant(NONE))
        return recurrent_spec(batch, {"sums": Param(sums, linear.STATE), "peak": peak})

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        """With a cache, `ctx.positions` say where the tokens stand (negative: padding)."""
        positions = jnp.arange(x.shape[1])[None] if ctx.positions is None else ctx.positions
        q, k, v = (
            project("bsd,dnh->bsnh", x, params, name, out=HEADS)
            for name in ("query", "key", "value")
        )
        if self.rope:
            q, k = (self.rope.apply(u, positions) for u in (q, k))
        qkv = jnp.concatenate((q, k, v), -1)
        y, cache = recurrent(partial(self._mix, params["features"]), qkv, ctx, cache)
        return project("bsnh,nhd->bsd", y, params, "out"), cache, Aux()

    def _mix(self, w: Array, qkv: Array, places: Places, state: Tree) -> tuple[Array, Tree]:
        q, k, v = jnp.split(qkv, 3, -1)
        scale = self.head_dim**-0.25
        q, k = (exponents(scale * u.astype(jnp.float32), w) for u in (q, k))
        if state is None:
            state = {"sums": None, "peak": jnp.full(k.shape[::2], NONE)}
        # factors of a query cancel; those of keys must be one for all that it sees
        q = jnp.exp(q - jax.lax.stop_gradient(q.max(-1, keepdims=True)))
        highest = jax.lax.stop_gradient(k.max(-1))
        if places.real is not None:
            highest = jnp.where(places.real[..., None], highest, NONE)
        peaks, decay = _rescaling(highest, state["peak"], places.documents)
        k = places.of_real(jnp.exp(places.of_real(k - peaks[..., None])))
        y, sums = linear.linear_attention(
            q.astype(v.dtype),
            k.astype(v.dtype),
            jnp.concatenate((v, jnp.ones_like(v[..., :1])), -1),
            decay[..., None],
            state["sums"],
            places.documents,
            chunk=self.chunk,
        )
        weighted, total = y[..., :-1], jnp.maximum(y[..., -1:], FLOOR)
        scale = jax.lax.stop_gradient(1 / total)  # the gradient of a quotient squares what divides
        y = scale * weighted / (scale * total)
        return y.astype(v.dtype), {"sums": sums, "peak": peaks[:, -1]}


def exponents(x: Array, w: Array) -> Array:
    """w x - |x|^2 / 2: x [..., heads, head], w [heads, head, features] -> [..., heads, features].

    exp(q k) is the expectation of exp(exponents(q) + exponents(k)), whatever feature (lemma 1).
    """
    along = jnp.einsum("...nh,nhm->...nm", x, w, precision="highest")
    return along - jnp.square(x).sum(-1, keepdims=True) / 2


def orthogonal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Directions [..., head, features], normal each, at right angles in groups of `head`."""
    *batch, width, features = shape
    frames, lengths = jax.random.split(key)
    groups = -(-features // width)
    square = jax.random.normal(frames, (*batch, groups, width, width))
    frame, triangle = jnp.linalg.qr(square)
    # without the signs, a frame would not be uniformly distributed
    frame *= jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]
    directions = jnp.moveaxis(frame, -3, -2).reshape(*batch, width, groups * width)
    length = jnp.linalg.norm(jax.random.normal(lengths, shape), axis=-2, keepdims=True)
    return (directions[..., :features] * length).astype(dtype)


def _rescaling(highest: Array, before: Array, documents: Array) -> tuple[Array, Array]:
    """Of every key's largest exponent [batch, seq, heads]: the largest so far in its document, and
    the logarithm of what that makes of sums scaled by the one before.

    `before` [batch, heads] belongs to document 0.
    """
    number = documents[..., None]

    def join(a: tuple, b: tuple) -> tuple:
        return b[0], jnp.where(a[0] == b[0], jnp.maximum(a[1], b[1]), b[1])

    first, rest = jnp.zeros_like(number[:, :1]), before[:, None]
    number = jnp.concatenate((first, number), 1)
    highest = jnp.concatenate((rest, highest), 1)
    _, peaks = jax.lax.associative_scan(join, (number, highest), axis=1)
    same = number[:, 1:] == number[:, :-1]
    return peaks[:, 1:], jnp.where(same, peaks[:, :-1] - peaks[:, 1:], 0)
