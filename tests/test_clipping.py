"""Bounds of clipped activations: placed, profiled, searched, trained; in loops as well."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close

from bestiary.eval.clipping import (
    accuracy,
    bound_paths,
    clip,
    faulty_accuracy,
    profile,
    search_bounds,
)
from bestiary.eval.faults import Fixed
from bestiary.eval.proact import ProAct, train_bounds
from bestiary.layers import MLP, Attention, Clipped, Layer, LayerNorm, Relu, Repeat, Silu
from bestiary.layers.base import flatten
from bestiary.layers.perceptron import perceptron
from bestiary.zoo.decoder import Block

MODEL = perceptron((6, 16, 12, 3), lambda width: Relu())
PARAMS = MODEL.init(jax.random.key(0))
X = jnp.asarray(np.random.default_rng(0).normal(size=(96, 6)), jnp.float32)
PARAMS["linear_2"]["bias"] = -MODEL.apply(PARAMS, X).mean(0)  # as many rows of every class
LABELS = MODEL.apply(PARAMS, X).argmax(-1)
PATHS = ["activation_0/bound", "activation_1/bound"]


def hidden(x: Any) -> list[np.ndarray]:
    """The activations of `MODEL`, in NumPy."""
    found, h = [], np.float64(x)
    for i in range(2):
        p = PARAMS[f"linear_{i}"]
        h = np.maximum(h @ np.float64(p["weight"]) + np.float64(p["bias"]), 0)
        found.append(h)
    return found


@pytest.mark.parametrize("per", ["layer", "neuron", "hybrid"])
def test_bounds_are_the_largest_activations(per: Any) -> None:
    model, params = clip(MODEL, PARAMS, X, kind="saturate", per=per)
    assert bound_paths(model) == PATHS
    for i, (path, h) in enumerate(zip(PATHS, hidden(X), strict=True)):
        own = per == "neuron" or (per == "hybrid" and i == 1)
        close(dict(flatten(params))[path], h.max(0) if own else h.max())
    close(model.apply(params, X), MODEL.apply(PARAMS, X), 1e-6)  # nothing is clipped
    # of several batches the largest; a clipped model is clipped anew
    again = profile(model, params, [X[:50], X[50:]])
    jax.tree.map(lambda a, b: close(a, b, 1e-6), again, params)
    halved, other = clip(model, params, X[:40], kind="zero")
    assert halved.activations == (Clipped(), Clipped())
    close(other["activation_0"]["bound"], hidden(X[:40])[0].max())


def test_loops_and_other_layers() -> None:
    """A bound for each repeat of a scanned, recomputed block."""
    ffn = MLP(dim=8, hidden=20, activation=Relu())
    mixer = Attention(dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
    block = Block(mixer=mixer, ffn=ffn, norm=LayerNorm(dim=8))
    model = Repeat(block=block, n=3, remat="full")
    params = model.init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 8)), jnp.float32)

    def forward(model: Layer, params: Any, x: jax.Array) -> jax.Array:
        return model.apply(params, x)[0]

    clipped, new = clip(model, params, x, kind="saturate", per="neuron", forward=forward)
    (path,) = bound_paths(clipped)
    bounds = dict(flatten(new))[path]
    assert bounds.shape == (3, 20)
    close(forward(clipped, new, x), forward(model, params, x), 1e-5)
    # a little less, and the largest activation of every repeat is cut
    for layer in range(3):
        less = bounds.at[layer].multiply(0.9)
        lower = jax.tree.map(lambda v, b=bounds, c=less: c if v is b else v, new)
        assert np.abs(forward(clipped, lower, x) - forward(model, params, x)).max() > 1e-4


def test_clipping_keeps_accuracy_and_the_search_is_no_worse() -> None:
    model, params = clip(MODEL, PARAMS, X)
    key, form = jax.random.key(1), Fixed(15, 16)
    options = dict(draws=20, format=form)
    plain = faulty_accuracy(MODEL, PARAMS, X, LABELS, key, 1e-3, **options)
    again = faulty_accuracy(MODEL, PARAMS, X, LABELS, key, 1e-3, **options)
    np.testing.assert_array_equal(plain, again)
    kept = faulty_accuracy(model, params, X, LABELS, key, 1e-3, **options)
    assert accuracy(MODEL, PARAMS, X, LABELS) == pytest.approx(100)
    assert plain.shape == (20,) and kept.mean() > plain.mean() + 5

    rates = (1e-4, 1e-3, 3e-3)

    def area(params: Any) -> float:
        means = [
            faulty_accuracy(model, params, X, LABELS, key, rate, **options).mean() for rate in rates
        ]
        return float(np.trapezoid(np.asarray(means), np.linspace(0.2, 1, 3)))

    searched = search_bounds(model, params, X, LABELS, key, rates=rates, **options)
    bounds, before = (dict(flatten(p)) for p in (searched, params))
    assert all(0 < bounds[path] <= before[path] for path in PATHS)
    assert area(searched) >= area(params)  # whose bounds are the first round's last points


def test_the_search_finds_a_known_optimum() -> None:
    """Without faults, on labels of the network with a lower bound."""
    model, params = clip(MODEL, PARAMS, X, kind="saturate")
    target = params["activation_0"]["bound"] * 0.3
    labels = model.apply(params | {"activation_0": {"bound": target}}, X).argmax(-1)
    found = search_bounds(model, params, X, labels, jax.random.key(0), rates=(0.0, 0.0), draws=1)
    assert accuracy(model, params, X, labels) < 95
    assert accuracy(model, found, X, labels) > 97
    assert abs(found["activation_0"]["bound"] / target - 1) < 0.2


def test_progressive_training_shrinks_bounds_and_keeps_accuracy() -> None:
    model, params = clip(MODEL, PARAMS, X, kind="smooth", per="hybrid")
    options = ProAct(
        epochs=30, decays=(4e-2, 4e-12), batch_size=32, warmup=3, layer_rate=0.1, tolerance=3
    )
    lines: list[str] = []
    trained = train_bounds(
        model, params, MODEL, (X, LABELS), (X, LABELS), jax.random.key(0), options, say=lines.append
    )
    assert [line.split(":")[0] for line in lines] == PATHS[::-1]  # from the last to the first
    before, after = (dict(flatten(p)) for p in (params, trained))
    for path, value in before.items():
        if path in PATHS:
            assert after[path].shape == value.shape and after[path].mean() < value.mean()
        else:
            np.testing.assert_array_equal(after[path], value)
    assert abs(accuracy(model, trained, X, LABELS) - 100) <= options.tolerance


@pytest.mark.parametrize(
    "run, message",
    [
        (
            lambda: clip(MODEL, PARAMS, X, per="channel"),
            "per: 'channel'; need one of layer, neuron, hybrid",
        ),
        (
            lambda: clip(
                (silent := perceptron((6, 4, 3), lambda width: Silu())),
                silent.init(jax.random.key(0)),
                X,
            ),
            "model: has no activation Relu or Clipped to clip",
        ),
        (
            lambda: search_bounds(
                *clip(MODEL, PARAMS, X, per="neuron"), X, LABELS, jax.random.key(0)
            ),
            "activation_0/bound: (16,); the search needs one bound a layer",
        ),
        (
            lambda: train_bounds(
                *clip(MODEL, PARAMS, X),
                MODEL,
                (X, LABELS),
                (X, LABELS),
                jax.random.key(0),
            ),
            "train: 96 rows; need at least the batch_size 128",
        ),
        (lambda: ProAct(warmup=200), "warmup: 200; need 0 to epochs 105"),
        (lambda: ProAct(epochs=0, warmup=0), "epochs: 0; need at least 1"),
        (lambda: ProAct(tolerance=-1), "tolerance: -1; need 0 or more"),
    ],
)
def test_refuses(run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run()
