"""Linear attention, the gated delta rule and Performer: recurrences in float64, published code,
documents, padding, decoding, sharding."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bestiary.layers import (
    DEFAULT_RULES,
    Attention,
    GatedDeltaNet,
    GatedLinearAttention,
    Layer,
    Performer,
    pspec,
    use_rules,
)
from bestiary.layers.base import Context
from bestiary.layers.delta_rule import delta_rule
from bestiary.layers.linear_attention import linear_attention
from bestiary.layers.performer import exponents, orthogonal

BATCH, LENGTH, DIM = 2, 21, 12
MIXERS: dict[str, Layer] = {
    "gla": GatedLinearAttention(dim=DIM, num_heads=4, key_dim=6, value_dim=10, rank=3, chunk=8),
    "delta": GatedDeltaNet(
        dim=DIM, num_heads=4, num_key_heads=2, key_dim=6, value_dim=10, kernel=3, chunk=8
    ),
    "performer": Performer(dim=DIM, num_heads=4, head_dim=6, num_features=14, chunk=8),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)

LENGTHS = (6, 11, 4)  # of the documents of a row
SEGMENTS = np.repeat([[1, 2, 3]], BATCH, 0).repeat(LENGTHS, axis=1)
POSITIONS = np.broadcast_to(np.concatenate([np.arange(n) for n in LENGTHS]), SEGMENTS.shape)
PACKED = Context(positions=jnp.asarray(POSITIONS), segment_ids=jnp.asarray(SEGMENTS))


def close(actual: Any, expected: Any, name: str = "", rtol: float = 1e-5) -> None:
    """Equal to `rtol` of the largest entry."""
    expected = np.asarray(expected)
    atol = rtol * float(np.abs(expected).max(initial=1e-30))
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)


# --- the recurrences ------------------------------------------------------------------------------


def write(state: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """diag(exp(decay)) S + k v^T."""
    return np.exp(decay)[..., None] * state + k[..., None] * v[..., None, :]


def replace(
    state: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray
) -> np.ndarray:
    """exp(decay) (I - beta k k^T) S + beta k v^T."""
    state = np.exp(decay)[..., None, None] * state
    v = beta[..., None] * (v - np.einsum("bhn,bhnp->bhp", k, state))
    return state + k[..., None] * v[..., None, :]


def by_tokens(
    rule: Callable, q: Any, rows: Any, state: Any, documents: Any
) -> tuple[np.ndarray, np.ndarray]:
    """A recurrence one token after another, in float64."""
    q, *rows = (np.asarray(x, np.float64) for x in (q, *rows))
    state, before, ys = np.asarray(state, np.float64), np.zeros(len(q), np.int32), []
    for t in range(q.shape[1]):
        same = documents[:, t] == before
        state = rule(state * same[:, None, None, None], *(x[:, t] for x in rows))
        ys.append(np.einsum("bhn,bhnp->bhp", q[:, t], state))
        before = documents[:, t]
    return np.stack(ys, 1), state


def cases() -> dict[str, tuple[Callable, Callable, tuple, Any]]:
    """Name -> (operation, its rule, (q, rows...), state)."""
    rng = np.random.default_rng(0)
    heads, n, p = 3, 4, 6

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=(BATCH, LENGTH, heads, *shape)).astype(np.float32)

    q, k, v = draw(n), draw(n), draw(p)
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    alike = np.broadcast_to(unit[:, :1], unit.shape).copy()
    slow = -np.abs(draw(n)) / 8
    # forgotten at once, or never
    harsh = np.where(rng.random(slow.shape) < 0.2, -300.0, 0.0).astype(np.float32)
    beta = rng.uniform(size=(BATCH, LENGTH, heads)).astype(np.float32)
    state = rng.normal(size=(BATCH, heads, n, p)).astype(np.float32)
    return {
        "per channel": (linear_attention, write, (q, k, v, slow), state),
        "per head": (linear_attention, write, (q, k, v, slow[..., :1]), state),
        "harsh": (linear_attention, write, (q, k, v, harsh), state),
        "delta rule": (delta_rule, replace, (q, unit, v, slow[..., 0], beta), state),
        "delta rule, harsh": (delta_rule, replace, (q, unit, v, harsh[..., 0], beta), state),
        "delta rule, one key": (
            delta_rule,
            replace,
            (q, alike, v, np.zeros_like(beta), np.ones_like(beta)),
            state,
        ),
    }


DOCUMENTS = np.stack([np.repeat([0, 1, 2], (6, 11, 4)), np.repeat([1, 3], (1, 20))]).astype("int32")


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("name", cases())
def test_chunks_equal_the_recurrence(name: str, chunk: int) -> None:
    """Values, and gradients by finite differences of the recurrence in float64."""
    operation, rule, (q, *rows), state = cases()[name]
    rng = np.random.default_rng(1)
    args = {str(i): jnp.asarray(x) for i, x in enumerate((q, *rows, state))}

    @jax.jit
    def run(args: dict, cotangents: Any) -> Any:
        def f(args: dict) -> Any:
            return operation(*args.values(), documents=DOCUMENTS, chunk=chunk)

        y, back = jax.vjp(f, args)
        return y, back(cotangents)[0]

    expected = by_tokens(rule, q, rows, state, DOCUMENTS)
    cotangents = tuple(rng.normal(size=x.shape).astype(np.float32) for x in expected)
    actual, grads = run(args, cotangents)
    close(actual[0], expected[0], "y", 2e-6)
    close(actual[1], expected[1], "state", 2e-6)

    def loss(args: dict) -> float:
        q, *rows, state = args.values()
        results = by_tokens(rule, q, rows, state, DOCUMENTS)
        return sum((x * c).sum() for x, c in zip(results, cotangents, strict=True))

    wide = {i: np.float64(x) for i, x in args.items()}
    for i, g in grads.items():
        direction, eps = rng.normal(size=g.shape), 1e-6
        sides = [loss(wide | {i: wide[i] + s * eps * direction}) for s in (1, -1)]
        slope = (sides[0] - sides[1]) / (2 * eps)
        assert (g * direction).sum() == pytest.approx(slope, abs=2e-5 * float(np.linalg.norm(g))), i


# --- the mixers -----------------------------------------------------------------------------------


@cache
def drawn(name: str) -> tuple[Any, jax.Array]:
    """Parameters away from their initial zeros and ones, and an input."""
    rng = np.random.default_rng(2)
    params = MIXERS[name].init(jax.random.key(0))
    params = jax.tree.map(
        lambda p: jnp.asarray(p + 0.1 * rng.normal(size=p.shape), jnp.float32), params
    )
    return params, jnp.asarray(rng.normal(size=(BATCH, LENGTH, DIM)), jnp.float32)


@cache
def compiled(name: str) -> Callable:
    return jax.jit(lambda params, x, ctx, cache: MIXERS[name].apply(params, x, ctx, cache)[:2])


def full(name: str, x: jax.Array, ctx: Context = Context()) -> jax.Array:
    return compiled(name)(drawn(name)[0], x, ctx, None)[0]


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda p: np.asarray(p, np.float64), tree)


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_gated_linear_attention_is_its_formula() -> None:
    params, x = drawn("gla")
    layer: Any = MIXERS["gla"]
    w, u = wide(params), np.float64(x)
    q, k, v, gate = (
        np.einsum("bsd,dnh->bsnh", u, w[name]) for name in ("query", "key", "value", "gate")
    )
    z = np.einsum("bsd,dr,rnh->bsnh", u, w["decay_down"], w["decay"]) + w["decay_bias"]
    decay = -np.log1p(np.exp(-z)) / 16
    zeros = np.zeros((BATCH, 4, layer.key_dim, layer.value_dim))
    o, _ = by_tokens(write, q / math.sqrt(6), (k, v, decay), zeros, np.zeros((BATCH, LENGTH)))
    y = rms(o, layer.norm_eps) * w["norm"]["weight"] * silu(gate)
    close(full("gla", x), np.einsum("bsnh,nhd->bsd", y, w["out"]))


def test_gated_delta_net_is_that_of_qwen3_next() -> None:
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("transformers.models.qwen3_next")
    config = published.Qwen3NextConfig(
        hidden_size=DIM,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=6,
        linear_value_head_dim=10,
        linear_conv_kernel_dim=3,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    module = published.modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    params, x = drawn("delta")
    w = jax.tree.map(np.asarray, params)

    def grouped(name: str) -> np.ndarray:
        """By key head, as the published weight is."""
        return w[name].reshape(DIM, 2, -1)

    qkvz = np.concatenate([grouped(name) for name in ("query", "key", "value", "gate")], -1)
    ba = np.concatenate([grouped(name) for name in ("beta", "decay")], -1)
    conv = np.concatenate([w[f"{n}_conv"]["weight"] for n in ("query", "key", "value")], -1)
    state = {
        "in_proj_qkvz.weight": qkvz.reshape(DIM, -1).T,
        "in_proj_ba.weight": ba.reshape(DIM, -1).T,
        "conv1d.weight": conv.T[:, None],
        "dt_bias": w["dt_bias"],
        "A_log": w["A_log"],
        "norm.weight": w["norm"]["weight"],
        "out_proj.weight": w["out"].T,
    }
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
    with torch.no_grad():
        expected = module(torch.from_numpy(np.array(x)))
    close(full("delta", x), expected.numpy())


@every_mixer
def test_decoding_equals_the_full_sequence(name: str) -> None:
    """In chunks, token by token, and with padding between."""
    params, x = drawn(name)
    y, cache = full(name, x), MIXERS[name].init_cache(BATCH, 99)
    sizes = [leaf.shape for leaf in jax.tree.leaves(cache)]
    assert sizes == [leaf.shape for leaf in jax.tree.leaves(MIXERS[name].init_cache(BATCH, 7))]
    parts = []
    for start, stop in ((0, 13), (13, 18), (18, 19), (19, 20), (20, 21)):
        ctx = Context(positions=jnp.broadcast_to(jnp.arange(start, stop), (BATCH, stop - start)))
        part, cache = compiled(name)(params, x[:, start:stop], ctx, cache)
        parts.append(part)
    close(jnp.concatenate(parts, 1), y, rtol=2e-5)


@every_mixer
def test_padding_is_not_seen(name: str) -> None:
    """Padding on either side and between, of any content: real tokens read the same."""
    params, x = drawn(name)
    places = np.array([-1, 0, 1, -1, 2, 3, 4, -1])
    real = places >= 0
    tokens = jnp.full((BATCH, len(places), DIM), 7.0).at[:, real].set(x[:, : real.sum()])
    positions = jnp.broadcast_to(jnp.asarray(places), tokens.shape[:2])
    empty = MIXERS[name].init_cache(BATCH, 8)
    padded, cache = compiled(name)(params, tokens, Context(positions=positions), empty)
    plain = Context(positions=jnp.broadcast_to(jnp.arange(real.sum()), (BATCH, real.sum())))
    expected, expected_cache = compiled(name)(params, x[:, : real.sum()], plain, empty)
    close(padded[:, real], expected)
    jax.tree.map(close, cache, expected_cache)
    nothing = Context(positions=jnp.full(tokens.shape[:2], -1))
    _, same = compiled(name)(params, tokens, nothing, cache)
    jax.tree.map(np.testing.assert_array_equal, same, cache)


@every_mixer
def test_documents_and_the_future_are_not_seen(name: str) -> None:
    """Other documents, and later tokens of one's own, change no bit; a document alone reads the
    same."""
    _, x = drawn(name)
    y = full(name, x, PACKED)
    for document in (1, 2, 3):
        mine = SEGMENTS[0] == document
        other = jnp.where(mine[:, None], x, 30 - 20 * x)
        np.testing.assert_array_equal(full(name, other, PACKED)[:, mine], y[:, mine])
        close(full(name, x[:, mine]), y[:, mine], rtol=2e-5)
    for place in (3, 9, 20):
        later = x.at[:, place:].multiply(-9.0)
        changed = full(name, later, PACKED)
        np.testing.assert_array_equal(changed[:, :place], y[:, :place])
        assert (changed[:, place] != y[:, place]).any()


@every_mixer
def test_documents_go_on_and_end_between_calls(name: str) -> None:
    params, x = drawn(name)
    y, cache, parts = full(name, x, PACKED), MIXERS[name].init_cache(BATCH, 8), []
    for start, stop in ((0, 6), (6, 11), (11, 21)):
        ctx = jax.tree.map(lambda row, a=start, b=stop: row[:, a:b], PACKED)
        part, cache = compiled(name)(params, x[:, start:stop], ctx, cache)
        parts.append(part)
    close(jnp.concatenate(parts, 1), y, rtol=2e-5)


@every_mixer
def test_sharded_over_heads_equals_unsharded(name: str, mesh: jax.sharding.Mesh) -> None:
    params, x = drawn(name)
    x = jnp.concatenate((x, x[::-1]))  # as many rows as devices that share the batch

    def run(params: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            y = MIXERS[name].apply(params, x)[0]
            return jnp.square(y).sum(), y

        return jax.grad(loss, has_aux=True)(params)

    expected = jax.jit(run)(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        shardings = jax.tree.map(lambda s: s.sharding, MIXERS[name].abstract(mesh))
        rows = jax.NamedSharding(mesh, pspec("batch", None, None) or jax.P())
        actual = jax.jit(run)(jax.device_put(params, shardings), jax.device_put(x, rows))
    jax.tree.map(partial(close, rtol=2e-5), actual, expected)


@every_mixer
def test_a_bfloat16_step_is_finite(name: str) -> None:
    layer, (params, x) = MIXERS[name], drawn(name)
    optimiser = optax.sgd(0.02)

    @jax.jit
    def step(params: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.square(layer.apply(params, x)[0].astype(jnp.float32)).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, _ = optimiser.update(grads, optimiser.init(params))
        return value, optax.apply_updates(params, updates)

    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    before, params = step(params, x.astype(jnp.bfloat16))
    after, params = step(params, x.astype(jnp.bfloat16))
    assert all(np.isfinite(leaf.astype(jnp.float32)).all() for leaf in jax.tree.leaves(params))
    assert after < before


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: GatedLinearAttention(dim=4, num_heads=1, key_dim=2, value_dim=2, chunk=6),
            "chunk: 6",
        ),
        (lambda: Performer(dim=4, num_heads=1, head_dim=3), "odd|even"),
        (lambda: Performer(dim=4, num_heads=1, head_dim=4, num_features=0), "num_features: 0"),
        (
            lambda: GatedDeltaNet(dim=4, num_heads=3, num_key_heads=2, key_dim=2, value_dim=2),
            "num_key_heads: 2 does not divide num_heads 3",
        ),
    ],
)
def test_impossible_hyperparameters_are_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- Performer ------------------------------------------------------------------------------------


def test_features_estimate_the_softmax_kernel_without_bias() -> None:
    """The mean over 4000 draws is within 4 standard errors of exp(q k), for every pair."""
    rng = np.random.default_rng(3)
    width, features, draws = 6, 8, 4000
    q, k = (jnp.asarray(0.3 * rng.normal(size=(5, 1, width)), jnp.float32) for _ in "qk")

    def estimate(key: jax.Array) -> jax.Array:
        w = orthogonal(key, (1, width, features), jnp.float32)
        return jnp.exp(exponents(q, w)[:, None] + exponents(k, w)[None]).mean(-1)[..., 0]

    estimates = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), draws))
    error = np.abs(np.mean(estimates, 0) - np.exp(np.asarray(q[:, 0]) @ np.asarray(k[:, 0]).T))
    assert (error < 4 * np.std(estimates, 0) / math.sqrt(draws)).all()


def test_features_are_orthogonal_and_as_long_as_normal_ones() -> None:
    w = np.asarray(orthogonal(jax.random.key(0), (3, 6, 14), jnp.float32))
    for group in (w[..., :6], w[..., 6:12], w[..., 12:]):
        gram = group.swapaxes(1, 2) @ group
        np.testing.assert_allclose(gram * (1 - np.eye(gram.shape[-1])), 0, atol=1e-5)
    many = np.asarray(orthogonal(jax.random.key(1), (1, 6, 6000), jnp.float32))
    assert np.square(many).sum(1).mean() == pytest.approx(6, rel=0.03)
    assert many.mean() == pytest.approx(0, abs=0.02)


def test_performer_is_its_formula_and_nears_attention() -> None:
    """Equal to a matrix of feature products in float64, and with more features to `Attention` of
    the same parameters."""
    attention = Attention(dim=DIM, num_heads=4, num_kv_heads=4, head_dim=6)
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(BATCH, LENGTH, DIM)), jnp.float32)
    params = attention.init(jax.random.key(0))
    params |= {name: params[name] / 2 for name in ("query", "key")}  # the variance is theirs
    q, k = (
        wide(
            attention.rotate(jnp.einsum("bsd,dnh->bsnh", x, params[name]), jnp.arange(LENGTH)[None])
        )
        for name in ("query", "key")
    )
    v, out = np.einsum("bsd,dnh->bsnh", wide(x), wide(params["value"])), wide(params["out"])
    exact, errors = np.asarray(attention.apply(params, x)[0]), []
    for features in (16, 1024):
        layer = Performer(dim=DIM, num_heads=4, head_dim=6, num_features=features, chunk=8)
        both = layer.init(jax.random.key(1)) | params
        y = np.asarray(jax.jit(layer.apply)(both, x)[0])
        phi = [
            np.exp(
                np.einsum("bsnh,nhm->bsnm", u / 6**0.25, wide(both["features"]))
                - np.square(u / 6**0.25).sum(-1, keepdims=True) / 2
            )
            for u in (q, k)
        ]
        scores = np.tril(np.einsum("bsnm,btnm->bnst", *phi))
        mixed = np.einsum("bnst,btnh->bsnh", scores / scores.sum(-1, keepdims=True), v)
        close(y, np.einsum("bsnh,nhd->bsd", mixed, out))
        errors.append(np.linalg.norm(y - exact) / np.linalg.norm(exact))
    assert errors[1] < 0.1 and errors[1] < errors[0] / 3


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_performer_is_finite_where_its_kernel_is_not(size: float) -> None:
    """Keys whose exponents leave the range of float32, alone and among small ones."""
    layer: Any = MIXERS["performer"]
    params, x = drawn("performer")
    x = x.at[:, ::5].multiply(size)

    def loss(params: Any) -> jax.Array:
        return jnp.square(layer.apply(params, x)[0]).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
