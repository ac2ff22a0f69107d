"""Cache policies: against a simulation token by token, against the full forward, and in bytes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.attention.masks import Causal, Sinks, Window
from bestiary.layers import (
    DEFAULT_RULES,
    DSA,
    H2O,
    KIVI,
    MLA,
    NSA,
    Attention,
    CachePolicy,
    Chain,
    Context,
    Full,
    Layer,
    MoBA,
    RMSNorm,
    Rope,
    SharedAttention,
    SharedKV,
    SinksWindow,
    SnapKV,
    SparkAttention,
    use_rules,
)
from bestiary.layers.base import init, is_param, map_params, params_of
from bestiary.layers.linear import project
from bestiary.zoo.decoder import Block
from bestiary.zoo.llama import llama, swiglu
from bestiary.zoo.shared_kv import cross_layer

DIM, HEADS, KV_HEADS, HEAD = 12, 6, 2, 4
SIZES: dict[str, Any] = dict(dim=DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD)
LENGTH = 24
NORM = RMSNorm(dim=DIM)
FFN = swiglu(DIM, 20)
CALLS = (7, 1, 1, 1, 7, *(1,) * 7)
"""Tokens of successive calls."""

# Where the tokens of four rows stand: alone, in documents that restart and in those that do not,
# with padding on the left and in between. Every row has its own length.
POSITIONS = np.full((5, LENGTH), -1)
POSITIONS[0] = np.arange(LENGTH)
POSITIONS[1] = [*range(5), *range(4), *range(15)]
POSITIONS[2] = np.arange(LENGTH)
POSITIONS[3, 5:] = np.arange(LENGTH - 5)
POSITIONS[4, [*range(3), *range(5, 15), 16, 20, 21, 22]] = np.arange(17)
SEGMENTS = np.ones_like(POSITIONS)
SEGMENTS[1] = np.repeat([1, 2, 3], [5, 4, 15])
SEGMENTS[2] = np.repeat([1, 2], [10, 14])

POLICIES: dict[str, CachePolicy] = {
    "full": Full(),
    "sinks_window": SinksWindow(sinks=2, window=5),
    "sinks_window_in_cache": SinksWindow(sinks=2, window=5, in_cache=True),
    "h2o": H2O(heavy=3, recent=4),
    "h2o_query": H2O(heavy=3, recent=4, heads="query"),
    "snapkv": SnapKV(capacity=8, window=3, kernel=3, room=2),
    "snapkv_max_query": SnapKV(
        capacity=7, window=2, kernel=5, pooling="max", room=3, heads="query"
    ),
    "kivi2": KIVI(bits=2, group_size=4, residual=16),
    "kivi4": KIVI(bits=4, group_size=2, residual=8),
    "kivi8": KIVI(bits=8, group_size=4, residual=4),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


def draw(layer: Layer) -> Any:
    """Parameters with which attention is far from uniform."""
    rng = np.random.default_rng(0)
    return map_params(
        lambda p: jnp.asarray(rng.normal(0, 1.5 * p.shape[0] ** -0.5, p.shape), jnp.float32),
        layer.declare(),
    )


def rows(dim: int = DIM) -> jax.Array:
    x = np.random.default_rng(1).normal(size=(len(POSITIONS), LENGTH, dim))
    return jnp.asarray(x, jnp.float32)


def close(actual: Any, expected: Any, rtol: float = 2e-5, name: str = "") -> None:
    expected = np.asarray(expected)
    atol = rtol * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)


@partial(jax.jit, static_argnums=0)
def step(
    layer: Any, params: Any, cache: Any, x: Any, positions: Any, segments: Any
) -> tuple[jax.Array, Any]:
    ctx = Context(positions=positions, segment_ids=segments)
    y, cache, _ = layer.apply(params, x, ctx, cache)
    return y, cache


def called(
    layer: Any, params: Any, x: Any, positions: Any, segments: Any, calls: Sequence[int] = CALLS
) -> tuple[jax.Array, list[Any]]:
    """Outputs of successive calls on one cache, and the cache behind each."""
    cache, start, ys, caches = layer.init_cache(len(x), x.shape[1]), 0, [], []
    for size in calls:
        part = slice(start, start + size)
        segment = None if segments is None else jnp.asarray(segments[:, part])
        y, cache = step(layer, params, cache, x[:, part], jnp.asarray(positions[:, part]), segment)
        ys.append(y)
        caches.append(cache)
        start += size
    return jnp.concatenate(ys, 1), caches


# --- an oracle: lists of tokens -------------------------------------------------------------------


@dataclass
class Token:
    """A key and its value, as one head keeps them."""

    at: int
    """Its place in the row."""
    position: int
    score: float = 0.0


def fake(x: np.ndarray, bits: int) -> np.ndarray:
    """A group as its codes say."""
    scale = (x.max() - x.min()) / (2**bits - 1)
    return x if scale == 0 else np.round((x - x.min()) / scale) * scale + x.min()


def as_stored(policy: CachePolicy, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [n, head] of a document as its cache has them."""
    if not isinstance(policy, KIVI):
        return k, v
    k, v, n, g = k.copy(), v.copy(), len(k), policy.group_size
    for first in range(0, n // policy.residual * policy.residual, g):
        for channel in range(k.shape[1]):
            k[first : first + g, channel] = fake(k[first : first + g, channel], policy.bits)
    for token in range(n - policy.residual):
        for first in range(0, v.shape[1], g):
            v[token, first : first + g] = fake(v[token, first : first + g], policy.bits)
    return k, v


def survivors(
    policy: CachePolicy, tokens: list[Token], received: np.ndarray, snapped: np.ndarray, size: int
) -> list[Token]:
    """Who stays, of the tokens of a document in their order, behind a call of `size` tokens.

    received, snapped: attention that they received from all queries, and from the last `window`.
    """
    if isinstance(policy, SinksWindow):
        newest = tokens[-1].position
        return [
            t for t in tokens if t.position < policy.sinks or newest - t.position < policy.window
        ]
    if isinstance(policy, H2O):
        for token, got in zip(tokens, received, strict=True):
            token.score += got
        old = tokens[: -policy.recent]
        heavy = sorted(old, key=lambda t: -t.score)[: policy.heavy]
        return [t for t in tokens if t in heavy or t in tokens[-policy.recent :]]
    if isinstance(policy, SnapKV):
        if size == 1:
            full = len(tokens) > policy.capacity + policy.room
            return [t for i, t in enumerate(tokens) if not full or i != policy.capacity]
        if len(tokens) <= policy.capacity:
            return tokens
        before, half = len(tokens) - policy.window, policy.kernel // 2
        padded = np.pad(snapped[:before], half)
        around = [padded[i : i + policy.kernel] for i in range(before)]
        pooled = [a.mean() if policy.pooling == "avg" else a.max() for a in around]
        best = np.argsort(-np.array(pooled), kind="stable")[: policy.capacity - policy.window]
        return [t for i, t in enumerate(tokens) if i in best or i >= before]
    return tokens


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """A query or key [..., head] at a position."""
    a, b = np.split(x, 2, -1)
    angle = position * 1e4 ** -(np.arange(0, HEAD, 2) / HEAD)
    return np.concatenate(
        (a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1
    )


def simulate(layer: Attention, params: Any, x: Any, positions: Any, segments: Any) -> np.ndarray:
    """Attention call by call over the tokens that a policy keeps, in float64."""
    policy = layer.cache
    shared = HEADS // KV_HEADS
    at = jnp.asarray(positions)
    q, k, v = (project("bsd,dnh->bsnh", x, params, n) for n in ("query", "key", "value"))
    in_cache = getattr(policy, "in_cache", False)
    if not in_cache:
        q, k = layer.rotate(q, at), layer.rotate(k, at)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    y = np.zeros(q.shape)
    groups = [range(h, h + 1) for h in range(HEADS)]
    if getattr(policy, "heads", "kv") == "kv":
        groups = [range(h * shared, (h + 1) * shared) for h in range(KV_HEADS)]
    for b in range(len(x)):
        for group in groups:
            kv = group[0] // shared
            tokens: list[Token] = []
            document, start = None, 0
            for size in CALLS:
                new = [t for t in range(start, start + size) if positions[b, t] >= 0]
                seen = {t: (k[b, t, kv], v[b, t, kv]) for t in new}
                places = [t.at for t in tokens]
                stored = as_stored(policy, k[b, places, kv], v[b, places, kv])
                seen |= dict(zip(places, zip(*stored, strict=True), strict=True))
                received = {t: np.zeros((size, len(group))) for t in seen}
                for t in new:
                    mine = [s for s in seen if s <= t and segments[b, s] == segments[b, t]]
                    if isinstance(policy, SinksWindow) and size == 1:  # the window counts the query
                        mine = [
                            s
                            for s in mine
                            if positions[b, s] < policy.sinks
                            or positions[b, t] - positions[b, s] < policy.window
                        ]
                    for i, h in enumerate(group):
                        logits = np.array([seen[s][0] @ q[b, t, h] for s in mine]) * HEAD**-0.5
                        if in_cache:  # they count 0, 1, 2, ...
                            query = rotated(q[b, t, h], len(mine) - 1)
                            keys = [rotated(seen[s][0], n) for n, s in enumerate(sorted(mine))]
                            logits = np.array(keys) @ query * HEAD**-0.5
                            mine.sort()
                        w = np.exp(logits - logits.max())
                        w /= w.sum()
                        y[b, t, h] = w @ np.array([seen[s][1] for s in mine])
                        for s, weight in zip(mine, w, strict=True):
                            received[s][t - start, i] = weight
                start += size
                if not new:
                    continue
                if document != segments[b, new[-1]]:
                    document, tokens = segments[b, new[-1]], []
                tokens += [Token(t, positions[b, t]) for t in new if segments[b, t] == document]
                window = new[-getattr(policy, "window", 1) :]
                got = np.array([received[t.at].mean(1).sum() for t in tokens])
                last = [t - (start - size) for t in window]
                snapped = np.array([received[t.at].mean(1)[last].sum() for t in tokens])
                tokens = survivors(policy, tokens, got, snapped, size)
    return np.einsum("bsnh,nhd->bsd", y, np.asarray(params["out"], np.float64))


@every_policy
def test_equals_the_simulation(name: str) -> None:
    layer = Attention(**SIZES, cache=POLICIES[name])
    params, x = draw(layer), rows()
    expected = simulate(layer, params, x, POSITIONS, SEGMENTS)
    real = POSITIONS >= 0
    y, _ = called(layer, params, x, POSITIONS, SEGMENTS)
    close(y[real], expected[real], 1e-4)
    later = x.at[:, 13:].add(1.0)  # from the middle of a call on
    changed, _ = called(layer, params, later, POSITIONS, SEGMENTS)
    np.testing.assert_array_equal(changed[:, :13], y[:, :13])
    if not isinstance(layer.cache, Full | H2O | KIVI):
        return
    alone = [0, 3, 4]  # one document each: no segments say so
    y, _ = called(layer, params, x[np.array(alone)], POSITIONS[alone], None)
    close(y[real[alone]], expected[alone][real[alone]], 1e-4)


@pytest.mark.parametrize("name", ["full", "h2o", "snapkv", "kivi4"])
def test_sharded_equals_unsharded(name: str, mesh: jax.sharding.Mesh) -> None:
    layer = Attention(**SIZES, cache=POLICIES[name])
    params, x = draw(layer), rows()[:4]
    expected, _ = called(layer, params, x, POSITIONS[:4], SEGMENTS[:4], (7, 1, 1))
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, layer.abstract(mesh)))
        cache = init(layer.cache_spec(4, LENGTH), jax.random.key(0), mesh)
        assert "tensor" in jax.tree.leaves(cache["k"])[0].sharding.spec
        for t, size in ((0, 7), (7, 1), (8, 1)):
            now = [jnp.asarray(a[:4, t : t + size]) for a in (POSITIONS, SEGMENTS)]
            y, cache = step(layer, placed, cache, x[:, t : t + size], *now)
            close(y, expected[:, t : t + size], 1e-4)


