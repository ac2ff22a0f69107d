"""BlockFFN: parity with the released code, its losses and statistics in packed rows, its state."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.layers import (
    DEFAULT_RULES,
    BlockFFN,
    Context,
    Gelu,
    GeluTanh,
    Layer,
    Relu,
    Repeat,
    RMSNorm,
    Silu,
    use_rules,
)
from bestiary.layers import blockffn as b
from bestiary.layers.base import advance, flatten
from bestiary.layers.blockffn import AdaptiveFactor
from bestiary.zoo import blockffn as zoo
from bestiary.zoo import llama
from bestiary.zoo.decoder import Block

DIM, EXPERTS, WIDTH = 12, 10, 3
FACTOR = AdaptiveFactor(start=0.3, stable_steps=4, step_size=2)
LAYER = BlockFFN(
    dim=DIM, num_experts=EXPERTS, expert_dim=WIDTH, locality=0.2, sparsity=FACTOR, chunk=4, window=3
)


STACK = Repeat(
    block=Block(mixer=llama.multi_head(DIM, 2), ffn=LAYER, norm=RMSNorm(dim=DIM)), n=2, remat="full"
)


@cache
def initial(layer: Layer) -> Any:
    return layer.init(jax.random.key(0))


def close(actual: Any, expected: Any, name: str = "", rtol: float = 1e-5) -> None:
    expected = np.asarray(expected)
    atol = rtol * float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(
        np.asarray(actual).reshape(expected.shape), expected, rtol=rtol, atol=atol, err_msg=name
    )


# --- golden ---------------------------------------------------------------------------------------

ACTIVATIONS = {"silu": Silu, "relu": Relu, "gelu": Gelu, "gelu_pytorch_tanh": GeluTanh}


def layer_of(hp: dict) -> BlockFFN:
    assert hp["router_activation"] == "relu" and not hp["gated_experts"]
    return BlockFFN(
        dim=hp["hidden_size"],
        num_experts=hp["num_experts"],
        expert_dim=hp["expert_intermediate_size"],
        activation=ACTIVATIONS[hp["expert_activation"]](),
        eps=hp["rms_norm_eps"],
    )


@pytest.mark.golden("blockffn")
def test_layer(golden: SimpleNamespace) -> None:
    a, layer = golden.arrays, layer_of(golden.hp)
    names = {"router": "W_router", "gain": "g_norm", "up": "W_up", "down": "W_down"}
    params = {ours: jnp.asarray(a[theirs].T) for ours, theirs in names.items()} | {"activation": {}}
    x = jnp.asarray(a["x"])

    def run(params: Any, x: jax.Array) -> tuple:
        y, pull = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        return y, *pull(jnp.asarray(a["cotangent"]))

    y, g, gx = jax.jit(run)(params, x)
    scores = jax.jit(layer.scores)(params, x)
    close(scores, a["A0"], "A0")
    close(np.maximum(scores, 0), a["A1"], "A1")
    close(jax.jit(layer.pattern)(scores) * params["gain"], a["A"], "A")
    close(y, a["y"], "y")
    close(gx, a["gx"], "gx")
    for ours, theirs in names.items():
        close(g[ours].T, a[f"g{theirs}"], f"g{theirs}")
    metrics = jax.jit(layer.apply)(params, x)[1].metrics
    assert metrics["tls"] == pytest.approx(float(a["TLS"]), abs=1e-6)


@pytest.mark.golden("blockffn")
def test_losses_and_statistics(golden: SimpleNamespace) -> None:
    """Of the flattened tokens, as one row."""
    a, hp = golden.arrays, golden.hp
    layer, scores = layer_of(hp), jnp.asarray(a["A0"])[None]
    documents = Context(segment_ids=jnp.cumsum(jnp.asarray(a["seg_prev"]) == -1)[None])
    for case in hp["locality_alphas"]:

        def locality(scores: jax.Array, alpha: float = case["alpha"]) -> jax.Array:
            loss = b.locality_loss(scores, documents, alpha, hp["locality_detach_target"])
            return hp["locality_coef"] * loss

        value, g = jax.jit(jax.value_and_grad(locality))(scores)
        close(value, a[f"L_al_{case['suffix']}"], f"L_al_{case['suffix']}")
        close(g, a[f"gA0_al_{case['suffix']}"], f"gA0_al_{case['suffix']}")

    mask = jnp.asarray(a["token_mask"], jnp.int32)[None]
    padded = Context(segment_ids=mask * documents.segment_ids)

    def share(scores: jax.Array) -> jax.Array:
        return b.normalized(layer.pattern(scores), hp["chunk_norm_eps"])

    def chunks(scores: jax.Array) -> jax.Array:
        return b.chunk_loss(share(scores), padded, hp["chunk_size"], hp["chunk_log_eps"])

    value, g = jax.jit(jax.value_and_grad(chunks))(scores)
    close(jax.jit(share)(scores), a["p"], "p")
    close(value, a["L_cs"], "L_cs")
    close(g, a["gA0_cs"], "gA0_cs")

    active, size = a["A0"][None] > 0, hp["cls_window"]
    statistic = jax.jit(lambda active: b.chunk_sparsity(active, Context(), size))
    close(b.token_sparsity(active, Context()), a["TLS"], "TLS")
    close(statistic(active), a[f"CLS{size}"], "CLS")
    close(statistic(active[:, a["seg_prev"] != -1]), a[f"CLS{size}_ref"], "CLS_ref")


@pytest.mark.golden("blockffn")
def test_factor(golden: SimpleNamespace) -> None:
    losses, expected = golden.arrays["sched_losses_f64"], golden.arrays["sched_factor_f64"]
    hp = golden.hp["scheduler"]
    assert hp["first_iteration"] == 1
    factor = AdaptiveFactor(
        start=hp["start_factor"],
        stable_steps=hp["stable_steps"],
        step_size=hp["step_size"],
        max_factor=hp["max_factor"],
        min_factor=hp["min_factor"],
    )

    def step(state: Any, loss: jax.Array) -> tuple[Any, jax.Array]:
        value = factor.value(state)
        return factor.advance(state | factor.observe(state, loss)), value

    state = {name: p.init(jax.random.key(0), (), p.dtype) for name, p in factor.spec().items()}
    _, values = jax.lax.scan(step, state, jnp.asarray(losses, jnp.float32))
    close(values, expected, "sched_factor")


# --- packed and padded rows -----------------------------------------------------------------------

SEGMENTS = np.array(
    [
        [1] * 14,
        [1] * 5 + [2] * 9,
        [1] * 4 + [2] * 7 + [0] * 3,
        [0] * 2 + [1] * 9 + [0] + [2] * 2,
    ]
)
SCORES = np.random.default_rng(0).normal(size=(*SEGMENTS.shape, EXPERTS)) - 0.8


def documents() -> list[np.ndarray]:
    pairs = [(r, s) for r in range(len(SEGMENTS)) for s in set(SEGMENTS[r]) - {0}]
    return [SCORES[r][SEGMENTS[r] == s] for r, s in pairs]


def by_documents(size: int) -> dict[str, Any]:
    """The losses and statistics one document, chunk and pair at a time, in float64."""
    off, windows, pairs, kept = [], [], [], []
    for scores in documents():
        on = scores > 0
        n = np.maximum(scores, 0)
        n = n / np.sqrt((n**2).mean(-1, keepdims=True) + LAYER.eps)
        p = n / (n.sum(-1, keepdims=True) + 1e-5)
        for start in range(0, len(p), size):
            chunk = np.zeros((size, EXPERTS))
            chunk[: len(p[start : start + size])] = p[start : start + size]
            off.append(np.exp(np.log(1 - chunk + 1e-5).sum(0)))
            if start + size <= len(p):
                windows.append(on[start : start + size].any(0))
        for t in range(1, len(scores)):
            z, target = 3.0 * scores[t - 1], 1 / (1 + np.exp(-3.0 * scores[t]))
            sigmoid = 1 / (1 + np.exp(-z))
            pairs.append(-target * np.log(sigmoid) - (1 - target) * np.log(1 - sigmoid))
            if on[t - 1].any():
                kept.append((on[t - 1] & on[t]).sum() / on[t - 1].sum())
    return {
        "locality": np.mean(pairs),
        "chunk": 1 - np.mean(off),
        "tls": 1 - (np.concatenate(documents()) > 0).mean(),
        "cls": 1 - np.mean(windows),
        "reuse": np.mean(kept),
    }


def ours(scores: jax.Array, ctx: Context, size: int) -> dict[str, jax.Array]:
    active = scores > 0
    return {
        "locality": b.locality_loss(scores, ctx, 3.0),
        "chunk": b.chunk_loss(b.normalized(LAYER.pattern(scores)), ctx, size),
        "tls": b.token_sparsity(active, ctx),
        "cls": b.chunk_sparsity(active, ctx, size),
        "reuse": b.reuse(active, ctx),
    }


@pytest.mark.parametrize("size", [1, 4, 6])
def test_documents_count_and_padding_does_not(size: int) -> None:
    scores = jnp.asarray(SCORES, jnp.float32)
    ctx = Context(segment_ids=jnp.asarray(SEGMENTS))
    compiled = jax.jit(ours, static_argnums=2)
    values = compiled(scores, ctx, size)
    for name, expected in by_documents(size).items():
        close(values[name], expected, name)
    noise = jnp.where(jnp.asarray(SEGMENTS)[..., None] > 0, scores, 7.0)
    assert compiled(noise, ctx, size) == values


def test_a_row_of_padding_and_a_single_token_give_finite_numbers() -> None:
    for length, segments in ((5, jnp.zeros((2, 5), jnp.int32)), (1, None)):
        scores = jnp.ones((2, length, EXPERTS))

        def total(scores: jax.Array, segments: Any = segments) -> jax.Array:
            return sum(ours(scores, Context(segment_ids=segments), 4).values(), jnp.zeros(()))

        value, g = jax.jit(jax.value_and_grad(total))(scores)
        assert np.isfinite(value) and np.isfinite(g).all()


def test_a_token_without_experts_gives_nothing() -> None:
    params = initial(LAYER)
    params = params | {"router": -np.abs(params["router"])}
    x = np.abs(np.random.default_rng(1).normal(size=(4, 14, DIM))).astype(np.float32)
    y, aux = jax.jit(LAYER.apply)(params, x)
    assert not y.any() and aux.metrics["nonzero"] == 0


# --- through depth and training -------------------------------------------------------------------


def test_every_parameter_learns_through_scan_and_remat() -> None:
    """From the output alone, and the routers from the layer's losses alone."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, DIM)), jnp.float32)

    @jax.jit
    def gradients(params: Any) -> Any:
        def losses(params: Any) -> tuple[jax.Array, jax.Array]:
            y, _, aux = STACK.apply(params, x)
            return (y**2).sum(), aux.losses["locality"] + aux.losses["chunk_sparsity"]

        return jax.jacrev(losses)(params)

    output, own = gradients(initial(STACK))
    for path, g in flatten(output["ffn"]):
        if not isinstance(g, dict) and "sparsity" not in path:
            assert np.all(np.any(g, axis=tuple(range(1, g.ndim)))), path
    assert np.all(np.any(own["ffn"]["router"], axis=(1, 2)))


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    """Output, losses, statistics and all gradients, experts and batch spread over devices."""
    params, rows = initial(LAYER), np.random.default_rng(0)
    x = jnp.asarray(rows.normal(size=(4, 14, DIM)), jnp.float32)

    def run(params: Any, x: jax.Array) -> tuple:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, tuple]:
            y, aux = LAYER.apply(params, x, Context(segment_ids=jnp.asarray(SEGMENTS)))
            own = aux.losses["locality"] + aux.losses["chunk_sparsity"]
            return (y**2).sum() + own, (y, aux.losses, aux.metrics)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    expected = jax.jit(run)(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, LAYER.abstract(mesh)))
        actual = jax.jit(run)(placed, x)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, rtol=2e-5), actual, expected)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_state_goes_on_by_its_declaration(per_layer: bool) -> None:
    """As in the training step: micro-batches observe, then every step advances; one factor goes
    with the mean loss over layers, or each layer's with its own."""
    ffn = replace(LAYER, sparsity=replace(FACTOR, per_layer=per_layer))
    stack = replace(STACK, block=replace(STACK.block, ffn=ffn))  # type: ignore[type-var]
    params = initial(stack)
    factors, rng = [], np.random.default_rng(0)

    @jax.jit
    def micro(params: Any, x: jax.Array) -> Any:
        aux = stack.apply(params, x)[2]
        seen = params["ffn"] | {
            "sparsity": params["ffn"]["sparsity"] | aux.state["ffn"]["sparsity"]
        }
        return params | {"ffn": seen}, aux.metrics["ffn"]["chunk_factor"], aux.losses

    expected, scheduler = [], FACTOR.spec()
    alone = {name: p.init(jax.random.key(0), (), p.dtype) for name, p in scheduler.items()}
    go_on = jax.jit(lambda params: advance(stack.declare(), params))
    for step in range(7):
        expected.append(FACTOR.value(alone))
        for _ in range(2):
            x = rng.normal(size=(2, 9, DIM)).astype(np.float32) * (1 + step)
            params, factor, losses = micro(params, x)
            mean = losses["chunk_sparsity"] / factor.sum()
            alone = alone | FACTOR.observe(alone, mean)
        factors.append(np.asarray(factor))
        alone = FACTOR.advance(alone)
        assert (params["ffn"]["sparsity"]["count"] == 2 * (1 + step % 2)).all()
        params = go_on(params)
    factors = np.stack(factors, 1)
    assert (factors[:, :4] == np.float32(FACTOR.start)).all()
    assert (factors[:, 4] != factors[:, 3]).all()
    if per_layer:
        assert (factors[0] != factors[1]).any()
    else:
        for layer in factors:
            close(layer, np.stack(expected))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: AdaptiveFactor(start=-1.0), "start: -1.0; need 0 or more"),
        (
            lambda: AdaptiveFactor(start=0.1, stable_steps=100),
            "stable_steps: 100; need more than step_size 100",
        ),
        (lambda: BlockFFN(dim=4, num_experts=0, expert_dim=2), "num_experts: 0; need at least 1"),
        (
            lambda: BlockFFN(dim=4, num_experts=3, expert_dim=2, density=0.0),
            "density: 0.0; need 0 < density",
        ),
    ],
)
def test_impossible_fields_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, published",
    [
        ("blockffn_0_1b", 0.119e9),
        ("blockffn_0_5b", 0.495e9),
        ("blockffn_0_8b", 0.817e9),
        ("blockffn_1_2b", 1.19e9),
        ("blockffn_2_8b", 2.80e9),
    ],
)
def test_published_sizes(name: str, published: float) -> None:
    """Parameters beside embedding and head; the paper gives three digits, hence 0.5 %."""
    model = getattr(zoo, name)()
    outside = model.embedding.count().total + model.head.count().total
    assert model.count().total - outside == pytest.approx(published, rel=5e-3)


def test_the_tiny_model_has_the_size_of_the_dense_one() -> None:
    ours, dense = zoo.blockffn_tiny().count().total, llama.llama_tiny().count().total
    assert ours == pytest.approx(dense, rel=2e-3)
