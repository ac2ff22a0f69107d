"""AF-KAN: golden vectors, scopes, several methods, batch statistics, extremes, in a decoder."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw, here_and_on, next_byte_loss

from bestiary.eval.hlo import jaxpr_flops
from bestiary.layers import (
    AFKAN,
    AFKANFFN,
    BatchNorm,
    Elu,
    Gelu,
    LayerNorm,
    LeakyRelu,
    Relu,
    Selu,
    Sigmoid,
    Silu,
    Softplus,
    Tanh,
)
from bestiary.layers.base import flatten
from bestiary.zoo.llama import byte_llama

DIM, HIDDEN = 12, 10
ACTIVATIONS = {
    "silu": Silu,
    "gelu": Gelu,
    "relu": Relu,
    "leaky_relu": LeakyRelu,
    "elu": Elu,
    "selu": Selu,
    "softplus": Softplus,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
}
METHODS = ("global_attn", "spatial_attn", "multistep")
X = np.random.default_rng(0).normal(size=(4, 6, DIM)).astype(np.float32)


def afkan(inputs: int = DIM, outputs: int = HIDDEN, **options: Any) -> AFKAN:
    return AFKAN(**dict(inputs=inputs, outputs=outputs, norm=LayerNorm(dim=inputs)) | options)


FFN = AFKANFFN(
    up=afkan(methods=METHODS[:2]),
    down=afkan(HIDDEN, DIM, methods=METHODS[:2], axes=("mlp", "embed"), combination="quadratic"),
)


def near(actual: Any, expected: Any, rtol: float = 1e-4) -> None:
    """Also to a millionth of the largest of all: softmax does not see the bias of the scores of
    global_attn, whose gradient of 0 is all rounding."""
    scale = 1e-6 * max(float(np.abs(e).max()) for e in jax.tree.leaves(expected))

    def one(a: Any, e: Any) -> None:
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max() + scale)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(one, actual, expected)


def ours(a: dict[str, Any], prefix: str) -> Any:
    """The tensors of a released layer as our parameters, for what there is of them."""
    a = {
        name.removeprefix(prefix): jnp.asarray(x)
        for name, x in a.items()
        if name.startswith(prefix)
    }
    params: Any = {
        "low": a["phase_low"],
        "high": a["phase_high"],
        "activation": {},
        "weight": a["base_weight"].T,
    }
    if "norm.weight" in a:
        params["norm"] = {"weight": a["norm.weight"], "bias": a["norm.bias"]}
    if "temperature" in a:
        params["temperature"] = a["temperature"].reshape(())
    if "gk_linear.weight" in a:
        score = a["gk_linear.weight"][0], a["gk_linear.bias"][0]
        params["score"] = dict(zip(("weight", "bias"), score, strict=True))
    if "conv1d.weight" in a:
        params["conv"] = {"weight": a["conv1d.weight"][:, 0].T, "bias": a["conv1d.bias"]}
    return params


def layer_of(hp: dict[str, Any], inputs: int, outputs: int, **options: Any) -> AFKAN:
    norms = {"layer": LayerNorm(dim=inputs, eps=hp["layer_norm_eps"]), "none": None}
    return AFKAN(
        inputs=inputs,
        outputs=outputs,
        norm=norms[hp["norm_type"]],
        activation=ACTIVATIONS[hp["activation"]](),
        grid=hp["grid_size"],
        order=hp["spline_order"],
        **options,
    )


@pytest.mark.golden("kan_afkan")
def test_layer(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    x, params = jnp.asarray(a["x"]), ours(a, "w/")
    checked = hp["gradient_configuration"]
    for configuration in hp["configurations"]:
        layer = layer_of(
            hp,
            hp["in_features"],
            hp["out_features"],
            function=configuration["function"],
            methods=(configuration["method"],),
            scope=hp["func_norm_scope"] if configuration["func_norm"] else "none",
        )
        mine = {name: params[name] for name in layer.spec()}
        shapes = jax.tree.map(lambda s: s.shape, layer.abstract())
        assert jax.tree.map(jnp.shape, mine) == shapes
        close(layer.features(mine, x), a[configuration["feature_key"]])
        y, pull = jax.vjp(layer.apply, mine, x)
        close(y, a[configuration["key"]])
        if all(configuration[name] == value for name, value in checked.items()):
            grads, dx = pull(jnp.asarray(a["cotangent"]))
            near((grads, dx), (ours(a, "g/"), a["grad_x"]))


@pytest.mark.golden("kan_afkan_net")
def test_network(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    y, sizes = jnp.asarray(a["x"]), hp["layer_sizes"]
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        scope = "batch" if hp["func_norm"] else "none"
        options: Any = dict(function=hp["function"], methods=(hp["method"],), scope=scope)
        layer = layer_of(hp, inputs, outputs, **options)
        y = layer.apply(ours(a, f"w/rk_layers.{i}."), y)
    close(y, a["y/net"])


def test_samples_are_apart_unless_scaled_by_the_batch() -> None:
    for scope, alone in (("none", True), ("sample", True), ("batch", False)):
        layer = afkan(scope=scope)
        params = draw(layer)
        y, one = layer.apply(params, X), layer.apply(params, X[1:2, 2:3])
        apart = np.allclose(y[1:2, 2:3], one, rtol=1e-4, atol=1e-4)
        assert apart == alone, scope
    z = afkan(scope="sample").features(draw(afkan()), jnp.asarray(X))
    close(z.max((-1, -2)), np.ones((4, 6)))
    close(z.min((-1, -2)) + 1, np.ones((4, 6)))


@pytest.mark.parametrize("combination", ["sum", "product", "sum_product", "quadratic"])
def test_several_methods_share_parameters_and_are_combined(combination: Any) -> None:
    layer = afkan(methods=METHODS, combination=combination)
    params = draw(layer)
    parts = []
    for method in METHODS:
        one = afkan(methods=(method,))
        parts.append(np.float64(one.apply({k: params[k] for k in one.spec()}, X)))
    total, product = sum(parts), np.prod(parts, 0)
    squares = sum(p**2 for p in parts)
    expected = {
        "sum": total,
        "product": product,
        "sum_product": total + product,
        "quadratic": total + product + squares,
    }
    close(layer.apply(params, X), expected[combination])


def test_batch_statistics() -> None:
    """`train` normalises by the batch, and two methods move the statistics one after the other."""
    layer = afkan(norm=BatchNorm(dim=DIM), methods=("multistep", "multistep"))
    params = draw(layer)
    y, aux = layer.train(params, X)
    h = layer.reduce("multistep", params, layer.features(params, jnp.asarray(X)))
    z = (h - h.mean((0, 1))) / np.sqrt(h.var((0, 1)) + 1e-5)
    z = z * params["norm"]["weight"] + params["norm"]["bias"]
    close(y, 2 * (jax.nn.silu(z) @ params["weight"]), rtol=1e-4)
    expected = 0.81 * params["norm"]["mean"] + 0.19 * h.mean((0, 1))
    close(aux.state["norm"]["mean"], expected)


@pytest.mark.parametrize("scope", ["none", "sample", "batch"])
def test_gradients_are_finite_where_all_is_0_and_far_away(scope: Any) -> None:
    for function in ("quad1", "cubic2"):
        layer = afkan(scope=scope, function=function, methods=METHODS[:2], activation=Relu())
        params = layer.init(jax.random.key(0))

        @jax.jit
        def run(params: Any, x: jax.Array, layer: AFKAN = layer) -> Any:
            y, pull = jax.vjp(layer.apply, params, x)
            return y, pull(jnp.ones_like(y))

        for value in (0.0, -1e4, 1e4):
            results = run(params, jnp.full((2, DIM), value, jnp.bfloat16))
            assert results[0].dtype == jnp.bfloat16
            for array in jax.tree.leaves(results):
                assert np.isfinite(np.asarray(array, np.float32)).all(), (function, value)


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    params, x = draw(FFN), jnp.asarray(X)
    expected, actual = here_and_on(mesh, FFN, lambda *args: FFN.apply(*args)[0], params, x)
    near(actual, expected)


def test_a_decoder_trains_with_it() -> None:
    ffn = AFKANFFN(up=afkan(64, 48), down=afkan(48, 64, axes=("mlp", "embed")))
    model = byte_llama(1, 64, ffn)
    params, loss = model.init(jax.random.key(0)), next_byte_loss(model)
    before, grads = loss(params)
    for path, g in flatten(grads):
        assert np.any(g) or path.endswith("score/bias"), path
    assert loss(jax.tree.map(lambda p, g: p - 0.05 * g, params, grads))[0] < before


def test_counts_and_costs() -> None:
    """As many parameters as the matrix, the norm, and a few."""
    layer = afkan()
    few = 2 * layer.size + 1 + layer.size + 1
    assert layer.count().total == DIM * HIDDEN + 2 * DIM + few
    traced = jax.make_jaxpr(layer.apply)(layer.abstract(), jnp.asarray(X))
    assert layer.cost(5).flops * 24 == jaxpr_flops(traced)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: afkan(grid=0), "grid: 0; need at least 1"),
        (lambda: afkan(methods=()), "methods: 0; need at least 1"),
        (lambda: afkan(order=-1), "order: -1; need 0 or more"),
        (lambda: afkan(function="quad3"), "function: 'quad3'; need one of quad1, quad2, sum"),
        (lambda: afkan(methods=("self_attn",)), "methods: 'self_attn'; need one of global_attn"),
        (lambda: afkan(scope="all"), "scope: 'all'; need one of none, sample, batch"),
        (lambda: AFKANFFN(up=FFN.up, down=FFN.up), "down: 12 to 10; need 10 to 12"),
        (
            lambda: AFKANFFN(up=FFN.up, down=replace(FFN.down, methods=METHODS)),
            "down.methods: .*; need those of up",
        ),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
