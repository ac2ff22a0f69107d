"""Which keys of a cache are worth keeping: scores, and the sets that they keep.

Scores are [batch, kv_heads, S] float32, larger is better. Those that follow attention read
`weights` [batch, kv_heads, heads / kv_heads, T, S], how the T newest queries weigh the S keys (as
`kernels.attention.weights` returns), and average over the query heads of a key-value head. Keys are
[batch, S, kv_heads, head].
"""

from typing import Literal

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array

Pooling = Literal["avg", "max"]


def keep(scores: Array, kept: int) -> Array:
    """The `kept` best of scores [..., S], in the order of the keys: int32 [..., kept]."""
    return jnp.sort(jax.lax.top_k(scores, kept)[1], -1)


def best(scores: Array, real: Array, kept: int) -> Array:
    """As `keep`, of the real keys first."""
    return keep(jnp.where(real, scores, -jnp.inf), kept)


def forced(scores: Array, before: int = 0, after: int = 0) -> Array:
    """Puts places in front of and behind all scores [..., S], which beat every one of them."""
    pad = ((0, 0),) * (scores.ndim - 1) + ((before, after),)
    return jnp.pad(scores, pad, constant_values=scores.max() + 1)


def pool(scores: Array, kernel: int, pooling: Pooling = "avg") -> Array:
    """Mean or maximum of the `kernel` (odd) scores around each of [..., S]; zeros beyond the ends
    count."""
    window, ones = (1,) * (scores.ndim - 1) + (kernel,), (1,) * scores.ndim
    pad = ((0, 0),) * (scores.ndim - 1) + ((kernel // 2, kernel // 2),)
    if pooling == "max":  # of what attention gives, which is never below the zeros
        return jax.lax.reduce_window(scores, 0.0, jax.lax.max, window, ones, pad)
    return jax.lax.reduce_window(scores, 0.0, jax.lax.add, window, ones, pad) / kernel


def snap(received: Array, kernel: int = 5, pooling: Pooling = "avg") -> Array:
    """SnapKV (Li et al. 2024, arXiv 2404.14469): what the keys before the window received from the
    queries in it, pooled over neighbours.

    `received` [..., S] sums or averages the window's queries; of one query head, as in the paper,
    or of the mean over the heads that share a key.
    """
    return pool(received, kernel, pooling)


def observed(weights: Array) -> Array:
    """The mean weight over the queries that could see the key, for S = T."""
    could = jnp.arange(weights.shape[-2], 0, -1)
    return weights.sum(-2).mean(2) / could


def tova(weights: Array) -> Array:
    """TOVA (Oren et al. 2024, arXiv 2401.06104): the newest query's weight, averaged over all
    heads: every head keeps the same keys, among them the newest."""
    newest = forced(weights[..., -1, :-1].mean((1, 2)), after=1)
    return jnp.broadcast_to(newest[:, None], (*weights.shape[:2], weights.shape[-1]))


def knorm(k: Array) -> Array:
    """-|k_j| (Devoto et al. 2024, arXiv 2406.11430): keys of small norm draw attention."""
    return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1).swapaxes(1, 2)


def keydiff(k: Array) -> Array:
    """-cos(k_j, mean of the unit keys) (Park et al. 2025, arXiv 2504.15364)."""
    k = k.astype(jnp.float32)
    unit = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
    anchor = unit.mean(1, keepdims=True)
    anchor /= jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-8)
    return -(unit * anchor).sum(-1).swapaxes(1, 2)


