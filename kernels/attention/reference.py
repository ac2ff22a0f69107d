"""Attention in plain jax.numpy: the definition of truth and the CPU path."""

import jax
import jax.numpy as jnp

Array = jax.Array
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
BLOCK = 512  # queries whose logits exist at a time in a long sequence


def visible(
    q_positions: Array,
    kv_positions: Array,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    window: int | None = None,
) -> Array:
    """Which keys a query sees: bool [batch or 1, T, S] from int32 [batch or 1, T] and [.., S].

    Causal: 0 <= q - kv, and q - kv < window, so that a window of w keeps w keys with the query's
    own. A key at a negative position is an empty slot. Segments must be equal. Where key-value
    heads hold keys of their own, at [batch, kv_heads, S]: bool [batch, kv_heads, T, S].
    """

    def queries(x: Array) -> Array:
        return jnp.expand_dims(x, range(1, kv_positions.ndim - 1))[..., None]

    distance = queries(q_positions) - kv_positions[..., None, :]
    seen = (distance >= 0) & (kv_positions >= 0)[..., None, :]
    if window is not None:
        seen &= distance < window
    if q_segments is not None and kv_segments is not None:
        seen &= queries(q_segments) == kv_segments[..., None, :]
    return seen


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    kv_positions: Array,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    sinks: Array | None = None,
    *,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """As `api.attention`; many long rows in blocks of queries, recomputed backwards, so that the
    logits [T, S] of all heads never exist at once."""

    def some(q: Array, q_positions: Array, q_segments: Array | None) -> Array:
        seen = visible(q_positions, kv_positions, q_segments, kv_segments, window)
        return dense(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks)

    length = q.shape[1]
    if length < 4 * BLOCK or length % BLOCK:
        return some(q, q_positions, q_segments)

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    blocks = jax.tree.map(split, (q, q_positions, q_segments))
    out = jax.lax.map(jax.checkpoint(lambda block: some(*block)), blocks)
    return out.swapaxes(0, 1).reshape(q.shape)


def dense(
    q: Array,
    k: Array,
    v: Array,
    seen: Array,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """The sum of v by `weights`: [batch, T, heads, head]."""
    w = weights(q, k, seen, scale=scale, softcap=softcap, sinks=sinks)
    return jnp.einsum("bkgts,bskh->btkgh", w.astype(v.dtype), v).reshape(q.shape)


def weights(
    q: Array,
    k: Array,
    seen: Array,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Softmax(softcap(scale q k) over seen keys and the sink), computed and returned in float32.

    q [batch, T, heads, head]; k [batch, S, kv_heads, head]; query head h reads key-value head h //
    (heads / kv_heads); seen as `visible` returns; sinks [heads], one extra logit per head that
    takes weight and gives no value. Returns [batch, kv_heads, heads / kv_heads, T, S].
    """
    kv_heads = k.shape[2]
    q = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1])
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    seen = seen[:, None] if seen.ndim == 3 else seen
    logits = jnp.where(seen[:, :, None], logits, MASKED)
    if sinks is None:
        return jax.nn.softmax(logits, -1)
    sink = sinks.astype(jnp.float32).reshape(kv_heads, -1)[None, :, :, None, None]
    peak = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), sink))
    exps = jnp.exp(logits - peak)
    return exps / (exps.sum(-1, keepdims=True) + jnp.exp(sink - peak))
