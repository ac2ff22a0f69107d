"""MoBA: golden vectors, an oracle query by query, full attention and back, what is refused.

What it shares with NSA is in test_block_attention.py.
"""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.attention.masks import Causal, Window
from bestiary.kernels.block_attention import choosable_blocks, find_places
from bestiary.layers import (
    H2O,
    Attention,
    Context,
    MoBA,
    Repeat,
    SinksWindow,
    SnapKV,
)

RTOL = 1e-5
LENGTH = 29
BASE: dict[str, Any] = dict(dim=20, num_heads=6, num_kv_heads=2, head_dim=8)


def close(actual: Any, expected: Any, rtol: float = RTOL) -> None:
    expected = np.asarray(expected)
    atol = rtol * np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.golden("moba")
def test_golden(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    starts = a["cu_seqlens"]
    heads, kv_heads, head_dim = a["q"].shape[1], a["k"].shape[1], a["q"].shape[2]
    moba = MoBA(
        dim=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=None,
        block_size=hp["chunk_size"],
        top_k=hp["top_k"] + (not hp["top_k_includes_current"]),
        scale=hp["attention_scale"],
    )
    lengths = np.diff(starts)
    assert lengths.tolist() == hp["seq_lens"]
    segments = jnp.asarray(np.repeat(1 + np.arange(len(lengths)), lengths))[None]

    @jax.jit
    def run(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        def attend(*qkv: Any) -> Any:
            return moba.attend({}, *qkv, q_segments=segments, kv_segments=segments)

        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(cotangent)

    results = run(*(a[name][None] for name in ("q", "k", "v", "cot")))
    for name, result in zip(("o", "d_q", "d_k", "d_v"), results, strict=True):
        close(result[0], a[name])


# --- an oracle: query by query, in float64 --------------------------------------------------------


def oracle(
    moba: MoBA, q: Any, k: Any, v: Any, starts: list[int], sinks: Any
) -> tuple[np.ndarray, dict[tuple[int, int], list[int]]]:
    """[1, T, heads, head], and the chosen blocks by (query, head)."""
    q, k, v = (np.float64(x[0]) for x in (q, k, v))
    y, chosen, size = np.zeros((1, *q.shape)), {}, moba.block_size
    for t in range(len(q)):
        first = max(s for s in starts if s <= t)
        own = (t - first) // size
        for h in range(moba.num_heads):
            head = h * moba.num_kv_heads // moba.num_heads
            keys, values = (x[first : t + 1, head] for x in (k, v))
            gates = [q[t, h] @ keys[c * size : (c + 1) * size].mean(0) for c in range(own)]
            best = sorted(range(own), key=lambda c: (-gates[c], c))[: moba.top_k - 1]
            chosen[t, h] = sorted([*best, own])
            seen = np.isin(np.arange(t - first + 1) // size, chosen[t, h])
            s = keys[seen] @ q[t, h] * (moba.scale or q.shape[-1] ** -0.5)
            s = s if moba.softcap is None else moba.softcap * np.tanh(s / moba.softcap)
            w = np.exp(s)
            y[0, t, h] = (
                w @ values[seen] / (w.sum() + (np.exp(sinks[h]) if sinks is not None else 0))
            )
    return y, chosen


@pytest.mark.parametrize(
    "moba, whole",
    [
        (MoBA(**BASE, block_size=4, top_k=3), False),
        # products of small whole numbers are exact, and often equal
        (MoBA(**BASE, block_size=2, top_k=4, softcap=3.0, scale=0.9, sinks=True), True),
    ],
    ids=["numbers", "ties"],
)
def test_equals_the_oracle(moba: MoBA, whole: bool) -> None:
    rng, starts = np.random.default_rng(0), [0, 20]
    segments = jnp.asarray(np.repeat([1, 2], [20, LENGTH - 20]))[None]
    shapes = [(1, LENGTH, n, 8) for n in (6, 2, 2)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    if whole:
        q, k = (rng.integers(-1, 2, size=x.shape).astype(np.float32) for x in (q, k))
        q[..., 2:] = 0
    sinks = rng.normal(size=6).astype(np.float32) if moba.sinks else None

    @jax.jit
    def run(q: Any, k: Any, v: Any) -> Any:
        places = find_places(LENGTH, q_segments=segments, kv_segments=segments)
        blocks = choosable_blocks(places, moba.block_size)
        params = {} if sinks is None else {"sinks": sinks}
        y = moba.attend(params, q, k, v, q_segments=segments, kv_segments=segments)
        choice = moba.route(q, k, places, blocks)
        number = blocks.place // moba.block_size
        return y, jnp.where(choice >= 0, number[0][choice], -1)

    y, choice = run(q, k, v)
    expected, chosen = oracle(moba, q, k, v, starts, sinks)
    close(y, expected)
    for (t, h), blocks in chosen.items():
        others = sorted(int(i) for i in choice[0, t, h] if i >= 0)
        assert others == blocks[:-1], (t, h)
        own = blocks[-1]
        assert len(others) == min(moba.top_k - 1, own)  # exactly k, also among equals


# --- full attention and back ----------------------------------------------------------------------

ATTENTION = Attention(**BASE, softcap=3.0, sinks=True, bias=True)
FIELDS = {name: getattr(ATTENTION, name) for name in Attention.__dataclass_fields__}


def row(batch: int = 2) -> jax.Array:
    x = np.random.default_rng(1).normal(size=(batch, LENGTH, 20))
    return jnp.asarray(x, jnp.float32)


def test_all_blocks_are_full_attention() -> None:
    """With the same parameters: values and gradients."""
    moba = MoBA(**FIELDS, block_size=4, top_k=8)
    assert moba.abstract() == ATTENTION.abstract()
    params = ATTENTION.init(jax.random.key(0))

    def run(layer: Attention) -> Any:
        y, pull = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, row())
        return y, pull(jnp.cos(y))

    actual, expected = (jax.jit(run, static_argnums=0)(layer) for layer in (moba, ATTENTION))
    jax.tree.map(close, actual, expected)


def test_a_constant_says_where_attention_is_full() -> None:
    """By layer of a `Repeat`, in whole rows and in a cache."""
    moba = MoBA(**FIELDS, block_size=4, top_k=2)
    stack = Repeat(block=moba, n=2, constants=(("full_attention", (0.0, 1.0)),))
    params, x = stack.init(jax.random.key(0)), row()

    @jax.jit
    def run(x: jax.Array) -> list[jax.Array]:
        first, second = (jax.tree.map(lambda p, i=i: p[i], params) for i in (0, 1))
        expected = ATTENTION.apply(second, moba.apply(first, x)[0])[0]
        ctx, cache = Context(positions=jnp.arange(LENGTH)[None]), stack.init_cache(2, LENGTH)
        return [expected, stack.apply(params, x)[0], stack.apply(params, x, ctx, cache)[0]]

    expected, rows, cached = run(x)
    close(rows, expected)
    close(cached, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block_size=0), "block_size: 0; need at least 1"),
        (dict(top_k=0), "top_k: 0; need at least 1"),
        (dict(window=5), "window: 5; MoBA takes none"),
        (
            dict(mask=Causal() & Window(3)),
            "mask: And(left=Causal(), right=Window(size=3)); MoBA needs Causal()",
        ),
        *(
            (
                dict(cache=policy),
                f"cache: {type(policy).__name__}; MoBA needs every key, as Full and KIVI keep them",
            )
            for policy in (SinksWindow(), H2O(), SnapKV())
        ),
    ],
)
def test_refuses(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoBA(**BASE | dict(block_size=4, top_k=2) | options)
