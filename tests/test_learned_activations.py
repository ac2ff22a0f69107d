"""Batch statistics, learned and clipped activations, perceptrons: golden vectors and oracles."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw

from bestiary.layers import (
    BatchNorm,
    Clipped,
    Dice,
    Interpolated,
    Layer,
    Perceptron,
    PReLU,
    Relu,
    ReluSquared,
)
from bestiary.layers.perceptron import perceptron

RTOL = 1e-5


@pytest.mark.golden("din_dice")
def test_golden_dice(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    assert hp["running_var_unbiased"]
    options = dict(dim=hp["num_features"], eps=hp["eps"], momentum=hp["momentum"])
    layer, plain = Dice(**options, affine=True), Dice(**options)
    norm = {"weight": a["bn_weight"], "bias": a["bn_bias"]}
    statistics = plain.init(jax.random.key(0))["norm"]
    params = {"alpha": jnp.asarray(a["alpha"]), "norm": statistics | norm}

    @jax.jit
    def train(params: Any, x: Any, cotangent: Any) -> Any:
        y, pull, aux = jax.vjp(layer.train, params, x, has_aux=True)
        return y, aux.state["norm"], *pull(cotangent)

    y, state, grads, grad_x = train(params, a["x"], a["cotangent"])
    close(y, a["y_train"], RTOL)
    close(grad_x, a["grad_x"], RTOL)
    close(grads["alpha"], a["grad_alpha"], RTOL)
    close(grads["norm"]["weight"], a["grad_bn_weight"], RTOL)
    close(grads["norm"]["bias"], a["grad_bn_bias"], RTOL)
    close(state["mean"], a["running_mean"], RTOL)
    close(state["var"], a["running_var"], RTOL)
    evaluated = layer.apply(params | {"norm": params["norm"] | state}, a["x"])
    close(evaluated, a["y_eval"], RTOL)
    without = plain.train({"alpha": params["alpha"], "norm": statistics}, a["x"])[0]
    close(without, a["y_train_noaffine"], RTOL)


def test_statistics_leave_out_padding() -> None:
    """As of the real rows alone; without any row they stay as they were."""
    rng = np.random.default_rng(0)
    x, where = jnp.asarray(rng.normal(2, 3, (4, 5, 3)), jnp.float32), rng.random((4, 5, 1)) < 0.6
    layer = BatchNorm(dim=3)
    params = layer.init(jax.random.key(0))
    y, aux = layer.train(params, x.at[~where[..., 0]].set(1e6), jnp.asarray(where))
    real = np.float64(x)[where[..., 0]]
    expected = (real - real.mean(0)) / np.sqrt(real.var(0) + layer.eps)
    close(np.asarray(y)[where[..., 0]], expected)
    close(aux.state["mean"], 0.1 * real.mean(0))
    close(aux.state["var"], 0.9 + 0.1 * real.var(0, ddof=1))
    _, aux = layer.train(params, x, jnp.zeros((4, 5, 1), bool))
    close(aux.state["mean"], params["mean"])
    close(aux.state["var"], params["var"])


@pytest.mark.golden("clipped_activations")
def test_golden_clipped(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    for per, neurons in (("layer", None), ("neuron", hp["num_features"])):
        bound = a[f"bound_{per}"] if neurons else a["bound_layer"].reshape(())
        for kind in ("zero", "saturate", "smooth"):
            if f"{kind}_{per}" not in a:
                continue
            layer = Clipped(kind=kind, neurons=neurons, slope=hp["smooth_slope"])
            assert layer.abstract()["bound"].shape == bound.shape

            @jax.jit
            def run(bound: Any, x: Any, cotangent: Any, layer: Layer = layer) -> Any:
                y, pull = jax.vjp(lambda b, x: layer.apply({"bound": b}, x), bound, x)
                return y, *pull(cotangent)

            y, grad_bound, grad_x = run(bound, a["x"], a["cotangent"])
            close(y, a[f"{kind}_{per}"], RTOL)
            if f"{kind}_{per}_grad_x" in a:
                close(grad_x, a[f"{kind}_{per}_grad_x"], RTOL)
                close(np.reshape(grad_bound, -1), a[f"{kind}_{per}_grad_bound"], RTOL)


@pytest.mark.parametrize("kind", ["zero", "saturate", "smooth"])
def test_what_is_not_finite_becomes_zero(kind: Any) -> None:
    """In the input, in the bound, and in the gradients of both."""
    layer = Clipped(kind=kind, neurons=5)
    x = jnp.array([np.nan, np.inf, -np.inf, 3e38, 1.0])

    def value(bound: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = layer.apply({"bound": bound}, x)
        return y.sum(), y

    for bound in (jnp.full(5, 2.0), jnp.full(5, np.nan), jnp.full(5, np.inf)):
        grads, y = jax.grad(value, (0, 1), has_aux=True)(bound, x)
        assert not np.asarray(y[:3]).any()
        assert all(np.isfinite(g).all() for g in (*grads, y))
    y = layer.apply({"bound": jnp.full(5, 2.0)}, x)
    close(y[3:], [2.0 if kind == "saturate" else 0.0, 1.0])


def test_prelu_and_interpolation() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    alpha = jnp.array([-1.0, 0.0, 0.5, 2.0])
    close(PReLU(dim=4).apply({"alpha": alpha}, x), np.where(x > 0, x, np.asarray(alpha) * x))
    assert PReLU().abstract()["alpha"].shape == ()
    first, second = Relu(), ReluSquared()
    fixed = Interpolated(first=first, second=second, alpha=0.25)
    learned = Interpolated(first=first, second=second, alpha=0.25, kind="learned")
    r = np.maximum(x, 0)
    for layer in (fixed, learned):
        close(layer.apply(layer.init(jax.random.key(0)), x), 0.25 * r + 0.75 * r**2)
    for alpha, end in ((1.0, r), (0.0, r**2)):
        params = fixed.init(jax.random.key(0)) | {"alpha": jnp.float32(alpha)}
        close(fixed.apply(params, x), end)
    # the learned one has a gradient
    grad = jax.grad(lambda p: learned.apply(p, x).sum())(learned.init(jax.random.key(0)))
    close(grad["logit"], 0.25 * 0.75 * (r - r**2).sum())


def test_perceptron() -> None:
    """Against NumPy; in training its Dice layers report their next statistics."""
    layer = perceptron((3, 4, 5, 2), lambda width: Dice(dim=width))
    params, x = draw(layer), np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32)
    params["activation_0"]["norm"]["var"] = jnp.abs(params["activation_0"]["norm"]["var"])
    h, expected = np.float64(x), {}
    for i in range(3):
        p = jax.tree.map(np.float64, params[f"linear_{i}"])
        h = h @ p["weight"] + p["bias"]
        if i < 2:
            a = jax.tree.map(np.float64, params[f"activation_{i}"])
            mean, var = h.mean(0), h.var(0)
            old = a["norm"]["mean"]
            expected[f"activation_{i}"] = old + 0.1 * (mean - old)
            p = 1 / (1 + np.exp(-(h - mean) / np.sqrt(var + 1e-8)))
            h = p * h + (1 - p) * a["alpha"] * h
    y, aux = jax.jit(layer.train)(params, x)
    close(y, h)
    for name, mean in expected.items():
        close(aux.state[name]["norm"]["mean"], mean)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PReLU(dim=0), "dim: 0; need at least 1"),
        (lambda: Dice(dim=3, momentum=2.0), "momentum: 2.0; need 0 to 1"),
        (
            lambda: Interpolated(first=Relu(), second=Relu(), alpha=1.5),
            "alpha: 1.5; need 0 to 1 where it is fixed",
        ),
        (
            lambda: Interpolated(first=Relu(), second=Relu(), alpha=1.0, kind="learned"),
            "alpha: 1.0; need between 0 and 1, without both where it is learned",
        ),
        (
            lambda: Interpolated(first=Relu(), second=Relu(), kind="vmapped"),
            "kind: 'vmapped'; need one of fixed, learned",
        ),
        (
            lambda: Clipped(kind="soft"),
            "kind: 'soft'; need one of zero, saturate, smooth",
        ),
        (lambda: Clipped(slope=0.0), "slope: 0.0; need more than 0"),
        (lambda: Clipped(neurons=0), "neurons: 0; need at least 1"),
        (
            lambda: Perceptron(widths=(3, 4), activations=(Relu(),)),
            "activations: 1 for widths (3, 4); need at least two widths, and one activation for "
            "each but the first and the last",
        ),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()
