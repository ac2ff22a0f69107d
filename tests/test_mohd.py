"""Mixture of hidden dimensions: parity with the formulas, invariants, both variants in depth."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import draw

from bestiary.layers import (
    DEFAULT_RULES,
    GLU,
    MLP,
    Attention,
    Context,
    Fusion,
    Gelu,
    MoHDFFN,
    MoHDResidual,
    Relu,
    Repeat,
    RMSNorm,
    Silu,
    SubDimensions,
    use_rules,
)
from bestiary.layers.base import Count, flatten
from bestiary.zoo import llama, mohd
from bestiary.zoo.decoder import Block

DIM, HIDDEN = 12, 20
GATE = SubDimensions(dim=DIM, num=4, num_shared=1, top_k=2)
ALL = SubDimensions(dim=DIM, num=4, num_shared=4, top_k=0)
ATTENTION = Attention(dim=DIM, num_heads=3, num_kv_heads=3, head_dim=6)
SWIGLU = GLU(dim=DIM, hidden=HIDDEN, activation=Silu())
X = np.random.default_rng(0).normal(size=(3, 7, DIM)).astype(np.float32)


def close(actual: Any, expected: Any, name: str = "", rtol: float = 1e-5) -> None:
    expected = np.asarray(expected)
    atol = rtol * float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(
        np.asarray(actual).reshape(expected.shape), expected, rtol=rtol, atol=atol, err_msg=name
    )


@pytest.mark.golden("mohd_ffn")
def test_equals_the_formulas(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    activations = {"silu": Silu, "relu": Relu, "gelu": Gelu}
    coefficient = hp["balance_coef"]
    if hp["balance_divide_by_top_k"]:
        coefficient /= hp["top_k"]
    gate = SubDimensions(
        dim=hp["hidden_size"],
        num=hp["num_sub_dimensions"],
        num_shared=hp["num_shared"],
        top_k=hp["top_k"],
        balance=coefficient,
    )
    layer = MoHDFFN(
        gate=gate,
        hidden=hp["intermediate_size"],
        activation=activations[hp["activation"]](),
        fusion=hp["fusion"],
    )
    params: Any = {
        "gate": {"centroids": a["C"].T},
        "up": a["W_up"].T,
        "fusion": {"block": a["fusion"]} if hp["fusion"] == "block" else {},
        "activation": {},
        "down": a["W_down"].T,
    }
    params, x = jax.tree.map(jnp.asarray, params), jnp.asarray(a["x"])

    def run(params: Any, x: jax.Array) -> tuple:
        def value(params: Any, x: jax.Array) -> tuple:
            y, aux = layer.apply(params, x)
            return y, aux.losses["load_balance"]

        (y, loss), pull = jax.vjp(value, params, x)
        return y, loss, *pull((jnp.asarray(a["cotangent"]), jnp.zeros(())))

    y, loss, g, gx = jax.jit(run)(params, x)
    s = jax.jit(gate.affinities)(params["gate"], x)
    gates = jax.jit(gate.gates)(params["gate"], x)[0]
    close(s, a["s"], "s")
    close(gates, a["alpha"] * a["g"], "alpha g")
    close(y, a["y"], "y")
    close(loss, a["aux"], "aux")
    close(gx, a["gx"], "gx")
    close(g["gate"]["centroids"].T, a["gC"], "gC")
    close(g["up"].T, a["gW_up"], "gW_up")
    close(g["down"].T, a["gW_down"], "gW_down")
    if hp["fusion"] == "block":
        close(g["fusion"]["block"], a["gfusion"], "gfusion")


@pytest.mark.parametrize("fusion", ["none", "block", "monarch"])
def test_all_parts_with_equal_affinities_are_the_dense_layer(fusion: Any) -> None:
    """delta = phi = 1, alpha g = 1 and fusions as they start: section 2.7's invariant."""
    layer = MoHDFFN(gate=ALL, hidden=HIDDEN, fusion=fusion)
    dense = MLP(dim=DIM, hidden=HIDDEN, activation=Silu())
    wrapped = MoHDResidual(gate=ALL, inner=dense, fusion=fusion)

    @jax.jit
    def run(key: jax.Array) -> tuple:
        ours, theirs = layer.init(key), wrapped.init(key)
        for params in (ours, theirs):
            params["gate"]["centroids"] *= 0
        pairs = (layer, ours), (dense, ours), (wrapped, theirs), (dense, theirs["inner"])
        return tuple(f.apply(params, jnp.asarray(X))[0] for f, params in pairs)

    y, expected, z, also = run(jax.random.key(0))
    close(y, expected)
    close(z, also)


@pytest.mark.parametrize("width, blocks", [(36, 6), (20, 4), (7, 1)])
def test_monarch_is_the_product_of_its_factors(width: int, blocks: int) -> None:
    """P^T L P R as matrices; two identities are the identity."""
    fusion, size = Fusion(width=width, kind="monarch"), width // blocks
    rng = np.random.default_rng(1)
    right = rng.normal(size=(blocks, size, size)).astype(np.float32)
    left = rng.normal(size=(size, blocks, blocks)).astype(np.float32)
    r, p = np.zeros((width, width)), np.zeros((width, width))
    l = np.zeros((width, width))  # noqa: E741
    for i in range(blocks):
        r[i * size : (i + 1) * size, i * size : (i + 1) * size] = right[i]
    for j in range(size):
        l[j * blocks : (j + 1) * blocks, j * blocks : (j + 1) * blocks] = left[j]
    p[np.arange(width), np.arange(width).reshape(size, blocks).T.ravel()] = 1
    x = rng.normal(size=(2, 3, width)).astype(np.float32)
    params = {"right": jnp.asarray(right), "left": jnp.asarray(left)}
    close(fusion.apply(params, jnp.asarray(x)), x @ r @ p @ l @ p.T)
    close(fusion.apply(fusion.init(jax.random.key(0)), jnp.asarray(x)), x)


