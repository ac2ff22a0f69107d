"""Latent experts: parity with the formulas, conversion of mixtures of experts, gradients, costs."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.layers import (
    DEFAULT_RULES,
    GLU,
    MLP,
    Attention,
    Context,
    Gelu,
    LatentExperts,
    Layer,
    MoE,
    Param,
    Relu,
    Repeat,
    RMSNorm,
    Router,
    Silu,
    use_rules,
)
from bestiary.layers.base import Count, flatten, map_params
from bestiary.layers.mole import convert, factorise
from bestiary.zoo import llama, mixtures
from bestiary.zoo import mole as zoo
from bestiary.zoo.decoder import Block

DIM, HIDDEN, EXPERTS, GROUP = 12, 10, 6, 3
ROUTER = Router(dim=DIM, num_experts=EXPERTS, top_k=2, balance=0.1)
GLU_EXPERT = GLU(dim=DIM, hidden=HIDDEN, activation=Silu())
MIXTURE = MoE(router=ROUTER, expert=GLU_EXPERT, shared=GLU(dim=DIM, hidden=4, activation=Silu()))
LATENT = LatentExperts(router=ROUTER, group_size=GROUP, latent=6, hidden=HIDDEN)
X = np.random.default_rng(0).normal(size=(2, 9, DIM)).astype(np.float32)


def close(actual: Any, expected: Any, name: str = "", rtol: float = 1e-5) -> None:
    expected = np.asarray(expected)
    atol = rtol * float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(
        np.asarray(actual).reshape(expected.shape), expected, rtol=rtol, atol=atol, err_msg=name
    )


def draw(layer: Layer) -> Any:
    rng = np.random.default_rng(5)

    def one(p: Param) -> jax.Array:
        scale, mean = (0.3, 1.0) if p.inputs is None else (p.shape[p.batch_ndim] ** -0.5, 0.0)
        return jnp.asarray(rng.normal(mean, scale, p.shape), jnp.float32)

    return map_params(one, layer.declare())


def output(layer: Layer, params: Any, x: jax.Array) -> jax.Array:
    return jax.jit(layer.apply)(params, x)[0]


@pytest.mark.golden("mole")
def test_equals_the_formulas(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    assert not hp["factorize_down"]
    activation = {"silu": Silu, "gelu": Gelu, "relu": Relu}[hp["hidden_act"]]()
    dim, hidden = hp["hidden_size"], hp["moe_intermediate_size"]
    router = Router(
        dim=dim,
        num_experts=hp["num_experts"],
        top_k=hp["top_k"],
        score=hp["router_score"],
        normalize=hp["norm_topk_prob"],
    )
    moe = MoE(router=router, expert=GLU(dim=dim, hidden=hidden, activation=activation))
    names = {"gate": "W_gate", "up": "W_up", "down": "W_down"}
    experts: Any = {name: jnp.asarray(a[w].swapaxes(1, 2)) for name, w in names.items()}
    params = {
        "router": {"weight": jnp.asarray(a["W_router"].T)},
        "experts": experts | {"activation": {}},
    }
    x = jnp.asarray(a["x"])[None]
    routing, _ = jax.jit(router.apply)(params["router"], x)
    order = np.argsort(routing.experts[0], -1), np.argsort(a["topk_idx"], -1)
    for ours, theirs in ((routing.experts[0], a["topk_idx"]), (routing.weights[0], a["topk_w"])):
        close(np.take_along_axis(ours, order[0], -1), np.take_along_axis(theirs, order[1], -1))
    close(output(moe, params, x), a["y_moe"], "y_moe")

    size, rank = hp["group_size"], hp["latent_dim"]
    layer, converted, factors = convert(moe, params, size, rank)
    assert layer.groups == hp["num_groups"]
    close(output(layer, converted, x), a["y_mole"], "y_mole")
    for name, f in factors.items():
        close(product(f), a[f"recon_{name}"].swapaxes(1, 2), f"recon_{name}")
        close(f.error.sum(), a[f"err_{name}"], f"err_{name}")

    moment, eps = a["calib_gram"], hp["calib_eps"]
    f = factorise(params["experts"]["up"], size, rank, moment=moment, eps=eps)
    close(product(f), a["recon_up_calib"].swapaxes(1, 2), "recon_up_calib")
    close(f.error.sum(), a["err_up_calib"], "err_up_calib")
    missed = np.asarray(params["experts"]["up"]) - product(factors["up"])
    second = moment + eps * np.eye(dim)
    plain = np.einsum("edf,dc,ecf->", missed, second, missed)
    close(plain, a["err_up_plain_in_calib_norm"], "err_up_plain_in_calib_norm")


def product(f: Any) -> np.ndarray:
    """B A of every expert: [experts, dim, hidden]."""
    size = len(f.own) // f.shared.shape[1]
    return np.stack([f.shared[:, e // size] @ a for e, a in enumerate(f.own)])


# --- conversion -----------------------------------------------------------------------------------


def test_experts_that_read_from_one_space_convert_exactly() -> None:
    params = draw(MIXTURE)
    rng = np.random.default_rng(1)
    for name in ("gate", "up"):
        shared, own = rng.normal(size=(2, DIM, 4)), rng.normal(size=(EXPERTS, 4, HIDDEN))
        made = np.repeat(shared, GROUP, 0) @ own / 6
        params["experts"][name] = jnp.asarray(made, jnp.float32)
    layer, converted, factors = convert(MIXTURE, params, GROUP, 4)
    for f in factors.values():
        assert f.exact.all() and (f.ranks == 4).all() and (f.lost < 1e-12).all()
    x, ctx = jnp.asarray(X), Context(segment_ids=jnp.asarray([[1] * 9, [1] * 5 + [0] * 4]))
    y, aux = jax.jit(MIXTURE.apply)(params, x, ctx)
    z, latent_aux = jax.jit(layer.apply)(converted, x, ctx)
    close(z, y)
    close(latent_aux.losses["load_balance"], aux.losses["load_balance"])
    assert jax.tree.structure(layer.abstract()) == jax.tree.structure(converted)
    assert not convert(MIXTURE, params, GROUP, 3)[2]["up"].exact.any()


def test_no_other_factors_are_nearer() -> None:
    """Error: the discarded singular values; less with rank, and 0 at full rank."""
    w = np.random.default_rng(2).normal(size=(EXPERTS, DIM, HIDDEN))
    before = np.full(2, np.inf)
    for rank in (2, 7, 12):
        f = factorise(w, GROUP, rank)
        missed = np.square(w - product(f)).sum((1, 2)).reshape(2, GROUP).sum(1)
        close(f.error + 1, missed + 1)
        for j in range(2):
            stack = np.concatenate(w[j * GROUP : (j + 1) * GROUP], 1)
            s = np.linalg.svd(stack, compute_uv=False)
            close(f.error[j] + 1, np.square(s[rank:]).sum() + 1)
            close(f.energy[j], np.square(s).sum())
        assert (f.error < before).all()
        before = f.error


def test_a_moment_makes_the_outputs_nearer() -> None:
    rng = np.random.default_rng(3)
    w = rng.normal(size=(EXPERTS, DIM, HIDDEN))
    x = rng.normal(size=(400, DIM)) * np.geomspace(0.05, 3, DIM)
    plain = factorise(w, GROUP, 4)
    moment = x.T @ x / len(x)
    aware = factorise(w, GROUP, 4, moment=moment)

    def missed(f: Any) -> float:
        return np.square(np.einsum("nd,edf->enf", x, w - product(f))).sum() / len(x)

    close(missed(aware), aware.error.sum(), rtol=1e-4)
    assert missed(aware) < 0.5 * missed(plain)


def test_lower_ranks_of_the_experts_bring_the_group_nearer_to_the_latent_space() -> None:
    w = np.random.default_rng(4).normal(size=(EXPERTS, DIM, HIDDEN))
    assert (factorise(w, GROUP, 6).ranks == 12).all()
    f = factorise(w, GROUP, 6, expert_rank=2)
    assert (f.ranks == 6).all()
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    close(product(f), (u[..., :2] * s[:, None, :2]) @ vt[:, :2])
    assert (f.error > factorise(w, GROUP, 6).error).all()


def test_a_model_converts_layer_by_layer() -> None:
    """At full rank nothing is lost; below, the report says what and where."""
    ffn = mixtures.olmoe_ffn(DIM, EXPERTS, 2, GLU_EXPERT)
    model = mixtures.olmoe(2, DIM, 2, ffn, vocab_size=31)
    params, ids = draw(model), jnp.arange(30).reshape(2, 15)
    full, converted, report = zoo.convert(model, params, GROUP, DIM)
    close(output(full, converted, ids), output(model, params, ids), rtol=1e-4)
    assert list(report) == ["blocks/0", "blocks/1"]
    assert list(zoo.lines(report))[0] == "blocks/0 gate: 0.00% lost (exact)"
    small, converted, report = zoo.convert(model, params, GROUP, 7)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(lambda s: s.shape, small.abstract())
    assert list(zoo.lines(report))[3].endswith("% lost (ranks up to 12, kept 7)")
    dense = llama.llama(
        vocab_size=31, num_layers=2, attention=llama.multi_head(DIM, 2), ffn=GLU_EXPERT
    )
    with pytest.raises(ValueError, match="blocks: no mixture of experts"):
        zoo.convert(dense, draw(dense), GROUP, 4)


def test_models() -> None:
    """Section 6.3's ratio of the experts' parameters, 1/3 + 2 m / (3 D) + 2 m / (3 G f)."""
    tiny, small = 3 * 4 * 16 * 128 * 80, 3 * 20 * 64 * 768 * 384
    for latent, whole, experts, ratio in (
        (zoo.mole_tiny(), mixtures.olmoe_tiny(), tiny, 1 / 3 + 96 / 384 + 96 / 960),
        (zoo.latent_olmoe_small(), mixtures.olmoe_227m(), small, 1 / 3 + 768 / 2304 + 768 / 9216),
    ):
        saved = whole.count().total - latent.count().total
        assert saved == pytest.approx((1 - ratio) * experts, rel=1e-9)


# --- the layer ------------------------------------------------------------------------------------


def test_every_parameter_learns_through_scan_and_remat() -> None:
    mixer = Attention(dim=DIM, num_heads=2, num_kv_heads=2, head_dim=6)
    stack = Repeat(block=Block(mixer=mixer, ffn=LATENT, norm=RMSNorm(dim=DIM)), n=2, remat="full")

    @jax.jit
    def gradient(params: Any) -> Any:
        return jax.grad(lambda params: (stack.apply(params, jnp.asarray(X))[0] ** 2).sum())(params)

    for path, g in flatten(gradient(draw(stack))):
        assert np.all(np.any(g, axis=tuple(range(1, g.ndim)))), path


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    """Latents travel to experts on other devices; values and gradients."""
    params, x = draw(LATENT), jnp.tile(X, (2, 1, 1))

    def run(params: Any, x: jax.Array) -> tuple:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, aux = LATENT.apply(params, x)
            return (y**2).sum() + aux.losses["load_balance"], y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    expected = jax.jit(run)(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, LATENT.abstract(mesh)))
        actual = jax.jit(run)(placed, x)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, rtol=2e-5), actual, expected)


def test_parameters_and_costs() -> None:
    """Section 6.3: 2 m D + G (2 f m + D f) a group; a token uses top_k experts."""
    m, router = LATENT.latent, DIM * EXPERTS
    shared, own = 2 * m * DIM, 2 * HIDDEN * m + DIM * HIDDEN
    total = router + 2 * (shared + GROUP * own)
    assert LATENT.count() == Count(total, router + 2 * shared + 2 * own)
    cost = LATENT.cost(7)
    assert cost.flops == cost.active_flops == 2 * (router + 2 * shared + 2 * own)


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: LatentExperts(router=ROUTER, group_size=4, latent=3, hidden=5),
            "group_size: 4; need a divisor of the router's num_experts 6",
        ),
        (lambda: factorise(np.ones((6, 4, 3)), 4, 2), "group_size: 4; need a divisor of the 6"),
        (lambda: factorise(np.ones((6, 4, 3)), 3, 5), "rank: 5; need at most 4"),
        (
            lambda: factorise(np.ones((6, 4, 3)), 3, 2, moment=np.eye(3)),
            r"moment: shape \(3, 3\); need \(4, 4\)",
        ),
        (
            lambda: convert(
                MoE(router=ROUTER, expert=MLP(dim=DIM, hidden=4, activation=Silu())), {}, 3, 2
            ),
            "expert: MLP; only a GLU can be converted",
        ),
    ],
)
def test_impossible_requests_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
