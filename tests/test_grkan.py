"""GR-KAN: golden vectors, fits, a float64 oracle of the gradients, extremes, in a decoder."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw, here_and_on, next_byte_loss

from bestiary.eval.hlo import jaxpr_flops
from bestiary.layers import GRKAN, MLP, Gelu, GroupRational
from bestiary.layers.base import flatten
from bestiary.layers.grkan import kan_mimetic
from bestiary.layers.rational import COEFFICIENTS, group_rational
from bestiary.zoo.llama import byte_llama

DIM, HIDDEN = 12, 20
FFN = GRKAN(dim=DIM, hidden=HIDDEN, groups=4)


@pytest.mark.golden("kan_grkan_rational")
def test_rational(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    assert hp["group_assignment"] == "contiguous" and hp["sign_at_zero"] == 1.0
    y, pull = jax.vjp(group_rational, *(jnp.asarray(a[name]) for name in "xab"))
    close(y, a["y"])
    for name, grad in zip("xab", pull(a["cotangent"]), strict=True):
        close(grad, a[f"grad_{name}"])


@pytest.mark.golden("kan_grkan_mlp")
def test_feed_forward(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    layer = GRKAN(dim=hp["hidden_size"], hidden=hp["intermediate_size"], groups=hp["num_groups"])

    def ours(prefix: str) -> Any:
        def rational(name: str) -> Any:
            weights = (a[f"{prefix}/{name}.weight_{part}"] for part in ("numerator", "denominator"))
            numerator, denominator = map(jnp.asarray, weights)
            return {"numerator": numerator[0], "denominator": denominator}

        return {
            "first": rational("act1"),
            "up": a[f"{prefix}/fc1.weight"].T,
            "up_bias": a[f"{prefix}/fc1.bias"],
            "activation": rational("act2"),
            "down": a[f"{prefix}/fc2.weight"].T,
            "down_bias": a[f"{prefix}/fc2.bias"],
        }

    params = jax.tree.map(jnp.asarray, ours("w"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, layer.abstract())
    y, pull = jax.vjp(lambda *args: layer.apply(*args)[0], params, jnp.asarray(a["x"]))
    close(y, a["y"])
    grads, dx = pull(jnp.asarray(a["cotangent"]))
    close(dx, a["grad_x"])
    jax.tree.map(close, grads, ours("g"))


@pytest.mark.parametrize(
    "start, error", [("identity", 0), ("swish", 2e-6), ("gelu", 2.5e-3), ("gelu_old", 4.2e-3)]
)
def test_starts_near_the_function_it_is_named_for(start: Any, error: float) -> None:
    x = jnp.linspace(-3, 3, 6 * 101).reshape(-1, 6)
    named = {"identity": lambda x: x, "swish": jax.nn.silu}
    expected = named.get(start, lambda x: jax.nn.gelu(x, approximate=False))(x)
    rational = GroupRational(groups=3, start=start)
    y = rational.apply(rational.init(jax.random.key(0)), x)
    assert np.abs(y - expected).max() <= error


def test_gradients_equal_those_of_the_formula_in_float64() -> None:
    """With rows that fill several blocks; at 0 an absolute value has the slope 1."""
    rng, groups, width = np.random.default_rng(0), 3, 7
    x, dy = rng.normal(size=(2, 4, 8, 3, 7)) * 2
    a, b = rng.normal(size=(groups, 6)), rng.normal(size=(groups, 4))
    x[0, 0], b[1, 2] = 0, 0
    i, j = np.arange(6), np.arange(1, 5)
    size, sign = np.abs(x)[..., None], np.where(x >= 0, 1, -1)
    c, d = a[:, None], np.abs(b)[:, None]
    p, q = (c * x[..., None] ** i).sum(-1), 1 + (d * size**j).sum(-1)
    slope = (c[..., 1:] * j_times(x[..., None], 5)).sum(-1)
    steep = sign * (d * j_times(size, 4)).sum(-1)
    dx = dy * (slope / q - p * steep / q**2)
    da = (dy[..., None] * x[..., None] ** i / q[..., None]).sum((0, 1, 3))
    db = np.where(b >= 0, 1, -1) * (-(dy * p / q**2)[..., None] * size**j).sum((0, 1, 3))

    inputs = [jnp.asarray(v, jnp.float32) for v in (x.reshape(4, 8, -1), a, b)]
    y, pull = jax.jit(lambda *args: jax.vjp(group_rational, *args))(*inputs)
    close(y, (p / q).reshape(4, 8, groups * width))
    grads = pull(jnp.asarray(dy.reshape(4, 8, -1), jnp.float32))
    for grad, expected in zip(grads, (dx.reshape(4, 8, -1), da, db), strict=True):
        close(grad, expected)


def j_times(x: np.ndarray, degree: int) -> np.ndarray:
    """1, 2 x, 3 x^2, ...: derivatives of x, x^2, ..."""
    j = np.arange(1, degree + 1)
    return j * x ** (j - 1)


def test_backward_keeps_less_than_its_input() -> None:
    """What autodiff would keep is a multiple."""
    x = jax.ShapeDtypeStruct((64, 64, 128), jnp.float32)
    layer = GroupRational()

    def backward(params: Any, x: jax.Array) -> Any:
        return jax.vjp(layer.apply, params, x)[1](x)

    memory = jax.jit(backward).lower(layer.abstract(), x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < x.size * 4 / 4


@pytest.mark.parametrize("start", COEFFICIENTS)
def test_gradients_are_finite_at_0_and_far_away(start: Any) -> None:
    far = [0.0, -0.0, 1e-38, -1e-30, 1e4, -1e4, 1e6, -1e6]
    x = jnp.asarray(far, jnp.bfloat16)[:, None] * jnp.ones((1, 8), jnp.bfloat16)
    rational = GroupRational(start=start)
    y, pull = jax.vjp(rational.apply, rational.init(jax.random.key(0)), x)
    assert y.dtype == jnp.bfloat16
    for value in jax.tree.leaves((y, pull(jnp.ones_like(y)))):
        assert np.isfinite(np.asarray(value, np.float32)).all()


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    """Groups of 5 units do not end where the shards do."""
    params = draw(FFN)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, DIM)), jnp.float32)
    expected, actual = here_and_on(mesh, FFN, lambda *args: FFN.apply(*args)[0], params, x)
    jax.tree.map(close, actual, expected)


def test_a_decoder_trains_with_it() -> None:
    model = byte_llama(1, 64, GRKAN(dim=64, hidden=96))
    params, loss = model.init(jax.random.key(0)), next_byte_loss(model)
    before, grads = loss(params)
    for path, g in flatten(grads):
        assert np.any(g) or "first/denominator" not in path, path
    assert loss(jax.tree.map(lambda p, g: p - 0.05 * g, params, grads))[0] < before


def test_counts_and_costs() -> None:
    mlp = MLP(dim=DIM, hidden=HIDDEN, activation=Gelu(), bias=True)
    assert FFN.count().total == mlp.count().total + 2 * (6 + 4 * 4)
    assert FFN.cost(5) == mlp.cost(5) + FFN.first.cost(5) * 2
    x = jnp.zeros((2, 3, DIM))
    traced = jax.make_jaxpr(lambda p: FFN.apply(p, x)[0])(FFN.abstract())
    assert FFN.cost(5).flops * 6 == jaxpr_flops(traced)


def test_weights_start_as_the_paper_says_or_as_the_checkpoints_did() -> None:
    z = jax.random.normal(jax.random.key(1), (1, 64, 256))
    for start in ("identity", "swish", "gelu"):
        layer = GRKAN(dim=256, hidden=1024, start=start)
        y, _ = layer.apply(layer.init(jax.random.key(0)), z)
        assert float(y.var()) == pytest.approx(1, rel=0.1), start
    params = GRKAN(dim=256, hidden=1024, init_as="released").init(jax.random.key(0))
    assert params["up"].std() == pytest.approx(0.02, rel=0.01)
    assert params["down"].std() == pytest.approx(0.02, rel=0.01)


def test_mimetic_attention() -> None:
    """The products are near multiples of the identity, which SVD factors of one root each."""
    dim, heads, head_dim = 32, 4, 8
    shapes = dict.fromkeys(("query", "key", "value"), (dim, heads, head_dim))
    old = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    old |= {"out": jnp.zeros((heads, head_dim, dim)), "query_bias": jnp.ones(dim)}
    new = kan_mimetic(jax.random.key(0), old)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, old)
    assert new["query_bias"] is old["query_bias"]
    value, out = (new[name].reshape(dim, dim) for name in ("value", "out"))
    z = (value @ out + 0.4 * np.eye(dim)) / 0.4
    assert np.abs(z).max() <= np.sqrt(3 / dim) * 1.001
    assert np.var(z) == pytest.approx(1 / dim, rel=0.1)
    close(value.T @ value, np.diag(np.diag(out @ out.T)), rtol=1e-4)
    for h in range(heads):
        q, k = new["query"][:, h], new["key"][:, h]
        close(q.T @ q, np.diag(np.diag(k.T @ k)), rtol=1e-4)
        assert float(jnp.trace(q @ k.T)) > 0
    with pytest.raises(ValueError, match="need as many of keys"):
        kan_mimetic(jax.random.key(0), old | {"key": jnp.zeros((dim, 2, head_dim))})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: GroupRational(groups=0), "groups: 0; need at least 1"),
        (lambda: GroupRational(start="relu"), "start: 'relu'; need one of identity, swish, gelu"),
        (lambda: GRKAN(dim=10, hidden=16), "dim: 10; need a multiple of the groups 8"),
        (lambda: GRKAN(dim=16, hidden=20), "hidden: 20; need a multiple of the groups 8"),
        (lambda: GRKAN(dim=8, hidden=8, init_as="x"), "init_as: 'x'; need one of paper, released"),
        (
            lambda: group_rational(jnp.ones((2, 9)), jnp.ones((8, 6)), jnp.ones((8, 4))),
            "groups: 8; need a divisor of the features 9",
        ),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
