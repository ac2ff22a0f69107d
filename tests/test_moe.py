"""Mixtures of experts: golden vectors, three paths that agree, routing by definition, balance."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.kernels.grouped_dot import grouped_dot
from bestiary.layers import DEFAULT_RULES, GLU, MoE, Router, Silu, balance, use_rules
from bestiary.layers.base import Context, advance

CONTEXT = Context()


def close(actual: Any, expected: Any, what: str = "", rtol: float = 1e-5) -> None:
    expected = np.asarray(expected)
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale, err_msg=what)


# --- golden vectors -------------------------------------------------------------------------------


@pytest.mark.golden("moe_balance")
def test_balance(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    batch, num_experts, top_k = hp["batch_size"], hp["num_experts"], hp["top_k"]

    def rows(x: np.ndarray) -> jax.Array:
        """Tokens come sequence-major: [seq * batch, ...] -> [batch, seq, ...]."""
        return jnp.asarray(x).reshape(-1, batch, *x.shape[1:]).swapaxes(0, 1)

    def flat(x: Any) -> np.ndarray:
        return np.asarray(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def gates(router: Router, logits: jax.Array, params: Any) -> np.ndarray:
        """Weights by expert [tokens, num_experts]."""
        scores = jax.nn.sigmoid(logits) if router.score == "sigmoid" else jax.nn.softmax(logits)
        experts = router.select(logits if router.score == "topk_softmax" else scores, params)
        dense = jnp.zeros(logits.shape)
        index = (*np.ogrid[:batch, : logits.shape[1]], None)
        b, t = index[0][..., None], index[1][..., None]
        return flat(dense.at[b, t, experts].set(router.weigh(logits, scores, experts)))

    logits = rows(a["logits"])
    router = Router(dim=1, num_experts=num_experts, top_k=top_k)
    close(gates(router, logits, {}), a["pre_gates"], "pre_gates")
    assert np.array_equal(gates(router, logits, {}) > 0, a["pre_map"])
    post = dataclasses.replace(router, score="topk_softmax")
    close(gates(post, logits, {}), a["post_gates"], "post_gates")
    chosen = rows(a["pre_map"])
    close(balance.counts(chosen, CONTEXT), a["pre_count"], "pre_count")

    def check(name: str, loss: Any, gradient: str) -> None:
        value, grad = jax.value_and_grad(loss)(logits)
        close(value, a[name], name)
        close(flat(grad), a[gradient], gradient)

    coefficient, z = hp["balance_coef"], hp["z_loss_coef"]
    assert hp["balance_score"] == "softmax"
    for name, groups in (("switch", 1), ("seq", batch), ("global", 1)):
        check(
            f"lbl_{name}",
            lambda x, groups=groups: (
                coefficient * balance.load_balance(jax.nn.softmax(x), chosen, CONTEXT, groups)
            ),
            f"lbl_{name}_grad",
        )
    check("z_loss", lambda x: z * balance.z_loss(x, CONTEXT), "z_grad")
    for entry in hp["top1_lbl_temperatures"]:
        name = f"top1_lbl_tau{entry['suffix']}"
        check(name, lambda x, t=entry["tau"]: balance.top1_balance(x, CONTEXT, t), f"{name}_grad")

    grouped = Router(
        dim=1,
        num_experts=num_experts,
        top_k=hp["sigmoid_top_k"],
        score="sigmoid",
        normalize=True,
        scale=hp["routed_scaling_factor"],
        num_groups=hp["n_group"],
        top_groups=hp["topk_group"],
        group_top=hp["group_score_top"],
        bias="sign",
        bias_rate=hp["bias_update_rate"],
    )
    state = {
        "bias": jnp.asarray(a["expert_bias"]),
        "load": jnp.asarray(a["sig_count"], jnp.float32),
    }
    close(gates(grouped, logits, state), a["sig_gates"], "sig_gates")
    assert np.array_equal(gates(grouped, logits, state) > 0, a["sig_map"])
    weight = jnp.zeros((1, num_experts))
    for bias, name in (("sign", "bias_next"), ("centered", "bias_next_zero_mean")):
        layer = dataclasses.replace(grouped, bias=bias)
        following = advance(layer.declare(), state | {"weight": weight})
        close(following["bias"], a[name], name)
        assert not following["load"].any()

    assert hp["drop_gates_source"] == "pre_softmax"
    most = balance.capacity(len(a["logits"]), num_experts, top_k, hp["capacity_factor"])
    assert most == a["capacity"]
    kept = balance.within_capacity(jnp.asarray(a["pre_gates"]), most, hp["drop_policy"])
    if hp["drop_policy"] == "probs":
        assert np.array_equal(kept, a["drop_map"])
        close(np.where(kept, a["pre_gates"], 0), a["drop_gates"], "drop_gates")
    else:  # the reference's order among equals is undefined: counts only
        assert np.array_equal(kept.sum(0), a["drop_map"].sum(0))
    mixed = balance.sinkhorn(jnp.asarray(a["logits"]), hp["sinkhorn_tol"], hp["sinkhorn_eps"])
    close(mixed, a["sinkhorn"], "sinkhorn", rtol=1e-4)


@pytest.mark.golden("ling_moe")
@pytest.mark.parametrize("path", ["masked", "sorted"])
def test_ling_moe(golden: SimpleNamespace, path: Any) -> None:
    a, hp = golden.arrays, golden.hp
    assert hp["hidden_act"] == "silu"
    dim, hidden = hp["hidden_size"], hp["moe_intermediate_size"]
    layer = MoE(
        router=Router(
            dim=dim,
            num_experts=hp["num_experts"],
            top_k=hp["top_k"],
            score=hp["router_score"],
            normalize=hp["norm_topk_prob"],
            scale=hp["routed_scaling_factor"],
            num_groups=hp["n_group"],
            top_groups=hp["topk_group"],
            group_top=hp["group_score_top"],
            bias="centered",
        ),
        expert=GLU(dim=dim, hidden=hidden, activation=Silu()),
        shared=GLU(dim=dim, hidden=hidden * hp["num_shared_experts"], activation=Silu()),
        path=path,
    )

    def transposed(names: dict[str, str]) -> dict[str, Any]:
        return {ours: jnp.asarray(a[theirs]).swapaxes(-1, -2) for ours, theirs in names.items()}

    experts = {"gate": "E_gate", "up": "E_up", "down": "E_down"}
    shared = {"gate": "S_gate", "up": "S_up", "down": "S_down"}
    state = {"bias": jnp.asarray(a["expert_bias"]), "load": jnp.zeros(hp["num_experts"])}
    trained = {
        "router": transposed({"weight": "W_gate"}),
        "experts": transposed(experts) | {"activation": {}},
        "shared": transposed(shared) | {"activation": {}},
    }
    x, cotangent = jnp.asarray(a["x"]), jnp.asarray(a["cotangent"])

    @jax.jit
    def run(trained: Any, x: jax.Array) -> Any:
        params = trained | {"router": trained["router"] | state}
        return layer.apply(params, x)[0]

    close(run(trained, x), a["y"], "y")
    y, pull = jax.vjp(run, trained, x)
    g, gx = pull(cotangent)
    close(gx, a["gx"], "gx")
    close(g["router"]["weight"].T, a["gW_gate"], "gW_gate")
    for part, names in (("experts", experts), ("shared", shared)):
        for ours, theirs in names.items():
            if f"g{theirs}" in a:  # not every one is offered
                close(g[part][ours].swapaxes(-1, -2), a[f"g{theirs}"], f"g{theirs}")
    params = trained["router"] | state
    close(layer.router.logits(params, x), a["router_logits"], "router_logits")
    routing, _ = layer.router.apply(params, x)
    order = np.argsort(a["topk_idx"], 1)
    ours = np.asarray(routing.experts).reshape(order.shape)
    mine = np.argsort(ours, 1)
    assert np.array_equal(np.sort(ours, 1), np.sort(a["topk_idx"], 1))
    weights = np.asarray(routing.weights).reshape(order.shape)
    close(np.take_along_axis(weights, mine, 1), np.take_along_axis(a["topk_weight"], order, 1))


# --- three equal paths ----------------------------------------------------------------------------

DIM, HIDDEN, EXPERTS = 16, 24, 8


def mixture(top_k: int = 3, **options: Any) -> MoE:
    return MoE(
        router=Router(dim=DIM, num_experts=EXPERTS, top_k=top_k),
        expert=GLU(dim=DIM, hidden=HIDDEN, activation=Silu()),
        **options,
    )


def gradients(layer: MoE, params: Any, x: jax.Array) -> Any:
    """Output and gradients of an uneven sum of it."""

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        y, pull = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return run(params, x)


def same(a: Any, b: Any) -> None:
    jax.tree.map(close, jax.device_get(a), jax.device_get(b))


def skewed(kind: str, length: int = 6) -> tuple[Any, jax.Array]:
    """Parameters and tokens [8, length, DIM] of a routing that is even, leaves experts empty, or
    gives one expert all."""
    layer = mixture()
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, length, DIM))
    w = params["router"]["weight"]
    if kind == "empty":
        x = x.at[..., 0].set(5.0)
        w = w.at[0].set(jnp.where(jnp.arange(EXPERTS) < 4, 9.0, -9.0))
    elif kind == "one":
        x = x.at[..., 0].set(5.0)
        w = w.at[0].set(jnp.where(jnp.arange(EXPERTS) == 5, 9.0, 0.0))
    return params | {"router": {"weight": w}}, x


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", ["even", "empty", "one"])
def test_sorted_equals_masked(kind: str, top_k: int) -> None:
    params, x = skewed(kind)
    same(gradients(mixture(top_k), params, x), gradients(mixture(top_k, path="masked"), params, x))


@pytest.mark.parametrize("rows", [8, 2, 1])
@pytest.mark.parametrize("kind", ["even", "empty", "one"])
def test_expert_parallel_equals_masked(kind: str, rows: int, mesh: Any) -> None:
    """8 rows travel to their experts; 1 or 2 are too few to be spread, so the sums are."""
    params, x = skewed(kind)
    expected = gradients(mixture(path="masked"), params, x[:rows])
    same(spread(mesh, mixture(), params, x[:rows]), expected)


def spread(mesh: Any, layer: MoE, params: Any, x: jax.Array) -> Any:
    """`gradients` on a mesh."""
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        shardings = jax.tree.map(lambda s: s.sharding, layer.abstract(mesh))
        return jax.device_get(gradients(layer, jax.device_put(params, shardings), x))


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", ["even", "empty", "one"])
def test_many_rounds_equal_masked(kind: str, top_k: int) -> None:
    """8 devices with an expert each: of 30 tokens per device, 8 or 15 choices travel to one other
    in a round, so that even routing takes 1 or 2 rounds and one expert for all takes 4 or 2."""
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"), axis_types=axis_types)
    params, x = skewed(kind, 30)
    expected = gradients(mixture(top_k, path="masked"), params, x)
    same(spread(mesh, mixture(top_k), params, x), expected)


def test_rows_travel_by_all_to_all(mesh: Any) -> None:
    layer = mixture()
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        lowered = jax.jit(lambda p, x: layer.apply(p, x)[0]).lower(
            layer.abstract(mesh), jax.ShapeDtypeStruct((8, 6, DIM), jnp.float32)
        )
    assert "all_to_all" in lowered.as_text()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=3, max_size=3), st.sampled_from(["auto", "tpu"]))
def test_grouped_dot_equals_a_loop(sizes: list[int], impl: str) -> None:
    """Groups of any size, none included, and rows behind the last group."""
    rng, n = np.random.default_rng(sum(sizes)), 33
    x, w, ct = rng.normal(size=(n, 5)), rng.normal(size=(3, 5, 7)), rng.normal(size=(n, 7))
    y, dx, dw = np.zeros((n, 7)), np.zeros_like(x), np.zeros_like(w)
    for i, g in enumerate(np.repeat(np.arange(3), sizes)):
        y[i], dx[i] = x[i] @ w[g], w[g] @ ct[i]
        dw[g] += np.outer(x[i], ct[i])
    operands = (jnp.asarray(v, jnp.float32) for v in (x, w, ct))
    same(GROUPED[impl](*operands, jnp.asarray(sizes, jnp.int32)), (y, dx, dw))


def grouped(impl: str) -> Any:
    """(y, dx, dw), compiled once for all sizes."""

    @jax.jit
    def run(x: jax.Array, w: jax.Array, ct: jax.Array, sizes: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, sizes, impl=impl), x, w)
        return y, *pull(ct)

    return run


GROUPED = {impl: grouped(impl) for impl in ("auto", "tpu")}


def test_grouped_dot_refuses_what_does_not_fit() -> None:
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([1, 2])
    for args in ((x, w[:, :2], sizes), (x, w, sizes[:1]), (x[0], w, sizes)):
        with pytest.raises(ValueError, match="^shapes x "):
            grouped_dot(*args)
    with pytest.raises(ValueError, match="need one float type"):
        grouped_dot(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(NotImplementedError, match="no GPU kernel"):
        grouped_dot(x, w, sizes, impl="gpu")


# --- routing --------------------------------------------------------------------------------------


def routed(router: Router, logits: np.ndarray, state: Any = None, **context: Any) -> Any:
    """Routing and Aux of logits [batch, seq, num_experts], past an identity matrix."""
    router = dataclasses.replace(router, dim=router.num_experts)
    params = {"weight": jnp.eye(router.num_experts)} | (state or {})
    return router.apply(params, jnp.asarray(logits, jnp.float32), Context(**context))


LOGITS = np.random.default_rng(0).normal(size=(2, 7, EXPERTS))


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_by_definition(score: Any, normalize: bool) -> None:
    router = Router(dim=1, num_experts=EXPERTS, top_k=3, score=score, normalize=normalize, scale=2)
    routing, _ = routed(router, LOGITS)
    for b, t in np.ndindex(LOGITS.shape[:2]):
        z = LOGITS[b, t]
        best = np.argsort(-z)[:3]
        s = 1 / (1 + np.exp(-z[best])) if score == "sigmoid" else np.exp(z[best])
        if score == "softmax":
            s = s / np.exp(z).sum()
        elif score == "topk_softmax":
            s = s / s.sum()
        if normalize:
            s = s / s.sum()
        assert np.array_equal(routing.experts[b, t], best)
        close(routing.weights[b, t], 2 * s)


def test_groups_limit_the_choice() -> None:
    """4 groups of 2: the best 2 groups by the sum of their scores, whatever single scores say."""
    router = Router(
        dim=1, num_experts=EXPERTS, top_k=2, score="sigmoid", num_groups=4, top_groups=2
    )
    z = np.array([[[4.0, -9, 2, 2, 1, 1, 3, -9]]])
    routing, _ = routed(router, z)
    assert set(np.ravel(routing.experts)) == {2, 3}


def test_a_bias_selects_and_does_not_weigh() -> None:
    router = Router(dim=1, num_experts=EXPERTS, top_k=1, score="sigmoid", bias="sign")
    state = {"bias": jnp.zeros(EXPERTS).at[6].set(10.0), "load": jnp.zeros(EXPERTS)}
    routing, aux = routed(router, LOGITS, state)
    assert (routing.experts == 6).all()
    close(routing.weights[..., 0], 1 / (1 + np.exp(-LOGITS[..., 6])))
    assert aux.state["load"][6] == LOGITS[..., 0].size and "bias" not in aux.state


def test_padding_counts_nowhere() -> None:
    router = Router(dim=1, num_experts=EXPERTS, top_k=2, balance=1.0, top1_balance=1.0, z_loss=1.0)
    segments = np.ones((2, 7), np.int32)
    segments[1, 3:] = 0
    _, padded = routed(router, LOGITS, segment_ids=jnp.asarray(segments))
    real = LOGITS[segments > 0][None]
    _, alone = routed(router, real)
    same(padded.losses, alone.losses)
    same(padded.metrics, alone.metrics)


def test_fewer_experts_in_some_layers() -> None:
    router = Router(dim=1, num_experts=EXPERTS, top_k=3)
    routing, aux = routed(router, LOGITS, layer={"top_k": jnp.float32(1)})
    first, _ = routed(dataclasses.replace(router, top_k=1), LOGITS)
    assert np.array_equal(routing.experts[..., :1], first.experts)
    assert (routing.experts[..., 1:] == EXPERTS).all() and not routing.weights[..., 1:].any()
    close(routing.weights[..., :1], first.weights)
    assert aux.metrics["load_max"] >= 1


def test_gradient_scale_changes_the_gradient_alone() -> None:
    router = Router(dim=DIM, num_experts=EXPERTS, top_k=2)
    params = router.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, DIM))

    def run(router: Router) -> Any:
        return jax.value_and_grad(lambda p: router.apply(p, x)[0].weights.sum())(params)

    (value, g), (scaled, h) = run(router), run(dataclasses.replace(router, gradient_scale=0.25))
    close(scaled, value)
    close(h["weight"], 0.25 * g["weight"])


@pytest.mark.parametrize("drop", ["probs", "position"])
def test_capacity_drops_what_has_no_room(drop: Any) -> None:
    params, x = skewed("one")
    layer = mixture(capacity_factor=1.0, drop=drop)
    routing, _ = layer.router.apply(params["router"], x)
    kept = np.asarray(layer.within_capacity(routing))
    experts, weights = (np.asarray(v).reshape(-1, 3) for v in routing)
    most = math.ceil(len(experts) * 3 / EXPERTS)
    for e in range(EXPERTS):
        tokens, ranks = np.nonzero(experts == e)
        order = np.argsort(-weights[tokens, ranks], kind="stable") if drop == "probs" else ...
        expected = np.zeros(len(tokens), bool)
        expected[np.arange(len(tokens))[order][:most]] = True
        assert np.array_equal(kept.reshape(-1, 3)[tokens, ranks], expected)
    _, aux = layer.apply(params, x)
    close(aux.metrics["router"]["dropped"], 1 - kept.mean())
    same(
        gradients(layer, params, x),
        gradients(dataclasses.replace(layer, path="masked"), params, x),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": "topk_softmax", "top_k": 1}, "score: 'topk_softmax' with top_k 1 cannot learn"),
        ({"top_k": 9}, "top_k: 9; need at most the 8 experts"),
        ({"num_groups": 3}, "num_groups: 3; need a divisor of num_experts 8"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "top_k: 3; need at most the 2 experts"),
        ({"num_groups": 8, "top_groups": 4}, "group_top: 2; need at most the group's 1"),
        ({"score": "tanh"}, "score: 'tanh'; need one of softmax"),
        ({"balance_over": "epoch"}, "balance_over: 'epoch'; need one of batch"),
        ({"balance": -1.0}, "balance: -1.0; need 0 or more"),
        ({"top1_temperature": 0.0}, "top1_temperature: 0.0; need more than 0"),
    ],
)
def test_routers_refuse_what_cannot_be(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Router(**({"dim": 4, "num_experts": 8, "top_k": 2} | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": "dense"}, "path: 'dense'; need one of auto"),
        ({"capacity_factor": 0.0}, "capacity_factor: 0.0; need more than 0"),
        ({"shared": GLU(dim=4, hidden=4, activation=Silu())}, "shared.dim: 4; need router.dim 16"),
        (
            {"expert": GLU(dim=DIM, hidden=4, activation=Silu(), bias=True)},
            "expert.bias: True; experts have none",
        ),
    ],
)
def test_mixtures_refuse_what_cannot_be(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(mixture(), **change)