# --- golden vectors, through the policies ---------------------------------------------------------


def of_golden(golden: SimpleNamespace, policy: CachePolicy) -> tuple[Attention, Any]:
    a, hp = golden.arrays, golden.hp
    layer = Attention(
        dim=hp["hidden_size"],
        num_heads=hp["num_attention_heads"],
        num_kv_heads=hp["num_key_value_heads"],
        head_dim=hp["head_dim"],
        rope=Rope(theta=hp["rope_theta"]),
        cache=policy,
    )
    names = {"query": "Wq", "key": "Wk", "value": "Wv"}
    split = {ours: a[n].reshape(layer.dim, -1, layer.head_dim) for ours, n in names.items()}
    out = jnp.zeros((layer.num_heads, layer.head_dim, layer.dim))
    return layer, {n: jnp.asarray(w) for n, w in split.items()} | {"out": out}


@pytest.mark.golden("kv_selection")
def test_h2o_keeps_what_the_released_cache_keeps(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    steps, length = hp["h2o_stream_decode_steps"], hp["seq_len"]
    policy = H2O(
        heavy=hp["h2o_stream_heavy_size"], recent=hp["h2o_stream_recent_size"], heads="query"
    )
    layer, params = of_golden(golden, policy)
    positions = np.arange(length)[None]
    calls = (length - steps, *(1,) * steps)
    _, caches = called(layer, params, jnp.asarray(a["h"][:1]), positions, None, calls)
    k = np.stack([c["k"][0].swapaxes(0, 1) for c in caches])
    close(k, a["h2o_stream_k"], 1e-5)
    close(np.stack([c["score"][0] for c in caches]), a["h2o_stream_score"], 1e-5)


@pytest.mark.golden("kv_selection")
def test_snapkv_keeps_what_the_released_caches_keep(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    sizes: dict[str, Any] = dict(window=hp["window_size"], kernel=hp["kernel_size"], room=1)
    length = (hp["seq_len"],)
    positions = np.broadcast_to(np.arange(*length), a["h"].shape[:2])
    x = jnp.asarray(a["h"])
    shared = SnapKV(capacity=hp["num_kept"], pooling=hp["snap_pooling"], **sizes)
    _, (cache,) = called(*of_golden(golden, shared), x, positions, None, length)
    np.testing.assert_array_equal(cache["position"][..., 1:], a["snap_keep"])
    own = SnapKV(capacity=hp["capacity"], heads="query", **sizes)
    _, (cache,) = called(*of_golden(golden, own), x, positions, None, length)
    for name in ("k", "v"):  # theirs are in the order of their scores
        ours, theirs = np.asarray(cache[name][:, 1:]).swapaxes(1, 2), a[f"snaporig_avgpool_{name}"]
        ours, theirs = (x.reshape(-1, *x.shape[2:]) for x in (ours, theirs))
        for mine, other in zip(ours, theirs, strict=True):
            close(mine[np.lexsort(mine.T)], other[np.lexsort(other.T)], 1e-5, name)


# --- exactness ------------------------------------------------------------------------------------

ROOMY: dict[str, CachePolicy] = {
    "sinks_window": SinksWindow(sinks=1, window=LENGTH),
    "h2o": H2O(heavy=4, recent=LENGTH),
    "h2o_query": H2O(heavy=4, recent=LENGTH, heads="query"),
    "snapkv": SnapKV(capacity=LENGTH, window=3),
    "kivi": KIVI(bits=2, group_size=2, residual=LENGTH + 8),
}
LATENT: dict[str, Any] = dict(dim=DIM, num_heads=3, kv_rank=6, nope_dim=5, rope_dim=2, value_dim=7)
MIXERS: dict[str, Any] = {
    "attention": partial(Attention, **SIZES, sinks=True, softcap=3.0),
    "multi_query": partial(Attention, **(SIZES | {"num_kv_heads": 1})),
    "spark": partial(SparkAttention, **SIZES, predictor_dim=2, top_k=3),
    "mla": partial(MLA, **LATENT),
    "dsa": partial(DSA, **LATENT, q_rank=7, top_k=3, index_heads=2, index_dim=4),
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("policy", ROOMY)
def test_decoding_equals_the_full_forward_while_nothing_is_lost(mixer: str, policy: str) -> None:
    if (mixer, policy) == ("dsa", "h2o_query"):
        return  # it has one choice for all heads
    layer = MIXERS[mixer](cache=ROOMY[policy])
    params, x = draw(layer), rows()[:3]
    y, _ = called(layer, params, x, POSITIONS[:3], SEGMENTS[:3])
    ctx = Context(positions=jnp.asarray(POSITIONS[:3]), segment_ids=jnp.asarray(SEGMENTS[:3]))
    close(y, jax.jit(lambda: layer.apply(params, x, ctx)[0])(), 1e-4)


DROPPING = (
    "sinks_window",
    "sinks_window_in_cache",
    "h2o",
    "h2o_query",
    "snapkv",
    "snapkv_max_query",
)
EVERY_KEY = "cache: {}; {} needs every key, as Full and KIVI keep them"
REFUSED: dict[str, dict[str, str]] = {
    "window": {
        name: "cache: {} beside window 5; need Full, which keeps a window"
        for name in POLICIES
        if name != "full"
    },
    "nsa": dict.fromkeys(DROPPING, EVERY_KEY.replace("{} needs", "NSA needs")),
    "moba": dict.fromkeys(DROPPING, EVERY_KEY.replace("{} needs", "MoBA needs")),
    "mla": {"sinks_window_in_cache": "cache.in_cache: True; the keys of MLA keep their positions"},
    "dsa": dict.fromkeys(
        ("h2o_query", "snapkv_max_query"),
        "cache.heads: 'query'; DSA chooses the same keys for all heads",
    )
    | {"sinks_window_in_cache": "cache.in_cache: True; the keys of DSA keep their positions"},
    "shared": dict.fromkeys(
        DROPPING[2:], "source.cache: {}; keys of several layers need one that asks for no attention"
    ),
}


def sharing(cache: CachePolicy) -> Layer:
    reader = Block(mixer=SharedAttention(**SIZES), ffn=FFN, norm=NORM)
    source = Attention(**SIZES, cache=cache)
    return SharedKV(source=source, norm=NORM, blocks=Chain(layers=(reader,)))


MORE_MIXERS: dict[str, Any] = MIXERS | {
    "window": partial(Attention, **SIZES, window=5),
    "nsa": partial(NSA, **SIZES, block_size=4, num_selected=2, local_window=3),
    "moba": partial(MoBA, **SIZES, block_size=4, top_k=2),
    "shared": sharing,
}


@every_policy
@pytest.mark.parametrize("mixer", MORE_MIXERS)
def test_every_policy_serves_every_mixer_or_is_refused_in_one_line(mixer: str, name: str) -> None:
    policy, length = POLICIES[name], 64
    if message := REFUSED.get(mixer, {}).get(name):
        line = re.escape(message.format(type(policy).__name__))
        with pytest.raises(ValueError, match=f"^{line}$"):
            MORE_MIXERS[mixer](cache=policy).cache_spec(1, length)
        return
    layer = MORE_MIXERS[mixer](cache=policy)
    spec = layer.cache_spec(2, length)
    params, kept = layer.abstract(), jax.tree.map(lambda p: p.abstract(), spec, is_leaf=is_param)
    for size in (7, 1):
        x, at = jnp.zeros((2, size, DIM)), jnp.zeros((2, size), jnp.int32)
        ctx = Context(positions=at, segment_ids=at)
        y, after, _ = jax.eval_shape(layer.apply, params, x, ctx, kept)
        assert y.shape == x.shape
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, kept)
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("mixer", ["attention", "spark"])
def test_sinks_and_a_window_are_exact_for_a_mixer_that_sees_no_more(mixer: str) -> None:
    mask = Causal() & (Window(5) | Sinks(2))
    layer = MIXERS[mixer](mask=mask, cache=SinksWindow(sinks=2, window=5))
    params, x = draw(layer), rows()
    alone = np.array([0, 3, 4])
    y, caches = called(layer, params, x[alone], POSITIONS[alone], None)
    assert caches[-1]["k"].shape[1] == 7
    full = jax.jit(lambda x: layer.apply(params, x)[0])
    for row, at in zip(y, alone, strict=True):
        real = POSITIONS[at] >= 0
        moved = jnp.zeros_like(x[0]).at[: real.sum()].set(x[at, real])
        close(row[real], full(moved[None])[0, : real.sum()], 1e-4)


# --- sizes ----------------------------------------------------------------------------------------


def stored(layer: Layer, length: int, dtype: Any = jnp.bfloat16) -> int:
    """Bytes of keys and values for one sequence."""
    spec = layer.cache_spec(1, length, dtype)
    entries = {n: p for n, p in spec.items() if n not in ("position", "segment", "score", "count")}
    return sum(p.nbytes for p in params_of(entries))


def test_bytes_by_hand() -> None:
    """Per token 2 heads of 128 for keys and as many for values, 16 bits each."""
    sizes = dict(dim=8, num_heads=4, num_kv_heads=2, head_dim=128)
    token = 2 * 2 * 128 * 2
    by_policy: dict[CachePolicy, tuple[float, float]] = {
        Full(): (512, 4096),
        SinksWindow(sinks=4, window=252): (256, 256),
        H2O(heavy=100, recent=28): (128, 128),
        H2O(heavy=100, recent=28, heads="query"): (256, 256),
        SnapKV(capacity=96, window=32, room=32): (128, 128),
    }
    for policy, tokens in by_policy.items():
        layer = Attention(**sizes, cache=policy)
        assert [stored(layer, n) for n in (512, 4096)] == [token * n for n in tokens]
    for bits in (2, 4, 8):  # codes, and a scale and a minimum for each group; the tails beside them
        policy = KIVI(bits=bits, group_size=32, residual=64)
        coded = bits / 16 + 2 * 16 / (16 * 32)
        keys, values, tails = 4096 * coded, (4096 - 64) * coded, 2 * 64
        assert stored(Attention(**sizes, cache=policy), 4096) == token / 2 * (keys + values + tails)
    latents = MLA(dim=8, num_heads=4, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert stored(latents, 4096) == 4096 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinksWindow(sinks=0), "sinks: 0; need at least 1"),
        (lambda: H2O(recent=0), "recent: 0; need at least 1"),
        (lambda: H2O(heads="all"), "heads: 'all'; need one of kv, query"),  # type: ignore[arg-type]
        (lambda: SnapKV(capacity=7, window=8), "capacity: 7; need at least window 8"),
        (lambda: SnapKV(kernel=4), "kernel: 4; need an odd number"),
        (lambda: SnapKV(pooling="sum"), "pooling: 'sum'; need avg or max"),  # type: ignore[arg-type]
        (lambda: KIVI(bits=3), "bits: 3; need one of 2, 4, 8"),
        (
            lambda: KIVI(group_size=32, residual=80),
            "residual: 80; need a multiple of group_size 32",
        ),
        (lambda: KIVI(group_size=4, residual=8), "residual: 8; need a multiple of 16"),
        (
            lambda: Attention(**SIZES, cache=KIVI()).cache_spec(1, 256),
            "group_size: 32 does not divide 4 channels of a head",
        ),
        (
            lambda: Attention(**SIZES, window=5, cache=H2O()).cache_spec(1, 256),
            "cache: H2O beside window 5; need Full, which keeps a window",
        ),
        (
            lambda: DSA(
                **LATENT, q_rank=7, top_k=2, index_heads=2, index_dim=4, cache=H2O(heads="query")
            ),
            "cache.heads: 'query'; DSA chooses the same keys for all heads",
        ),
        (
            lambda: MoBA(**SIZES, block_size=4, top_k=2, cache=SinksWindow()),
            "cache: SinksWindow; MoBA needs every key, as Full and KIVI keep them",
        ),
        (
            lambda: SharedKV(
                source=Attention(**SIZES, cache=H2O()), norm=NORM, blocks=Chain(layers=())
            ),
            "source.cache: H2O; keys of several layers need one that asks for no attention",
        ),
        (
            lambda: SharedKV(
                source=MoBA(**SIZES, block_size=4, top_k=2), norm=NORM, blocks=Chain(layers=())
            ),
            "source: MoBA; need attention that chooses no blocks of keys",
        ),
        (
            lambda: cross_layer(vocab_size=9, num_layers=3, attention=Attention(**SIZES), ffn=FFN),
            "sharing: 2 does not divide num_layers 3",
        ),
    ],
)
def test_impossible_policies_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


