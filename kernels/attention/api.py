"""Attention, the public operation: validates and chooses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from bestiary.kernels.attention import blocked, reference
from bestiary.kernels.attention.masks import CAUSAL, Mask, Window
from bestiary.kernels.dispatch import by_platform, check_impl, why_not_sharded

Array = jax.Array
SHORT = 256  # rows up to here are faster, and small enough, with all their logits at once


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    mask: Mask = CAUSAL,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    bias: Array | None = None,
    spec: P | None = None,
    kv_spec: P | None = None,
    impl: str = "auto",
) -> Array:
    """Attention: q [batch, T, heads, head], k and v [batch, S, kv_heads, head] -> as q.

    Softmax(softcap(scale q k) + bias) v over the visible keys, causal unless `mask` says otherwise;
    a query that sees none gives 0. Logits and softmax are float32, the result has the type of v.
    The kernels serve rows that attend to themselves: no positions, and the same segments on both
    sides. Elsewhere rows of more than 256 queries and keys are computed block by block, with cost
    and memory that grow with the blocks of which the mask shows anything, reverse mode only; with
    positions the running program finds these blocks.

    Args:
      q_positions, kv_positions: int32 [batch or 1, T] and [batch or 1, S] (negative: an empty key
        slot), or [batch, kv_heads, S] where heads hold keys of their own; by default 0, 1, 2, ...
      q_segments, kv_segments: int32 of the same shapes; they isolate documents. Positions do not
        restart with them unless they are given so, which a mask that is not `relative` asks for.
      mask: static sparsity; see `masks`.
      window: short for `mask & Window(window)`: with a causal mask that many keys, the query's own
        included.
      scale: multiplies q k; by default head ** -0.5.
      softcap: c bounds the logits by c tanh(s / c).
      sinks: [heads], extra logits without values, which are not capped.
      bias: [batch or 1, heads or kv_heads, S], added to a key's logits after the soft-cap.
      spec, kv_spec: how q, and k and v, are sharded under the current mesh, whose devices then run
        the kernel on their own rows and heads. Without them, or when these dimensions do not
        divide, the reference serves.
      impl: "auto" (the kernel for the platform being lowered for, where it can serve),
        "reference" (all logits at once), "tpu" or "gpu".

    Raises:
      ValueError: heads is not a multiple of kv_heads, only one side has segments, a bias of
        another shape, a window below 1, a wrong `spec` or an unknown `impl`.
      NotImplementedError: the named kernel cannot serve; the message says why.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"heads: {q.shape[2]} is not a multiple of kv_heads {k.shape[2]}")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("segments: give q_segments and kv_segments, or neither")
    check_impl(impl)
    if bias is not None:
        allowed = [(b, h, k.shape[1]) for b in (q.shape[0], 1) for h in (q.shape[2], k.shape[2])]
        if bias.shape not in allowed:
            raise ValueError(f"bias: shape {bias.shape}; need one of {allowed}")
    options = {
        "mask": mask if window is None else mask & Window(window),
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap,
    }
    where = (q_positions, kv_positions, q_segments, kv_segments)
    rows = q_positions is None and kv_positions is None and q_segments is kv_segments
    reason = None if rows else "it has positions, or segments of queries that are not those of keys"
    operands = (q, k, v, sinks, bias, q_segments)
    usable = {}
    if impl != "reference":
        reason = reason or _why_not_sharded(q, k, spec, kv_spec)
        usable = _usable(impl, reason, operands, options)
    portable = reference.attention if impl == "reference" else _portable(q, k, kv_positions)
    if not usable:
        return portable(q, k, v, *where, sinks, bias, **options)
    run = (
        usable[impl]
        if impl != "auto"
        else by_platform(
            # recomputed: else every platform's program would save what this backward pass needs
            jax.checkpoint(partial(_rows, portable, **options)),
            usable,
        )
    )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and spec is not None:
        in_specs = (spec, kv_spec, kv_spec, P(*spec[2:3]), None, P(*spec[:2]))
        # the library's kernels do not say over which axes their results vary
        run = jax.shard_map(run, in_specs=in_specs, out_specs=spec, check_vma=False)
    return run(*operands)


def live_keys(mask: Mask, length: int) -> float:
    """Keys that a query of a whole row is multiplied with where no kernel serves."""
    return length if length <= SHORT else blocked.live_keys(mask, length)


def _usable(
    impl: str, reason: str | None, operands: tuple, options: dict[str, Any]
) -> dict[str, Callable[..., Array]]:
    """The kernels that `impl` allows and that can serve; `reason` holds for all of them."""
    from bestiary.kernels.attention import gpu, tpu  # importing Pallas takes 0.3 s

    kernels = {"tpu": tpu, "gpu": gpu}
    found = {}
    for name in kernels if impl == "auto" else (impl,):
        why_not = reason or kernels[name].supports(*operands, **options)
        if why_not is None:
            found[name] = partial(kernels[name].attention, **options)
        elif impl != "auto":
            raise NotImplementedError(f"impl={impl!r} cannot serve this call: {why_not}")
    return found


def _why_not_sharded(q: Array, k: Array, spec: P | None, kv_spec: P | None) -> str | None:
    """Why the kernel cannot run on each device's own rows and heads, or None."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return "it is inside a jax.shard_map, where the kernels cannot be checked"
    if spec and kv_spec and spec != kv_spec:
        return f"queries lie as {spec}, keys and values as {kv_spec}"
    return why_not_sharded(q.shape, spec, (1, 3)) or why_not_sharded(k.shape, kv_spec, (1, 3))


def _portable(q: Array, k: Array, kv_positions: Array | None) -> Callable[..., Array]:
    """What serves on every platform."""
    short = min(q.shape[1], k.shape[1]) <= SHORT
    by_head = kv_positions is not None and kv_positions.ndim == 3
    return reference.attention if short or by_head else blocked.attention


def _rows(
    portable: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    bias: Array | None,
    segments: Array | None,
    **options: Any,
) -> Array:
    """The portable path for rows that attend to themselves."""
    return portable(q, k, v, None, None, segments, segments, sinks, bias, **options)