def test_a_token_uses_shared_and_best_parts() -> None:
    params, run = draw(GATE, 5), jax.jit(GATE.gates)
    gates, aux = run(params, X)
    s = np.asarray(jax.jit(GATE.affinities)(params, X))
    assert ((gates > 0).sum(-1) == GATE.num_active).all() and (gates[..., 0] > 0).all()
    kept = np.where(np.asarray(gates) > 0, s, 0)
    close(gates, 4 * kept.sum(-1, keepdims=True) * kept)
    assert (kept[..., 1:].sum(-1) >= np.sort(s[..., 1:], -1)[..., 1:].sum(-1) - 1e-6).all()
    padded = Context(segment_ids=jnp.asarray(np.array([[1] * 7, [1] * 4 + [0] * 3, [0] * 7])))
    noise = jnp.where(padded.segment_ids[..., None] > 0, X, 9.0)
    for name, value in run(params, noise, padded)[1].losses.items():
        close(value, run(params, X, padded)[1].losses[name])
        assert value != aux.losses[name]


def test_active_parameters() -> None:
    ffn = MoHDFFN(gate=GATE, hidden=HIDDEN)
    gate, fusion = 4 * DIM, 4 * (HIDDEN // 4) ** 2
    matrices = 2 * DIM * HIDDEN
    assert ffn.count() == Count(matrices + gate + fusion, matrices * 3 // 4 + gate + fusion)
    inner, fusion = ATTENTION.count().total, 3 * 4 * 4 + 4 * 3 * 3
    wrapped = MoHDResidual(gate=GATE, inner=ATTENTION)
    read = 3 * DIM * 18
    assert wrapped.count() == Count(inner + gate + fusion, inner - read // 4 + gate + fusion)
    saved = wrapped.cost(50).flops - wrapped.cost(50).active_flops
    alone = ATTENTION.cost(50).flops - ATTENTION.cost(50).active_flops
    assert saved - alone == 2 * read / 4


def test_in_depth_all_learn_and_decoding_equals_the_full_forward() -> None:
    block = Block(
        mixer=MoHDResidual(gate=GATE, inner=ATTENTION),
        ffn=MoHDResidual(gate=GATE, inner=MoHDFFN(gate=GATE, hidden=HIDDEN)),
        norm=RMSNorm(dim=DIM),
    )
    stack = Repeat(block=block, n=2, remat="full")
    params = draw(stack, 5)

    @jax.jit
    def run(params: Any) -> tuple:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            y, _, aux = stack.apply(params, jnp.asarray(X))
            return (y**2).sum(), aux.losses["load_balance"]

        cache, outputs = stack.init_cache(len(X), X.shape[1]), []
        for a, b in ((0, 5), (5, 6), (6, 7)):
            ctx = Context(positions=jnp.broadcast_to(jnp.arange(a, b), (len(X), b - a)))
            y, cache, _ = stack.apply(params, X[:, a:b], ctx, cache)
            outputs.append(y)
        full = stack.apply(params, jnp.asarray(X))[0]
        return jax.jacrev(loss)(params), full, jnp.concatenate(outputs, 1)

    (output, balance), full, steps = run(params)
    for path, g in flatten(output):
        assert np.all(np.any(g, axis=tuple(range(1, g.ndim)))), path
    for gate in (balance["mixer"]["gate"], balance["ffn"]["gate"], balance["ffn"]["inner"]["gate"]):
        assert np.all(np.any(gate["centroids"], axis=(1, 2)))
    close(steps, full, rtol=2e-5)


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    inner = MoHDFFN(gate=GATE, hidden=HIDDEN)
    layer = MoHDResidual(gate=GATE, inner=inner, fusion="block")
    params, x = draw(layer, 5), jnp.asarray(np.concatenate((X, X[:1])))

    def run(params: Any, x: jax.Array) -> tuple:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, aux = layer.apply(params, x)
            return (y**2).sum() + aux.losses["load_balance"], y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    expected = jax.jit(run)(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, layer.abstract(mesh)))
        actual = jax.jit(run)(placed, x)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, rtol=2e-5), actual, expected)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: SubDimensions(dim=4, num=4, num_shared=3, top_k=2), "num_shared: 3 and top_k 2"),
        (lambda: SubDimensions(dim=4, num=4, num_shared=0, top_k=0), "num_shared: 0 and top_k 0"),
        (lambda: MoHDFFN(gate=GATE, hidden=18), "hidden: 18; need a multiple of the gate's num 4"),
        (lambda: Fusion(width=6, kind="butterfly"), "kind: 'butterfly'; need one of none, block"),
        (lambda: Fusion(width=6, kind="block", num=4), "num: 4; need a divisor of the width 6"),
        (
            lambda: MoHDResidual(gate=GATE, inner=GLU(dim=8, hidden=4, activation=Silu())),
            "inner.dim: 8; need gate.dim 12",
        ),
    ],
)
def test_impossible_fields_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "name, published", [("mohd_355m", 355e6), ("mohd_495m", 495e6), ("mohd_1b", 1.13e9)]
)
def test_published_sizes(name: str, published: float) -> None:
    """The paper gives totals alone; fusions and gates are within 2 % of them."""
    assert getattr(mohd, name)().count().total == pytest.approx(published, rel=0.02)


def test_the_tiny_model_has_the_size_of_the_dense_one() -> None:
    ours, dense = mohd.mohd_tiny().count().total, llama.llama_tiny().count().total
    assert ours == pytest.approx(dense, rel=1e-2)