# --- keys and values of several layers ------------------------------------------------------------


def test_cross_layer_attention_halves_the_cache_and_keeps_to_its_document() -> None:
    sizes: dict[str, Any] = dict(vocab_size=31, num_layers=4, ffn=FFN)
    plain = llama(**sizes, attention=Attention(**SIZES))
    model = cross_layer(
        **sizes, attention=Attention(**SIZES, cache=KIVI(group_size=2, residual=32))
    )
    exact = cross_layer(**sizes, attention=Attention(**SIZES))
    # half the keys and values, and a norm of their own for each pair
    assert plain.count().total - exact.count().total == 2 * (2 * DIM * KV_HEADS * HEAD - DIM)
    cached = [sum(p.nbytes for p in params_of(m.cache_spec(1, 64))) - 4 for m in (plain, exact)]
    assert cached[0] == 2 * cached[1]
    params = draw(exact)
    tokens = jnp.asarray(np.random.default_rng(3).integers(31, size=POSITIONS[:3].shape))
    ctx = Context(positions=jnp.asarray(POSITIONS[:3]), segment_ids=jnp.asarray(SEGMENTS[:3]))
    full = jax.jit(lambda: exact.apply(params, tokens, ctx)[0])()
    for decoder in (exact, model):
        y, _ = called(decoder, params, tokens, POSITIONS[:3], SEGMENTS[:3])
        close(y, full, 1e-4)
    alone = jax.jit(lambda: exact.apply(params, tokens[1:2, 9:])[0])()
    close(full[1:2, 9:], alone, 1e-4)
    grads = jax.jit(jax.grad(lambda p: exact.apply(p, tokens, ctx)[0].sum()))(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_shared_attention_needs_somebody_to_share_with() -> None:
    layer = SharedAttention(**SIZES)
    with pytest.raises(ValueError, match=r"^ctx.shared: no 'kv'"):
        layer.apply(draw(layer), rows())
