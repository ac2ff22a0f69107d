"""QKAN: golden vectors, a complex oracle, extension, memory, extremes, in a decoder."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw, here_and_on, next_byte_loss

from bestiary.eval.hlo import jaxpr_flops
from bestiary.layers import HQKAN, QKAN, Silu
from bestiary.layers.base import flatten
from bestiary.layers.qkan import extend
from bestiary.zoo.llama import byte_llama

DIM = 12
ANSATZE: tuple[Any, ...] = ("pz", "rpz", "mix", "px", "real")
FFN = HQKAN(dim=DIM, qkan=QKAN(inputs=4, outputs=6, repetitions=2))
X = np.random.default_rng(0).normal(size=(4, 6, DIM)).astype(np.float32)

NAMES = {
    "preacts_weight": "weight",
    "preacts_bias": "bias",
    "base_weight": "base",
    "postact_weights": "out_weight",
    "postact_bias": "out_bias",
}


def ours(layer: QKAN, a: dict[str, Any], prefix: str) -> Any:
    """The tensors of a released layer as our parameters, for what the layer has of them."""
    params: Any = {} if layer.base is None else {"activation": {}}
    for name in ("theta", *NAMES):
        value, mine = jnp.asarray(a[prefix + name]), NAMES.get(name, name)
        if mine not in layer.spec():
            continue
        if name in ("base_weight", "postact_weights", "postact_bias"):
            value = value.T
        elif layer.group is not None:  # (group, steps[, thetas])
            value = jnp.moveaxis(value, 0, -1)
        else:  # (outputs, inputs, steps[, thetas])
            value = jnp.moveaxis(value, (0, 1), (-1, -2))
        params[mine] = value
    return params


@pytest.mark.golden("qkan_layer")
def test_layer(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    for variant in hp["variants"]:
        tag, group = variant["tag"], variant["group"]
        layer = QKAN(
            inputs=hp["in_features"],
            outputs=hp["out_features"],
            repetitions=hp["reps"],
            ansatz=variant["ansatz"],
            fast_measure=variant["fast_measure"],
            preact_trainable=variant["preact_trainable"],
            group=None if group == -1 else group,
            base={"silu": Silu()}[hp["base_activation"]],
        )
        x, params = jnp.asarray(a["x"] * variant["input_scale"]), ours(layer, a, f"{tag}/w/")
        shapes = jax.tree.map(lambda s: s.shape, layer.abstract())
        assert jax.tree.map(jnp.shape, params) == shapes
        phi = layer.measured(params, x).swapaxes(-1, -2)
        close(jnp.broadcast_to(phi, a[f"{tag}/act"].shape), a[f"{tag}/act"])
        close(layer.edges(params, x).sum(-1), a[f"{tag}/y"])
        y, pull = jax.vjp(layer.apply, params, x)
        close(y, a[f"{tag}/y"])
        if variant["has_gradients"]:
            grads, dx = pull(jnp.asarray(a["cotangent"]))
            close(dx, a[f"{tag}/grad_x"], rtol=1e-4)
            expected = ours(layer, a, f"{tag}/g/")
            jax.tree.map(lambda g, e: close(g, e, rtol=1e-4), grads, expected)


@pytest.mark.golden("qkan_hqkan_ffn")
def test_hqkan(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    inner = hp["inner_size"]
    qkan = QKAN(
        inputs=inner,
        outputs=inner,
        repetitions=hp["reps"],
        ansatz=hp["ansatz"],
        fast_measure=hp["fast_measure"],
        preact_trainable=hp["preact_trainable"],
        group=hp["group"],
        base={"silu": Silu()}[hp["base_activation"]],
    )
    layer = HQKAN(dim=hp["hidden_size"], qkan=qkan)

    def tree(prefix: str) -> Any:
        def linear(i: int) -> Any:
            return {"weight": a[f"{prefix}/{i}.weight"].T, "bias": a[f"{prefix}/{i}.bias"]}

        qubits = ours(qkan, a, f"{prefix}/1.layers.0.")
        return {"up": linear(0), "qkan": qubits, "down": linear(2)}

    params = jax.tree.map(jnp.asarray, tree("w"))
    y, pull = jax.vjp(lambda *args: layer.apply(*args)[0], params, jnp.asarray(a["x"]))
    close(y, a["y"])
    grads, dx = pull(jnp.asarray(a["cotangent"]))
    close(dx, a["grad_x"], rtol=1e-4)
    jax.tree.map(lambda g, e: close(g, e, rtol=1e-4), grads, tree("g"))

    longer, extended = extend(qkan, params["qkan"], hp["extended_reps"])
    expected = {
        "theta": np.moveaxis(a["ext_theta"], 0, -1),
        "weight": a["ext_preacts_weight"].T,
        "bias": a["ext_preacts_bias"].T,
    }
    for name, value in expected.items():
        close(extended[name], value)
    x = jnp.asarray(a["ext_x"])
    close(qkan.apply(params["qkan"], x), a["ext_y_before"])
    close(longer.apply(extended, x), a["ext_y_after"])


# --- an oracle: matrices of complex numbers, in float64 -------------------------------------------


def gate(name: str, t: float) -> np.ndarray:
    c, s = np.cos(t / 2), np.sin(t / 2)
    matrices = {
        "x": [[c, -1j * s], [-1j * s, c]],
        "y": [[c, -s], [s, c]],
        "z": [[np.exp(-0.5j * t), 0], [0, np.exp(0.5j * t)]],
        "swap": [[0, 1], [1, 0]],
        "negate": [[1, 0], [0, -1]],
    }
    return np.array(matrices[name], complex)


def measure(layer: QKAN, theta: Any, e: Any) -> float:
    """Of one edge: theta [repetitions + 1, thetas], e [repetitions]."""
    state = np.array([1, 1], complex) / np.sqrt(2)
    for l, angle in enumerate(e):  # noqa: E741
        t = theta[l]
        gates = {
            "pz": lambda t=t, e=angle: [("z", t[0]), ("y", t[1]), ("z", e)],
            "rpz": lambda t=t, e=angle: [("y", t[0]), ("z", e)],
            "mix": lambda t=t, e=angle: [("z", t[0]), ("x", t[1]), ("y", e)],
            "px": lambda t=t, e=angle: [("z", t[0]), ("x", np.arccos(e))],
            "real": lambda t=t, e=angle: [("swap", 0), ("y", t[0]), ("negate", 0), ("y", e)],
        }
        for name, value in gates[layer.ansatz]():
            state = gate(name, value) @ state
    ends = {"pz": "zy", "rpz": "y", "mix": "zx", "px": "z", "real": ""}
    for k, name in enumerate(ends[layer.ansatz]):
        state = gate(name, theta[-1][k]) @ state
    alpha, beta = np.abs(state)
    return alpha - beta if layer.fast_measure else alpha**2 - beta**2


@pytest.mark.parametrize("ansatz", ANSATZE)
@pytest.mark.parametrize("fast", [True, False])
def test_equals_the_complex_state_and_its_finite_differences(ansatz: Any, fast: bool) -> None:
    layer = QKAN(inputs=1, outputs=1, repetitions=3, ansatz=ansatz, fast_measure=fast)
    rng = np.random.default_rng(1)
    params, x = draw(layer), rng.uniform(-0.9, 0.9, (5, 1)) * (0.4 if ansatz == "px" else 1)
    params["weight"], params["bias"] = params["weight"] * 0.7, params["bias"] * 0.1
    theta, w, b = (np.float64(params[n]).squeeze((-1, -2)) for n in ("theta", "weight", "bias"))

    def oracle(theta: Any, w: Any, b: Any, x: Any) -> np.ndarray:
        return np.array([measure(layer, theta, w * v + b) for v in x[:, 0]])

    def phi(theta: Any, w: Any, b: Any, x: Any) -> jax.Array:
        mine = {name: v[..., None, None] for name, v in zip(NAMED, (theta, w, b), strict=True)}
        return layer.measured(params | mine, x)[:, 0, 0]

    arguments = [jnp.asarray(v, jnp.float32) for v in (theta, w, b, x)]
    y, pull = jax.jit(lambda *args: jax.vjp(phi, *args))(*arguments)
    close(y, oracle(theta, w, b, x))
    ct = rng.normal(size=5)
    exact, step = [theta, w, b, x], 1e-6
    for i, grad in enumerate(pull(jnp.asarray(ct, jnp.float32))):
        expected = np.zeros(exact[i].shape)
        for at in np.ndindex(*expected.shape):
            ends = []
            for sign in (1, -1):
                moved = [v.copy() for v in exact]
                moved[i][at] += sign * step
                ends.append(ct @ oracle(*moved))
            expected[at] = (ends[0] - ends[1]) / (2 * step)
        close(grad, expected, rtol=2e-4)


NAMED = ("theta", "weight", "bias")


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ansatz", ["pz", "rpz"])
@pytest.mark.parametrize("options", [{}, dict(group=2), dict(preact_trainable=False)])
def test_extension_keeps_the_function(ansatz: Any, options: Any) -> None:
    layer = QKAN(inputs=DIM, outputs=5, repetitions=2, ansatz=ansatz, **options)
    params = draw(layer)
    longer, extended = extend(layer, params, 5)
    assert jax.tree.map(jnp.shape, extended) == jax.tree.map(lambda s: s.shape, longer.abstract())
    close(longer.apply(extended, X), layer.apply(params, X))
    grads = jax.grad(lambda p: (longer.apply(p, X) ** 2).sum())(extended)
    assert np.any(grads["theta"][3:])  # what is new learns


@pytest.mark.parametrize("ansatz", ["px", "mix", "real"])
def test_extension_refuses_what_would_change(ansatz: Any) -> None:
    layer = QKAN(inputs=2, outputs=3, ansatz=ansatz)
    with pytest.raises(ValueError, match=f"ansatz: '{ansatz}'; only pz and rpz keep"):
        extend(layer, draw(layer), 5)
    layer = QKAN(inputs=2, outputs=3)
    with pytest.raises(ValueError, match="repetitions: 2; need at least 3"):
        extend(layer, draw(layer), 2)


def test_memory_does_not_grow_with_repetitions() -> None:
    """Beside the parameters and their gradients, which do."""
    x, kept = jax.ShapeDtypeStruct((256, 8), jnp.float32), []
    for repetitions in (2, 16):
        layer = QKAN(inputs=8, outputs=8, repetitions=repetitions)

        def backward(params: Any, x: jax.Array, layer: QKAN = layer) -> Any:
            return jax.vjp(layer.apply, params, x)[1](jnp.ones((256, 8)))

        memory = jax.jit(backward).lower(layer.abstract(), x).compile().memory_analysis()
        kept.append(memory.temp_size_in_bytes - 8 * layer.count().total)
    assert kept[1] < 1.2 * kept[0]


@pytest.mark.parametrize("ansatz", ANSATZE)
def test_gradients_are_finite_at_0_and_far_away(ansatz: Any) -> None:
    """Also with the state at a pole, where the fast measure is steepest."""
    layer = QKAN(inputs=8, outputs=2, ansatz=ansatz)
    far = jnp.asarray([[0.0, -0.0, 1.0, -1.0, 1e-30, 1e4, -1e4, 1e30]], jnp.bfloat16)
    pole = jax.tree.map(lambda p: jnp.full_like(p, np.pi / 2), layer.init(jax.random.key(0)))

    @jax.jit
    def run(params: Any) -> Any:
        y, pull = jax.vjp(layer.apply, params, far)
        return y, pull(jnp.ones_like(y))

    for params in (layer.init(jax.random.key(0)), pole):
        results = run(params)
        assert results[0].dtype == jnp.bfloat16
        for value in jax.tree.leaves(results):
            assert np.isfinite(np.asarray(value, np.float32)).all()


def test_starts() -> None:
    """Angles shrink with the width, or with the root of the repetitions."""
    layer = QKAN(inputs=40, outputs=60, repetitions=4)
    theta = layer.init(jax.random.key(0))["theta"]
    assert theta.std() == pytest.approx(np.sqrt(2 / (100 * 5 * 2)), rel=0.02)
    layer = QKAN(inputs=40, outputs=60, repetitions=4, theta_init="small_gaussian")
    assert layer.init(jax.random.key(0))["theta"].std() == pytest.approx(0.5, rel=0.02)
    layer = QKAN(inputs=400, outputs=3, repetitions=9, group=400)
    theta = layer.init(jax.random.key(0))["theta"]
    assert theta.std() == pytest.approx(np.sqrt(2 / (410 * 2)), rel=0.03)


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    layer = QKAN(inputs=DIM, outputs=10)
    params, x = draw(layer), jnp.asarray(X)
    expected, actual = here_and_on(mesh, layer, layer.apply, params, x)
    jax.tree.map(close, actual, expected)


def test_a_decoder_trains_with_it() -> None:
    ffn = HQKAN(dim=64, qkan=QKAN(inputs=6, outputs=6, repetitions=1, group=3))
    model = byte_llama(1, 64, ffn)
    params, loss = model.init(jax.random.key(0)), next_byte_loss(model)
    before, grads = loss(params)
    for path, g in flatten(grads):
        assert np.any(g), path
    assert loss(jax.tree.map(lambda p, g: p - 0.05 * g, params, grads))[0] < before


@pytest.mark.parametrize("group", [None, 3])
def test_counts_and_costs(group: int | None) -> None:
    layer = QKAN(inputs=DIM, outputs=5, repetitions=2, group=group)
    circuits = group or DIM * 5
    assert layer.count().total == 3 * DIM * 5 + circuits * (3 * 2 + 2 * 2)
    traced = jax.make_jaxpr(layer.apply)(layer.abstract(), jnp.asarray(X))
    assert layer.cost(5).flops * 24 == jaxpr_flops(traced)
    assert FFN.cost(5) == FFN.up.cost(5) + FFN.qkan.cost(5) + FFN.down.cost(5)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: QKAN(inputs=0, outputs=1), "inputs: 0; need at least 1"),
        (lambda: QKAN(inputs=1, outputs=1, group=0), "group: 0; need at least 1"),
        (lambda: QKAN(inputs=1, outputs=1, ansatz="py"), "ansatz: 'py'; need one of pz, rpz, mix"),
        (
            lambda: QKAN(inputs=1, outputs=1, theta_init="zero"),
            "theta_init: 'zero'; need one of xavier, small_gaussian",
        ),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