def expected(
    q: Array,
    k: Array,
    v: Array,
    rotation: Array,
    *,
    sinks: int = 4,
    covariance: bool = True,
    norm: bool = True,
    eps: float = 0.0,
) -> Array:
    """Expected attention (Devoto et al. 2025): the weight that queries to come would give.

    Queries before rotation, behind the first `sinks` places, have mean mu and covariance S; with R
    the mean `rotation` over the places to come, mu <- R mu, S <- R S R^T; the score is the softmax
    over keys of k mu / sqrt(d) + k S k / (2 d), averaged over query heads, times |v|. The first
    `sinks` keys are always kept.

    Args:
      q: [batch, T, heads, head], before rotation. k: [batch, T, kv_heads, head], rotated. v: alike.
      rotation: R, [head, head].
      covariance, norm: False leaves S, or |v|, out. eps: added to the softmax before |v|.
    """
    q, k, v = (x[:, sinks:].astype(jnp.float32) for x in (q, k, v))
    d, kv_heads = q.shape[-1], k.shape[2]
    q = q.reshape(*q.shape[:2], kv_heads, -1, d)
    mean = q.mean(1)
    logits = jnp.einsum("bskh,hi,bkgi->bkgs", k, rotation, mean) / jnp.sqrt(d)
    if covariance:
        centred = q - mean[:, None]
        cov = jnp.einsum("btkgi,btkgj->bkgij", centred, centred) / q.shape[1]
        turned = k @ rotation
        logits += jnp.einsum("bski,bkgij,bskj->bkgs", turned, cov, turned) / (2 * d)
    scores = jax.nn.softmax(logits, -1).mean(2)
    if norm:
        scores = (scores + eps) * jnp.linalg.norm(v, axis=-1).swapaxes(1, 2)
    return forced(scores, before=sinks)


def streaming(length: int, kept: int, sinks: int = 4) -> Array:
    """StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): 1 at the first `sinks` and the newest
    places, `kept` in all, 0 between: [length]."""
    place = jnp.arange(length)
    between = (place >= sinks) & (place < sinks + length - kept)
    return jnp.where(between, 0.0, 1.0)


def pyramid_budgets(
    length: int, kept: int, layers: int, window: int, beta: float = 20.0
) -> tuple[int, ...]:
    """PyramidKV (Cai et al. 2024, arXiv 2406.02069): how many of `length` keys each layer keeps,
    `kept` on average, falling with depth.

    The last layer keeps kept / beta; where the first would keep more than there is before the
    window the slope is less, and where that leaves the last less than the window all keep `kept`.
    """
    lowest = kept / beta
    highest = 2 * kept - lowest
    if highest >= length - window:
        highest = length - window
        lowest = 2 * kept - highest
    if layers == 1 or not length >= highest >= lowest >= window:
        return (kept,) * layers
    step = (highest - lowest) / (layers - 1)
    return tuple(round(highest - i * step) for i in range(layers))


def newer(real: Array) -> Array:
    """How many real keys stand behind each of [..., S], in the order of their age."""
    return jnp.cumsum(real[..., ::-1], -1)[..., ::-1] - real


def heavy_hitters(score: Array, real: Array, heavy: int, recent: int) -> Array:
    """H2O (Zhang et al. 2023, arXiv 2306.14048), the streaming form: the `recent` newest keys, and
    of the real ones before those the `heavy` best by accumulated score [..., S]: int32 [..., heavy
    + recent]. Slots that are not real fill up."""
    return best(jnp.where(newer(real) < recent, jnp.inf, score), real, heavy + recent)


def heavy_hitter_mask(weights: Array, budget: int) -> Array:
    """H2O as a mask over whole rows: query t sees itself and the `budget` - 1 keys that had
    accumulated most by then, others' scores being dropped: bool, shaped as `weights` [..., T, T].

    The first `budget` queries see the first `budget` keys; causality and a recent band are to be
    added.
    """
    length = weights.shape[-1]
    budget = min(budget, length)
    place = jnp.arange(length)
    first = place < budget
    score = jnp.where(first, weights[..., :budget, :].sum(-2), 0)

    def step(score: Array, t: Array) -> tuple[Array, Array]:
        best = jax.lax.top_k(score, budget - 1)[1]
        seen = (best[..., None, :] == place[:, None]).any(-1) | (place == t)
        row = jax.lax.dynamic_index_in_dim(weights, t, -2, keepdims=False)
        return (score + row) * seen, seen

    _, seen = jax.lax.scan(step, score, jnp.arange(budget, length))
    start = jnp.broadcast_to(first, (*weights.shape[:-2], budget, length))
    return jnp.concatenate((start, jnp.moveaxis(seen, 0, -2)), -2)
