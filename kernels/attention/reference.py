"""Attention in plain jax.numpy: the definition of truth, and the path of short rows."""

import jax
import jax.numpy as jnp

from bestiary.kernels.attention.masks import CAUSAL, Mask

Array = jax.Array
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def visible(
    q_positions: Array,
    kv_positions: Array,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    mask: Mask = CAUSAL,
) -> Array:
    """Which keys a query sees: bool [batch or 1, T, S] from int32 [batch or 1, T] and [.., S].

    Those of the mask, in equal segments. A key at a negative position is an empty slot. Where key-
    value heads hold keys of their own, at [batch, kv_heads, S]: bool [batch, kv_heads, T, S].
    """

    def queries(x: Array) -> Array:
        return jnp.expand_dims(x, range(1, kv_positions.ndim - 1))[..., None]

    keys = kv_positions[..., None, :]
    seen = mask(queries(q_positions), keys) & (keys >= 0)
    if q_segments is not None and kv_segments is not None:
        seen &= queries(q_segments) == kv_segments[..., None, :]
    return seen


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    sinks: Array | None = None,
    bias: Array | None = None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """As `api.attention`, writing all logits [T, S]."""
    q_positions = jnp.arange(q.shape[1])[None] if q_positions is None else q_positions
    kv_positions = jnp.arange(k.shape[1])[None] if kv_positions is None else kv_positions
    seen = visible(q_positions, kv_positions, q_segments, kv_segments, mask)
    return dense(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks, bias=bias)


def dense(
    q: Array,
    k: Array,
    v: Array,
    seen: Array,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """The sum of v by `weights`: [batch, T, heads, head]; 0 for a query that sees no key."""
    w = weights(q, k, seen, scale=scale, softcap=softcap, sinks=sinks, bias=bias)
    y = jnp.einsum("bkgts,bskh->btkgh", w.astype(v.dtype), v)
    some = seen.any(-1)
    some = some[..., None] if seen.ndim == 3 else some.swapaxes(1, 2)
    return jnp.where(some[..., None, None], y, 0).reshape(*q.shape[:3], v.shape[-1])


def weights(
    q: Array,
    k: Array,
    seen: Array,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """Softmax(softcap(scale q k) + bias over seen keys and the sink), computed and returned in
    float32; alike for all keys where a query sees none.

    q [batch, T, heads, head]; k [batch, S, kv_heads, head]; query head h reads key-value head h //
    (heads / kv_heads); seen as `visible` returns; sinks [heads], one extra logit per head that
    takes weight and gives no value. Returns [batch, kv_heads, heads / kv_heads, T, S].
    """
    kv_heads = k.shape[2]
    q = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1])
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits += bias.astype(jnp.float32).reshape(*bias.shape[:1], kv_heads, -1, 1, k.shape[1])
    seen = seen[:, None] if seen.ndim == 3 else seen
    logits = jnp.where(seen[:, :, None], logits, MASKED)
    if sinks is None:
        return jax.nn.softmax(logits, -1)
    sink = sinks.astype(jnp.float32).reshape(kv_heads, -1)[None, :, :, None, None]
    peak = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), sink))
    exps = jnp.exp(logits - peak)
    return exps / (exps.sum(-1, keepdims=True) + jnp.exp(sink - peak))
