"""NSA: golden vectors, an oracle query by query, ties, all blocks, what is refused.

What it shares with MoBA is in test_block_attention.py.
"""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.attention.masks import Causal, Window
from bestiary.layers import (
    H2O,
    NSA,
    Attention,
    LearnedMLP,
    MeanPool,
    Param,
    SinksWindow,
    SnapKV,
)
from bestiary.layers.base import map_params

RTOL = 1e-5
LENGTH = 29
BASE: dict[str, Any] = dict(dim=20, num_heads=6, num_kv_heads=2, head_dim=8)
MLP = LearnedMLP(head_dim=8, hidden=12, length=4, stride=2)


def close(actual: Any, expected: Any, rtol: float = RTOL, name: str = "") -> None:
    expected = np.asarray(expected)
    atol = rtol * np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)


def numbers(nsa: NSA, blocks: Any, choice: jax.Array, places: jax.Array) -> np.ndarray:
    """The numbers of the chosen blocks in their documents, ascending, the own one with them."""
    batch, length, kv_heads, _ = choice.shape
    block = np.broadcast_to(blocks.place // nsa.block_size, (batch, blocks.place.shape[1]))
    rows = np.arange(batch)[:, None, None, None]
    others = np.where(choice >= 0, block[rows, np.maximum(choice, 0)], -1)
    own = np.broadcast_to(places // nsa.block_size, (batch, length))[:, :, None, None]
    own = np.broadcast_to(own, (batch, length, kv_heads, 1))
    return np.sort(np.concatenate((others, own), -1), -1)


@pytest.mark.golden("nsa")
def test_golden(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    head_dim, width = hp["head_dim"], max(hp["head_dim"], hp["v_head_dim"])
    assert hp["compression"] == "mean_pool"
    nsa = NSA(
        dim=1,
        num_heads=hp["num_attention_heads"],
        num_kv_heads=hp["num_key_value_heads"],
        head_dim=width,
        rope=None,
        block_size=hp["block_size"],
        num_selected=hp["num_selected_blocks"],
        local_window=hp["window_size"] + (hp["window_size"] and not hp["window_includes_self"]),
        compression=MeanPool(),
        scale=hp["attention_scale"],
    )

    def widened(x: Any) -> Any:  # zeros add nothing to products and results
        return jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),))

    names = ("q", "k", "v", "g_cmp", "g_slc", "g_swa")
    params = {"compress_key": {}, "compress_value": {}}

    @jax.jit
    def run(operands: tuple, cotangent: jax.Array) -> Any:
        def attend(q: Any, k: Any, v: Any, *gates: Any) -> Any:
            q, k, wide = widened(q), widened(k), widened(v)
            given = params | {"gates": jnp.stack(gates, -1)}
            return nsa.attend(given, q, k, wide)[..., : v.shape[-1]]

        o, pull = jax.vjp(attend, *operands)
        q, k, v = (widened(x) for x in operands[:3])
        return o, pull(cotangent), nsa.branches(params, q, k, v)

    o, grads, branches = run(tuple(a[name] for name in names), a["cot"])
    close(o, a["o"], name="o")
    for name, grad in zip(names, grads, strict=True):
        close(grad, a[f"d_{name}"], name=f"d_{name}")
    v_head_dim = hp["v_head_dim"]
    for name, branch in (("cmp", branches.compressed), ("slc", branches.chosen)):
        close(a[f"g_{name}"][..., None] * branch[..., :v_head_dim], a[f"o_{name}"], name=name)
    chosen = numbers(nsa, branches.blocks, branches.choice, np.arange(a["q"].shape[1])[None])
    unused = hp["unused_block_index"]
    expected = np.sort(np.where(a["block_idx_sorted"] == unused, -1, a["block_idx_sorted"]), -1)
    np.testing.assert_array_equal(chosen, expected)
    assert head_dim == a["q"].shape[-1]


# --- an oracle: query by query, in float64 --------------------------------------------------------


