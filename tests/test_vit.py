"""Vision models: published sizes, an oracle, permutations, costs, feed-forwards by their role."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw
from scipy.special import erf

from bestiary.layers import GLU, LayerNorm, MoE, PolyReLU, Relu, Router, Silu
from bestiary.layers.base import Context, Precision, flatten, params_of
from bestiary.layers.drop_path import drop_path
from bestiary.layers.grkan import GRKAN
from bestiary.layers.sharding import DEFAULT_RULES, use_rules
from bestiary.zoo import load_model
from bestiary.zoo.convnet import Conv, ConvNet, Down, convnet
from bestiary.zoo.vit import ViT, gelu_mlp, sincos, vit_blocks

DIM, HEADS = 16, 2


def tiny(**changes: Any) -> ViT:
    fields: dict[str, Any] = {
        "height": 6,
        "width": 4,
        "channels": 3,
        "patch": 2,
        "classes": 5,
        "blocks": vit_blocks(DIM, HEADS, 2, gelu_mlp(DIM)),
        "norm": LayerNorm(dim=DIM, eps=1e-6),
    }
    return ViT(**(fields | changes))


def images(model: ViT | ConvNet, batch: int = 4) -> jax.Array:
    shape = (batch, model.height, model.width, model.channels)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("name", "total"),
    [("deit_tiny", 5_717_416), ("deit_small", 22_050_664), ("deit_base", 86_567_656)],
)
def test_published_sizes(name: str, total: int) -> None:
    """DeiT exactly; KAT in millions (5.7, 22.1, 86.6), with the coefficients of 24 rationals."""
    assert load_model(name).count().total == total
    kat = load_model(name.replace("deit", "kat")).count().total
    assert kat == total + 24 * (6 + 4 * 8) and f"{kat / 1e6:.1f}" == f"{total / 1e6:.1f}"


def norm(x: np.ndarray, p: Any) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["weight"] + p["bias"]


def oracle(model: ViT, p: Any, x: np.ndarray) -> np.ndarray:
    """The model of the paper in double precision, patch by patch and head by head."""
    side, (rows, columns) = model.patch, model.grid
    tokens = [p["class"]] if model.pool == "class" else []
    for r in range(rows):
        for c in range(columns):
            square = x[r * side : (r + 1) * side, c * side : (c + 1) * side]
            tokens.append((square.ravel() @ p["patches"]["weight"] + p["patches"]["bias"])[None])
    h = np.concatenate(tokens) + p["positions"]
    h = np.concatenate((h, p["registers"])) if model.registers else h
    for i in range(2):
        b = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        m, n = b["mixer"], norm(h, b["mixer_norm"])
        for head in range(HEADS):
            q, k, v = (
                n @ m[name][:, head] + m[f"{name}_bias"][head] for name in ("query", "key", "value")
            )
            w = np.exp(q @ k.T / np.sqrt(DIM // HEADS))
            h = h + w / w.sum(-1, keepdims=True) @ v @ m["out"][head]
        h = h + m["out_bias"]
        f = b["ffn"]
        u = norm(h, b["ffn_norm"]) @ f["up"] + f["up_bias"]
        h = h + (u * (1 + erf(u / np.sqrt(2))) / 2) @ f["down"] + f["down_bias"]
    h = norm(h, p["norm"])
    pooled = h[0] if model.pool == "class" else h[: rows * columns].mean(0)
    return pooled @ p["head"]["weight"] + p["head"]["bias"]


@pytest.mark.parametrize("changes", [{}, {"registers": 3}, {"pool": "mean"}], ids=str)
def test_against_an_oracle(changes: dict) -> None:
    model = tiny(**changes)
    params, x = draw(model), images(model)
    logits, _ = jax.jit(model.apply)(params, x)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    close(logits, [oracle(model, wide, np.float64(image)) for image in x])
    assert logits.dtype == jnp.float32


def test_sincos_positions() -> None:
    found = np.asarray(sincos(3, 2, 8))
    for row in range(3):
        for column in range(2):
            angles = np.outer((row, column), 10000.0 ** -np.array([0, 0.5]))
            expected = [f(a) for a in angles for f in (np.sin, np.cos)]
            np.testing.assert_allclose(found[2 * row + column], np.ravel(expected), atol=1e-6)


def test_only_positions_tell_patches_apart() -> None:
    """Without them any order of the patches gives the same; with them it does not."""
    model = tiny(pool="mean", registers=2)
    params, x = draw(model), images(model)
    swapped = jnp.concatenate((x[:, 2:4], x[:, :2], x[:, 4:]), 1)  # two rows of patches
    run = jax.jit(model.apply)
    assert np.abs(run(params, x)[0] - run(params, swapped)[0]).max() > 1e-3
    params["positions"] = jnp.zeros_like(params["positions"])
    close(run(params, swapped)[0], run(params, x)[0])


def test_stochastic_depth() -> None:
    """Rows pass by branches as often as declared, what stays is divided by its share, and without a
    key nothing is left out."""
    y, rate = jnp.ones((4000, 2, 3)), jnp.float32(0.25)
    ctx = Context(key=jax.random.key(0), layer={"drop_path": rate})
    kept = np.asarray(drop_path(y, ctx, "a"))
    assert set(np.unique(kept)) == {0, np.float32(1 / 0.75)} and abs(kept.mean() - 1) < 0.05
    assert (kept == kept[:, :1, :1]).all() and (kept != drop_path(y, ctx, "b")).any()
    for other in (Context(key=ctx.key), Context(layer=ctx.layer)):
        assert drop_path(y, other, "a") is y
    model = tiny(drop_path=0.5)
    assert dict(model.dropping.constants) == {"drop_path": (0.0, 0.5)}
    params, x = draw(model), images(model)
    run = jax.jit(lambda key: model.apply(params, x, Context(key=key))[0])
    close(model.apply(params, x)[0], tiny().apply(params, x)[0])
    found = [np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1)]
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()
    with pytest.raises(ValueError, match="drop_path: 1; need 0 or more, below 1"):
        tiny(drop_path=1)


FFNS = {
    "kat": GRKAN(dim=DIM, hidden=32),
    "moe": MoE(
        router=Router(dim=DIM, num_experts=4, top_k=2, balance=0.1),
        expert=GLU(dim=DIM, hidden=8, activation=Silu()),
    ),
}
MODELS: dict[str, ViT | ConvNet] = {
    name: tiny(blocks=vit_blocks(DIM, HEADS, 2, ffn), positions="sincos")
    for name, ffn in FFNS.items()
}
MODELS |= {
    "vit": tiny(registers=2),
    "convnet": convnet(6, 2, (4, 6), 2, Relu()),
    "convnet_poly": convnet(5, 1, (4, 8), 1, PolyReLU()),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name: str) -> None:
    model = MODELS[name]
    params, x = draw(model), images(model)

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, aux = model.apply(params, x)
            return (logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)).sum() + sum(
                aux.losses.values()
            )

        return jax.grad(loss)(params)

    declared = dict(flatten(model.declare()))
    for path, g in flatten(gradient(params)):
        # a key's bias shifts all logits of a query alike
        assert path.endswith("key_bias") or not declared[path].trainable or np.any(g), path
        assert np.isfinite(g).all(), path
    count = model.count()
    assert count.total == sum(p.size for p in params_of(model.declare())) >= count.active


@pytest.mark.parametrize("name", ["vit", "convnet"])
def test_sharded_equals_unsharded(name: str, mesh: jax.sharding.Mesh) -> None:
    model = MODELS[name]
    params, x = draw(model), images(model)
    expected = jax.jit(model.apply)(params, x)[0]
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        if name == "convnet":
            placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        else:
            placed = jax.device_put(
                params, jax.tree.map(lambda s: s.sharding, params_at(model, mesh))
            )
        close(jax.jit(model.apply)(placed, x)[0], expected)


def params_at(model: ViT | ConvNet, mesh: jax.sharding.Mesh) -> Any:
    """Shapes of the parameters; an axis that the mesh does not divide (5 classes) is not split."""
    return jax.tree.map(
        lambda s: (
            s
            if all(n % 2 == 0 for n in s.shape)
            else jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
        ),
        model.abstract(mesh),
    )


def test_bfloat16_and_unrolled() -> None:
    model = tiny()
    narrow = replace(model, precision=Precision(params="bfloat16", compute="bfloat16"))
    assert {p.dtype for p in params_of(narrow.declare())} == {jnp.dtype(jnp.bfloat16)}
    assert narrow.cost().bytes == model.cost().bytes / 2
    logits, _ = jax.eval_shape(narrow.apply, narrow.abstract(), images(model))
    assert logits.dtype == jnp.float32
    params, x = draw(model), images(model)
    close(jax.jit(model.unrolled().apply)(params, x)[0], jax.jit(model.apply)(params, x)[0])


def test_cost_of_an_image() -> None:
    """Twice the multiply-adds, written down part by part."""
    model = tiny(registers=1)
    tokens = 6 + 1 + 1
    block = 4 * DIM * DIM + 2 * DIM * 4 * DIM + 2 * tokens * DIM
    expected = 6 * 12 * DIM + 2 * tokens * block + DIM * 5
    assert model.cost().flops == model.cost().active_flops == 2 * expected
    net = convnet(5, 1, (4, 6), 1, Relu())
    expected = 25 * 9 * 4 + 25 * 2 * 9 * 16 + 9 * 9 * 24 + 9 * 2 * 9 * 36 + 6 * 10
    assert net.cost().flops == 2 * expected


def test_convolution_against_its_definition() -> None:
    rng = np.random.default_rng(0)
    for size, stride in ((5, 1), (5, 2), (6, 2)):
        conv = Conv(inputs=2, outputs=3, stride=stride)
        params = draw(conv)
        x = rng.normal(size=(2, size, size, 2)).astype(np.float32)
        out = -(-size // stride)
        total = max((out - 1) * stride + 3 - size, 0)  # zeros around, the fewer of them before
        before = total // 2
        padded = np.pad(x, ((0, 0), (before, total - before), (before, total - before), (0, 0)))
        w, expected = np.asarray(params["weight"]), np.zeros((2, out, out, 3))
        for i in range(out):
            for j in range(out):
                here = padded[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
                expected[:, i, j] = np.einsum("bhwc,hwco->bo", here, w)
        close(conv.apply(params, jnp.asarray(x)), expected)


def test_stages_halve_the_places_and_report_their_activations() -> None:
    net = MODELS["convnet"]
    params, x = draw(net), images(net)
    _, aux = jax.jit(net.apply)(params, x)
    shares = dict(flatten(aux.metrics))
    assert {path for path in shares} == {
        f"blocks/{stage}/{half}/nonzero" for stage in "02" for half in ("first", "second")
    }
    assert all(value.shape == (2,) and 0 < value.min() <= 1 for value in shares.values())
    down = Down(norm=LayerNorm(dim=4), outputs=6)
    y, cache, _ = down.apply(draw(down), jnp.ones((1, 5, 5, 4)))
    assert y.shape == (1, 3, 3, 6) and cache is None


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("height: 5; need a multiple of patch 2", {"height": 5}),
        ("width: 0; need a multiple", {"width": 0}),
        ("patch: 0; need at least 1", {"patch": 0}),
        ("pool: 'max'; need one of", {"pool": "max"}),
        ("positions: 'rope'; need one of", {"positions": "rope"}),
        ("registers: -1; need 0 or more", {"registers": -1}),
        ("norm.dim: 6; sincos positions", {"positions": "sincos", "norm": LayerNorm(dim=6)}),
    ],
)
def test_impossible_sizes_are_refused(message: str, changes: dict) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
    with pytest.raises(ValueError, match=r"images: of shape \(4, 6, 3\); need \(6, 4, 3\)"):
        tiny().apply({}, jnp.ones((1, 4, 6, 3)))
