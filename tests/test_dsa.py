"""DeepSeek sparse attention: parity with DeepSeek-V3.2, its two stages, decoding, isolation."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.eval.accounting import account
from bestiary.layers import DEFAULT_RULES, DSA, MLA, Context, Rope, SinksWindow, use_rules
from bestiary.layers.base import flatten
from bestiary.layers.dsa import choose

BATCH, LENGTH, DIM = 3, 12, 20
SIZES: dict[str, Any] = {"dim": DIM, "num_heads": 4, "nope_dim": 6, "rope_dim": 4, "value_dim": 7}
SIZES |= {"q_rank": 9, "index_heads": 3, "index_dim": 8}
# a mask over the keys of all heads, and gathered latents
FORMS = {
    "masked": DSA(**SIZES, kv_rank=96, top_k=5),
    "gathered": DSA(**SIZES, kv_rank=3, top_k=5),
}
every_form = pytest.mark.parametrize("name", FORMS)
X = np.random.default_rng(1).normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
SEGMENTS = np.array([[1] * 12, [1] * 5 + [2] * 7, [1] * 4 + [2] * 4 + [0] * 4])


def dsa_of(hp: dict) -> DSA:
    assert not hp["index_rope_interleave"] or hp["rope_interleave"]
    return DSA(
        dim=hp["hidden_size"],
        num_heads=hp["num_attention_heads"],
        kv_rank=hp["kv_lora_rank"],
        q_rank=hp["q_lora_rank"],
        nope_dim=hp["qk_nope_head_dim"],
        rope_dim=hp["qk_rope_head_dim"],
        value_dim=hp["v_head_dim"],
        rope=Rope(theta=hp["rope_theta"], interleaved=hp["rope_interleave"]),
        norm_eps=hp["rms_norm_eps"],
        scale=hp["attention_scale"],
        top_k=hp["index_topk"],
        index_heads=hp["index_n_heads"],
        index_dim=hp["index_head_dim"],
        index_rope=Rope(theta=hp["rope_theta"], interleaved=hp["index_rope_interleave"]),
        index_norm_eps=hp["index_norm_eps"],
    )


def from_torch(layer: DSA, a: dict[str, np.ndarray]) -> Any:
    """Parameters from (out, in) matrices."""
    kv = a["w_kv_b_proj_weight"].T.reshape(layer.kv_rank, layer.num_heads, -1)
    query, index = a["w_q_b_proj_weight"].T, a["w_indexer_wq_b_weight"].T
    return {
        "query_down": a["w_q_a_proj_weight"].T,
        "query_norm": {"weight": a["w_q_a_layernorm_weight"]},
        "query": query.reshape(layer.q_rank, layer.num_heads, -1),
        "kv_down": a["w_kv_a_proj_with_mqa_weight"].T,
        "kv_norm": {"weight": a["w_kv_a_layernorm_weight"]},
        "key": kv[..., : layer.nope_dim],
        "value": kv[..., layer.nope_dim :],
        "out": a["w_o_proj_weight"].T.reshape(layer.num_heads, layer.value_dim, -1),
        "indexer": {
            "query": index.reshape(layer.q_rank, layer.index_heads, -1),
            "key": a["w_indexer_wk_weight"].T,
            "key_norm": {
                "weight": a["w_indexer_k_norm_weight"],
                "bias": a["w_indexer_k_norm_bias"],
            },
            "weight": a["w_indexer_weights_proj_weight"].T,
        },
    }


@pytest.mark.golden("dsa_attention")
def test_equals_deepseek(golden: SimpleNamespace) -> None:
    a = golden.arrays
    layer = dsa_of(golden.hp)
    params, x = from_torch(layer, a), jnp.asarray(a["x"])

    @jax.jit
    def run(params: Any, x: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        positions = jnp.arange(x.shape[1])[None]
        latent = layer.query_latent(params, x)
        q, w = layer.indexer.queries(params["indexer"], x, latent, positions)
        keys = layer.indexer.keys(params["indexer"], x, positions)
        return out, pull(jnp.asarray(a["cot"])), layer.indexer.scores(q, w, keys)

    out, (grads, dx), scores = run(params, x)
    close(scores, a["index_scores"], rtol=1e-5)
    causal = np.tril(np.ones(scores.shape[1:], bool))[None]
    np.testing.assert_array_equal(choose(scores, causal, layer.top_k), a["keep"])
    close(out, a["out"], rtol=1e-5)
    close(dx, a["d_x"], rtol=1e-5)
    close(grads["query"].reshape(layer.q_rank, -1).T, a["d_q_b"], rtol=1e-5)
    kv = np.concatenate((grads["key"], grads["value"]), -1)
    close(kv.reshape(layer.kv_rank, -1).T, a["d_kv_b"], rtol=1e-5)
    assert all(not np.any(g) for _, g in flatten(grads["indexer"]))  # the choice has no gradient


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 4, 9]), st.sampled_from([3, 8]))
def test_chooses_the_largest_and_of_equal_ones_the_first(seed: int, top_k: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (2, 3, size)).astype(np.float32)  # many ties
    seen = rng.random(scores.shape) < 0.7
    chosen = np.asarray(choose(jnp.asarray(scores), jnp.asarray(seen), top_k))
    for at in np.ndindex(2, 3):
        order = sorted(np.flatnonzero(seen[at]), key=lambda i: (-scores[at][i], i))
        assert set(np.flatnonzero(chosen[at])) == set(order[:top_k])


def test_both_forms_are_one_function() -> None:
    layer = FORMS["gathered"]
    assert layer.gathers(LENGTH) and not FORMS["masked"].gathers(LENGTH)
    params = draw(layer)

    class Masked(DSA):
        def gathers(self, slots: int) -> bool:
            return False

    ctx = Context(segment_ids=jnp.asarray(SEGMENTS))

    def run(layer: DSA) -> Any:
        def loss(params: Any, x: Any) -> Any:
            y, _, aux = layer.apply(params, x, ctx)
            y = ctx.without_padding(y)
            return jnp.sin(y).sum() + aux.losses["indexer"], (y, aux)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, X)

    masked = Masked(**{name: getattr(layer, name) for name in layer.__dataclass_fields__})
    one, other = run(layer), run(masked)
    for (path, a), (_, b) in zip(flatten(one[0][0]), flatten(other[0][0]), strict=True):
        assert np.any(a), path
        close(a, b, rtol=1e-4)
    close(one[0][1], other[0][1], rtol=1e-4)
    close(one[1][0], other[1][0], rtol=1e-5)
    close(one[1][1].losses["indexer"], other[1][1].losses["indexer"], rtol=1e-5)


def test_a_decoded_token_scores_the_keys_that_are_kept() -> None:
    def flops(window: int) -> float:
        cache = SinksWindow(sinks=1, window=window)
        return account(replace(FORMS["masked"], cache=cache), 40).decode_flops_active

    a_score = 2 * SIZES["index_heads"] * (SIZES["index_dim"] + 1)
    assert flops(20) - flops(9) == pytest.approx(11 * a_score)


def test_with_room_for_all_keys_it_is_mla() -> None:
    layer = DSA(**SIZES, kv_rank=5, top_k=LENGTH)
    params = draw(layer)
    plain = {n: getattr(layer, n) for n in MLA.__dataclass_fields__}
    ctx = Context(segment_ids=jnp.asarray(SEGMENTS))
    y, expected = (
        jax.jit(lambda p, m=m: ctx.without_padding(m.apply(p, X, ctx)[0]))(params)
        for m in (layer, MLA(**plain))
    )
    close(y, expected, rtol=1e-5)


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_the_indexer_learns_what_the_heads_attend_to(stage: Any) -> None:
    """The loss against an oracle in float64, and what its gradient reaches."""
    layer = DSA(**SIZES, kv_rank=5, top_k=4, stage=stage)
    params = draw(layer)
    ctx = Context(segment_ids=jnp.asarray(SEGMENTS))

    def loss(params: Any, x: Any) -> Any:
        return layer.apply(params, x, ctx)[2].losses["indexer"]

    value, (grads, dx) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)
    assert not np.any(dx)
    for path, g in flatten(grads):
        assert np.any(g) == path.startswith("indexer/"), path

    positions = jnp.arange(LENGTH)[None]
    latent = layer.query_latent(params, X)
    q = np.float64(layer.queries(params, latent, positions))
    k, _ = (np.float64(a) for a in layer.expand(params, layer.latents(params, X, positions)))
    index = layer.indexer.queries(params["indexer"], X, latent, positions)
    scores = layer.indexer.scores(*index, layer.indexer.keys(params["indexer"], X, positions))
    scores = np.float64(scores)
    total, tokens = 0.0, 0
    for b, t in np.ndindex(BATCH, LENGTH):
        if not SEGMENTS[b, t]:
            continue
        keys = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
        if stage == "sparse":
            keys = sorted(keys, key=lambda s: -scores[b, t, s])[: layer.top_k]
        logits = np.einsum("nh,snh->ns", q[b, t], k[b, keys]) * layer.query_dim**-0.5
        attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        p = attention.sum(0) / attention.sum()
        log_q = scores[b, t, keys] - np.log(np.exp(scores[b, t, keys]).sum())
        total += (p * (np.log(p) - log_q)).sum()
        tokens += 1
    close(value, total / tokens, rtol=1e-4)


@every_form
def test_decoding_equals_the_full_forward(name: str) -> None:
    layer = FORMS[name]
    params = draw(layer)
    full = jax.jit(layer.apply)(params, X)[0]
    step = jax.jit(lambda x, ctx, cache: layer.apply(params, x, ctx, cache)[:2])
    cache, parts = layer.init_cache(BATCH, LENGTH), []
    for first, last in [(0, 5), (5, 8), *((t, t + 1) for t in range(8, LENGTH))]:
        positions = jnp.broadcast_to(jnp.arange(first, last), (BATCH, last - first))
        y, cache = step(X[:, first:last], Context(positions=positions), cache)
        parts.append(y)
    close(jnp.concatenate(parts, 1), full, rtol=1e-5)


@every_form
def test_neither_the_future_nor_another_document_leaks(name: str) -> None:
    layer = FORMS[name]
    params = draw(layer)
    run = jax.jit(lambda x: layer.apply(params, x, Context(segment_ids=jnp.asarray(SEGMENTS)))[0])
    y, changed = run(X), X.copy()
    changed[:, 8:] += 1
    np.testing.assert_array_equal(run(changed)[:, :8], y[:, :8])
    changed = X.copy()
    changed[1, :5] += 1
    np.testing.assert_array_equal(run(changed)[1, 5:], y[1, 5:])


def test_long_rows_equal_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries in parts, of which the last is not full."""
    layer = FORMS["masked"]
    params = draw(layer)

    def run() -> Any:
        def loss(params: Any) -> Any:
            y, _, aux = layer.apply(params, X)
            return jnp.sin(y).sum() + aux.losses["indexer"]

        return jax.jit(jax.value_and_grad(loss))(params)

    whole = run()
    monkeypatch.setattr("bestiary.kernels.block_attention.blocks.QUERIES", 5)
    monkeypatch.setattr("bestiary.kernels.block_attention.blocks.WHOLE", 5, raising=False)
    parts = run()
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-4), parts, whole)


@every_form
def test_sharded_over_heads_and_rows(name: str, mesh: Any) -> None:
    layer = FORMS[name]
    params, x = draw(layer), np.concatenate((X, X[:1] + 1))

    def loss(params: Any) -> Any:
        y, _, aux = layer.apply(params, x)
        return jnp.sin(y).sum() + aux.losses["indexer"]

    expected = jax.jit(jax.value_and_grad(loss))(params)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.tree.map(
            lambda p, s: jax.device_put(p, s.sharding), params, layer.abstract(mesh)
        )
        value = jax.jit(jax.value_and_grad(loss))(placed)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-4), value, expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"q_rank": None}, "q_rank: None"),
        ({"top_k": 0}, "top_k: 0"),
        ({"index_dim": 3}, "rope_dim: 4"),
        ({"stage": "dense"}, "stage: 'dense'; need one of warmup, sparse"),
    ],
)
def test_refuses(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSA(**SIZES | {"kv_rank": 5, "top_k": 4} | wrong)