def draw(nsa: NSA) -> Any:
    """Parameters with which the compressed keys are weighed far from alike."""
    rng = np.random.default_rng(0)

    def one(p: Param) -> np.ndarray:
        return rng.normal(0, 2 * p.shape[0] ** -0.5, p.shape).astype(np.float32)

    return map_params(one, nsa.declare())


def operands(nsa: NSA, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    heads = (nsa.num_heads, nsa.cached_heads, nsa.cached_heads)
    return tuple(rng.normal(size=(1, LENGTH, n, 8)).astype(np.float32) for n in heads)


def weights(nsa: NSA, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    s = k @ q * (nsa.scale or len(q) ** -0.5)
    s = s if nsa.softcap is None else nsa.softcap * np.tanh(s / nsa.softcap)
    return np.exp(s - s.max()) / np.exp(s - s.max()).sum()


def compressed(nsa: NSA, params: Any, x: np.ndarray) -> np.ndarray:
    """[length, head] -> [head]."""
    if isinstance(nsa.compression, MeanPool):
        return x.mean(0)
    position, up, down = (np.float64(params[name]) for name in ("position", "up", "down"))
    h = np.einsum("lh,lhf->f", x + position, up)
    return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) @ down


def importance(nsa: NSA, weights: np.ndarray, own: int) -> np.ndarray:
    """Of the blocks before the own one: p_j = sum over m, n of p_cmp[l' / d j + m - n], l' the size
    of a block, d the stride and l the length of what is compressed."""
    length, stride = nsa.compression.span(nsa.block_size)
    strides, p = nsa.block_size // stride, np.zeros(own)
    for j in range(own):
        for m in range(strides):
            for n in range(length // stride):
                i = strides * j + m - n
                p[j] += weights[i] if 0 <= i < len(weights) else 0
        if j < nsa.initial_blocks or j > own - nsa.local_blocks:
            p[j] = np.inf
    return p


def oracle(nsa: NSA, params: Any, q: Any, k: Any, v: Any, starts: list[int]) -> tuple:
    """The three branches [1, T, heads, head], and the chosen blocks by (query, key head)."""
    q, k, v = (np.float64(x[0]) for x in (q, k, v))
    branches, chosen = np.zeros((3, 1, *q.shape)), {}
    (length, stride), size = nsa.compression.span(nsa.block_size), nsa.block_size
    shared = nsa.num_heads // nsa.num_kv_heads
    for t in range(len(q)):
        first = max(s for s in starts if s <= t)
        own = (t - first) // size
        for head in range(nsa.num_kv_heads):
            at = [head] * 3 if nsa.shared_kv else range(3 * head, 3 * head + 3)
            keys, values = ([x[first : t + 1, i] for i in at] for x in (k, v))
            group = range(head * shared, (head + 1) * shared)
            pieces = range(0, t - first + 2 - length, stride)
            total = np.zeros(len(pieces))
            if pieces:
                short = [
                    np.array([compressed(nsa, params[name], x[0][i : i + length]) for i in pieces])
                    for name, x in (("compress_key", keys), ("compress_value", values))
                ]
                for h in group:
                    w = weights(nsa, q[t, h], short[0])
                    total += w
                    branches[0, 0, t, h] = w @ short[1]
            p = importance(nsa, total, own)
            best = sorted(range(own), key=lambda j: (-p[j], j))[: nsa.num_selected - 1]
            chosen[t, head] = sorted([*best, own])
            seen = np.isin(np.arange(t - first + 1) // size, chosen[t, head])
            for h in group:
                branches[1, 0, t, h] = weights(nsa, q[t, h], keys[1][seen]) @ values[1][seen]
                near = slice(-nsa.local_window, None)
                branches[2, 0, t, h] = weights(nsa, q[t, h], keys[2][near]) @ values[2][near]
    return branches, chosen


@pytest.mark.parametrize(
    "nsa",
    [
        NSA(**BASE, block_size=4, num_selected=3, local_window=5, softcap=3.0, scale=0.9),
        NSA(
            **BASE,
            block_size=6,
            num_selected=3,
            local_window=3,
            compression=MLP,
            initial_blocks=1,
            shared_kv=False,
        ),
        NSA(
            **BASE,
            block_size=2,
            num_selected=6,
            local_window=1,
            compression=MLP,
            initial_blocks=2,
            local_blocks=2,
        ),
    ],
    ids=["mean", "mlp", "mlp_longer_than_blocks"],
)
def test_equals_the_oracle(nsa: NSA) -> None:
    params, starts = draw(nsa), [0, 22]
    segments = jnp.asarray(np.repeat([1, 2], [22, LENGTH - 22]))[None]

    @jax.jit
    def run(*qkv: Any) -> Any:
        return nsa.branches(params, *qkv, q_segments=segments, kv_segments=segments)

    qkv = operands(nsa, 1)
    actual = run(*qkv)
    expected, chosen = oracle(nsa, params, *qkv, starts)
    places = np.arange(LENGTH) - np.repeat(starts, [22, LENGTH - 22])
    found = numbers(nsa, actual.blocks, actual.choice, places[None])[0]
    for (t, head), blocks in chosen.items():
        assert [i for i in found[t, head] if i >= 0] == blocks, (t, head)
    for name, branch in zip(("compressed", "chosen", "near"), expected, strict=True):
        close(getattr(actual, name), branch, 5e-5, name)


def test_of_equally_important_blocks_the_first_are_chosen() -> None:
    nsa = NSA(**BASE, block_size=4, num_selected=4, local_window=0)
    q, k, v = operands(nsa, 2)
    branches = jax.jit(lambda: nsa.branches(draw(nsa), q, 0 * k, v))()
    places = np.arange(LENGTH)
    found = numbers(nsa, branches.blocks, branches.choice, places[None])[0]
    for t in places:
        own = t // 4
        expected = [*range(min(own, 3)), own]
        assert found[t].tolist() == [[-1] * (4 - len(expected)) + expected] * 2


def test_all_blocks_are_full_attention() -> None:
    """Of which no more than the window is near."""
    nsa = NSA(**BASE, block_size=4, num_selected=8, local_window=LENGTH)
    qkv = operands(nsa, 3)
    branches = jax.jit(lambda: nsa.branches(draw(nsa), *qkv))()
    full = jax.jit(lambda: Attention(**BASE).attend({}, *qkv))()
    close(branches.chosen, full)
    close(branches.near, full)


SIZES: dict[str, Any] = BASE | dict(block_size=4, num_selected=3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block_size=0), "block_size: 0; need at least 1"),
        (dict(num_selected=0), "num_selected: 0; need at least 1"),
        (dict(local_blocks=0), "local_blocks: 0; need at least 1"),
        (dict(local_window=-1), "local_window: -1; need at least 0"),
        (dict(initial_blocks=-2), "initial_blocks: -2; need at least 0"),
        (
            dict(initial_blocks=2, local_blocks=2),
            "num_selected: 3; need at least the 4 of initial_blocks and local_blocks",
        ),
        (
            dict(compression=LearnedMLP(head_dim=8, hidden=5, length=6, stride=3)),
            "stride: 3 does not divide block_size 4",
        ),
        (
            dict(compression=LearnedMLP(head_dim=6, hidden=5, length=4, stride=4)),
            "compression.head_dim: 6; need head_dim 8",
        ),
        (dict(window=5), "window: 5; NSA takes local_window"),
        (
            dict(mask=Causal() & Window(3)),
            "mask: And(left=Causal(), right=Window(size=3)); NSA needs Causal()",
        ),
        (dict(sinks=True), "sinks: True; NSA takes none"),
        *(
            (
                dict(cache=policy),
                f"cache: {type(policy).__name__}; NSA needs every key, as Full and KIVI keep them",
            )
            for policy in (SinksWindow(), H2O(), SnapKV())
        ),
    ],
)
def test_refuses(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NSA(**SIZES | options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=6, stride=4), "stride: 4 does not divide length 6"),
        (dict(length=0), "length: 0; need at least 1"),
        (dict(hidden=0), "hidden: 0; need at least 1"),
    ],
)
def test_compression_refuses(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LearnedMLP(**dict(head_dim=8, hidden=5) | options)
