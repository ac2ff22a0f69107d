"""Mamba and Mamba-2: parity with the published code, documents, padding, decoding, sharding."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.selective_scan import selective_scan
from bestiary.kernels.ssd import reference, ssd
from bestiary.layers import DEFAULT_RULES, CausalConv, Context, Layer, Mamba, Mamba2, use_rules
from bestiary.layers.activations import Gelu, GeluTanh, Relu, Silu
from bestiary.layers.base import map_params

RTOL = 1e-5
ACTIVATIONS = {"silu": Silu(), "gelu": Gelu(), "gelu_pytorch_tanh": GeluTanh(), "relu": Relu()}


def close(actual: Any, expected: Any, name: str = "", rtol: float = RTOL) -> None:
    """Equal to `rtol` of the largest entry."""
    expected = np.asarray(expected)
    atol = rtol * float(np.abs(expected).max(initial=1e-30))
    np.testing.assert_allclose(
        np.asarray(actual).reshape(expected.shape), expected, rtol=rtol, atol=atol, err_msg=name
    )


# --- golden vectors -------------------------------------------------------------------------------


def pull(f: Callable, primals: dict, cotangents: Any) -> tuple[Any, dict]:
    """f(**primals) and the gradients by name."""

    @jax.jit
    def run(primals: dict, cotangents: Any) -> tuple:
        y, back = jax.vjp(lambda p: f(**p), primals)
        return y, back(cotangents)[0]

    return run(primals, cotangents)


@pytest.mark.parametrize("method", ["sequential", "associative"])
@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.golden("mamba1_scan")
def test_mamba1_scan(golden: SimpleNamespace, method: Any, chunk: int) -> None:
    a, hp = golden.arrays, golden.hp

    def scan(
        u: Any,
        delta: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any = None,
        delta_bias: Any = 0.0,
        z: Any = None,
        softplus: bool = False,
    ) -> Any:
        delta = delta.swapaxes(1, 2) + delta_bias
        delta = jax.nn.softplus(delta) if softplus else delta
        B, C = (v.reshape(v.shape[0], -1, *v.shape[-2:]).transpose(0, 3, 1, 2) for v in (B, C))
        x = u.swapaxes(1, 2)
        y, state = selective_scan(x, delta, A, B, C, D=D, chunk=chunk, method=method)
        y = y.swapaxes(1, 2)
        return (y if z is None else y * jax.nn.silu(z)), state

    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    arrays = {name: jnp.asarray(a[name]) for name in names}

    def full(**arrays: Any) -> Any:
        return scan(**arrays, softplus=hp["delta_softplus"])

    (y, state), grads = pull(full, arrays, (jnp.asarray(a["ct"]), jnp.zeros(a["last_state"].shape)))
    close(y, a["y"], "y")
    close(state, a["last_state"], "last_state")
    for name in names:
        close(grads[name], a[f"g_{name}"], f"g_{name}")
    plain = scan(*(arrays[name] for name in names[:5]), softplus=hp["plain_delta_softplus"])[0]
    close(plain, a["y_plain_nosoftplus_noD_noz"], "plain")


@pytest.mark.golden("mamba2_ssd")
def test_mamba2_ssd(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    low, high = hp["time_step_limit"]

    def run(
        chunk: int,
        D: Any = None,
        init_state: Any = None,
        *,
        x: Any,
        dt_raw: Any,
        dt_bias: Any,
        A: Any,
        B: Any,
        C: Any,
    ) -> Any:
        dt = dt_raw + dt_bias
        dt = jax.nn.softplus(dt) if hp["dt_softplus"] else dt
        dt = jnp.clip(dt, low, math.inf if high is None else high)
        return ssd(x, dt, A, B, C, D=D, initial_state=init_state, chunk=chunk)

    names = ("x", "dt_raw", "dt_bias", "A", "B", "C", "D", "init_state")
    arrays = {name: jnp.asarray(a[name]) for name in names}
    cotangents = jnp.asarray(a["ct_y"]), jnp.asarray(a["ct_state"])
    for chunk in (hp["chunk_size"], 5, 64):

        def full(chunk: int = chunk, **arrays: Any) -> Any:
            return run(chunk, **arrays)

        (y, state), grads = pull(full, arrays, cotangents)
        close(y, a["y"], "y")
        close(state, a["final_state"], "final_state")
        for name in names:
            close(grads[name], a[f"g_{name}"], f"g_{name}, chunk {chunk}")
    bare = {name: arrays[name] for name in names[:6]}
    y, state = run(hp["chunk_size"], **bare)
    close(y, a["y_zero_init"], "y_zero_init")
    close(state, a["final_state_zero_init"], "final_state_zero_init")


def split(weight: np.ndarray, *sizes: int) -> list[np.ndarray]:
    return np.split(weight, np.cumsum(sizes)[:-1])


def block_golden(
    layer: Layer, arrays: dict, to_params: Callable, state_of: Callable[[Any], dict]
) -> None:
    """Values, all gradients and the cached states of a block."""
    weights = {k[2:]: v for k, v in arrays.items() if k.startswith("w_")}
    y, grads = pull(
        lambda params, x: layer.apply(params, x)[0],
        {"params": to_params(weights), "x": jnp.asarray(arrays["x"])},
        jnp.asarray(arrays["ct"]),
    )
    close(y, arrays["y"], "y")
    close(grads["x"], arrays["g_x"], "g_x")
    expected = to_params({k: arrays[f"g_{k}"] for k in weights})
    jax.tree_util.tree_map_with_path(
        lambda path, g, e: close(g, e, jax.tree_util.keystr(path)), grads["params"], expected
    )
    x = jnp.asarray(arrays["x"])
    cache = layer.init_cache(*x.shape[:2])
    y, cache, _ = jax.jit(layer.apply)(to_params(weights), x, Context(), cache)
    close(y, arrays["y"], "y with a cache")
    for name, state in state_of(cache["state"]).items():
        close(state, arrays[name][..., 1:] if name == "conv_state" else arrays[name], name)


@pytest.mark.golden("mamba1_block")
def test_mamba1_block(golden: SimpleNamespace) -> None:
    hp = golden.hp
    inner, width, rank = hp["intermediate_size"], hp["state_size"], hp["time_step_rank"]
    layer = Mamba(
        dim=hp["hidden_size"],
        inner=inner,
        state=width,
        dt_rank=rank,
        kernel=hp["conv_kernel"],
        bias=hp["use_bias"],
        conv_bias=hp["use_conv_bias"],
        activation=ACTIVATIONS[hp["activation"]],
        chunk=4,
    )

    def to_params(w: dict) -> dict:
        x, z = split(w["in_proj_weight"], inner, inner)
        dt, B, C = split(w["x_proj_weight"], rank, width, width)
        params = {"x": x.T, "z": z.T, "dt_down": dt.T, "B": B.T, "C": C.T}
        params |= {"dt": w["dt_proj_weight"].T, "dt_bias": w["dt_proj_bias"]}
        params |= {"A_log": w["A_log"], "D": w["D"], "out": w["out_proj_weight"].T}
        params["conv"] = {"weight": w["conv1d_weight"][:, 0].T}
        if hp["use_conv_bias"]:
            params["conv"]["bias"] = w["conv1d_bias"]
        if hp["use_bias"]:
            params["x_bias"], params["z_bias"] = split(w["in_proj_bias"], inner, inner)
            params["out_bias"] = w["out_proj_bias"]
        return jax.tree.map(jnp.asarray, params)

    def state_of(state: Any) -> dict:
        return {"conv_state": state["conv"].swapaxes(1, 2), "ssm_state": state["ssm"]}

    block_golden(layer, golden.arrays, to_params, state_of)


@pytest.mark.golden("mamba2_block")
def test_mamba2_block(golden: SimpleNamespace) -> None:
    hp = golden.hp
    low, high = hp["time_step_limit"]
    layer = Mamba2(
        dim=hp["hidden_size"],
        num_heads=hp["num_heads"],
        head_dim=hp["head_dim"],
        state=hp["state_size"],
        groups=hp["n_groups"],
        kernel=hp["conv_kernel"],
        bias=hp["use_bias"],
        conv_bias=hp["use_conv_bias"],
        activation=ACTIVATIONS[hp["activation"]],
        dt_limit=(low, math.inf if high is None else high),
        norm_eps=hp["norm_eps"],
        norm_before_gate=hp["norm_before_gate"],
        chunk=hp["chunk_size"],
    )
    inner, group = layer.inner, layer.groups * layer.state
    mlp = hp["intermediate_size"] - inner
    assert mlp == 0, "the program behind the vectors has none"

    def to_params(w: dict) -> dict:
        sizes = inner, inner, group, group, layer.num_heads
        names = "z", "x", "B", "C", "dt"
        params: dict = {
            f"in_{n}": v.T for n, v in zip(names, split(w["in_proj_weight"], *sizes), strict=True)
        }
        conv = split(w["conv1d_weight"][:, 0], *sizes[1:4])
        params |= {f"conv_{n}": {"weight": v.T} for n, v in zip(names[1:4], conv, strict=True)}
        if hp["use_conv_bias"]:
            for name, v in zip(names[1:4], split(w["conv1d_bias"], *sizes[1:4]), strict=True):
                params[f"conv_{name}"]["bias"] = v
        if hp["use_bias"]:
            biases = split(w["in_proj_bias"], *sizes)
            params |= {f"in_{n}_bias": v for n, v in zip(names, biases, strict=True)}
            params["out_bias"] = w["out_proj_bias"]
        params |= {"dt_bias": w["dt_bias"], "A_log": w["A_log"], "D": w["D"]}
        params |= {"norm": w["norm_weight"], "out": w["out_proj_weight"].T}
        return jax.tree.map(jnp.asarray, params)

    def state_of(state: Any) -> dict:
        conv = jnp.concatenate([state[name] for name in ("x", "B", "C")], -1)
        return {"conv_state": conv.swapaxes(1, 2), "ssm_state": state["ssm"]}

    block_golden(layer, golden.arrays, to_params, state_of)


# --- the operations -------------------------------------------------------------------------------

DOCUMENTS = jnp.asarray([[0] * 5 + [1] * 9 + [2] * 3, [1] * 2 + [2] * 15])


def operands() -> tuple:
    """x, dt, A, B, C and a state: 2 sequences of 17, 6 heads of 3 in 2 groups, 5 states."""
    rng = np.random.default_rng(0)
    shapes = (2, 17, 6, 3), (2, 17, 6), (6,), (2, 17, 2, 5), (2, 17, 2, 5), (2, 6, 3, 5)
    x, dt, A, B, C, state = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return x, jax.nn.softplus(dt), -jnp.exp(A), B, C, state


def by_steps(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any, documents: Any) -> tuple:
    """The recurrence in float64, written as in the paper, heads of p channels."""
    x, dt, A, B, C, h = (np.asarray(v, np.float64) for v in (x, dt, A, B, C, state))
    B, C = (np.repeat(v, x.shape[2] // v.shape[2], 2) for v in (B, C))
    y, before = np.zeros(x.shape), np.zeros(len(x))
    for t in range(x.shape[1]):
        h = h * (documents[:, t] == before)[:, None, None, None]
        before = documents[:, t]
        h = np.exp(dt[:, t] * A)[..., None, None] * h
        h = h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y[:, t] = np.einsum("bhpn,bhn->bhp", h, C[:, t])
    return y, h


@pytest.mark.parametrize("chunk", [4, 17])
def test_ssd_equals_the_recurrence_and_its_own_derivative(chunk: int) -> None:
    """Values in float64; the gradient of its own equals that of the program by JAX."""
    args = operands()
    documents = np.asarray(DOCUMENTS)
    y, state = ssd(*args[:5], initial_state=args[5], documents=DOCUMENTS, chunk=chunk)
    expected = by_steps(*args, documents)
    close(y, expected[0], "y", 3e-6)
    close(state, expected[1], "state", 3e-6)
    ct = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32), state

    def own(*args: Any) -> Any:
        return ssd(*args[:5], initial_state=args[5], documents=DOCUMENTS, chunk=chunk)

    def plain(*args: Any) -> Any:
        pad = -17 % chunk
        rows = [
            jnp.pad(v, [(0, 0), (0, pad)] + [(0, 0)] * (v.ndim - 2))
            for v in (args[0], args[1], args[3], args[4])
        ]
        x, dt, B, C = rows
        ids = jnp.pad(DOCUMENTS, ((0, 0), (0, pad)), mode="edge")
        y, state = reference.ssd(x, dt, args[2], B, C, args[5], ids, chunk=chunk)
        return y[:, :17], state

    ours = jax.jit(lambda *a: jax.vjp(own, *a)[1](ct))(*args)
    theirs = jax.jit(lambda *a: jax.vjp(plain, *a)[1](ct))(*args)
    for a, b, name in zip(ours, theirs, ("x", "dt", "A", "B", "C", "state"), strict=True):
        close(a, b, name)


@pytest.mark.parametrize("method", ["sequential", "associative"])
def test_selective_scan_equals_the_recurrence(method: Any) -> None:
    x, dt, A, B, C, state = operands()
    flat = [v.reshape(2, 17, 18) for v in (x, jnp.repeat(dt[..., None], 3, 3))]
    decay = jnp.broadcast_to(jnp.repeat(A, 3)[:, None], (18, 5))
    y, last = selective_scan(
        *flat,
        decay,
        B,
        C,
        initial_state=state.reshape(2, 18, 5),
        documents=DOCUMENTS,
        chunk=4,
        method=method,
    )
    expected = by_steps(x, dt, A, B, C, state, np.asarray(DOCUMENTS))
    close(y, expected[0].reshape(2, 17, 18), "y", 3e-6)
    close(last, expected[1].reshape(2, 18, 5), "state", 3e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk": 0}, "chunk: 0; need at least 1"),
        ({"impl": "fast"}, "impl must be one of"),
        ({"initial_state": jnp.zeros(3)}, r"initial_state: shape \(3,\); need \(2, 6, 3, 5\)"),
    ],
)
def test_wrong_arguments_of_ssd_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(*operands()[:5], **change)
    x, dt, A, B, C, _ = operands()
    with pytest.raises(ValueError, match="groups: 4 does not divide heads 6"):
        ssd(x, dt, A, jnp.zeros((2, 17, 4, 5)), jnp.zeros((2, 17, 4, 5)))
    with pytest.raises(NotImplementedError, match="there is no kernel yet"):
        ssd(x, dt, A, B, C, impl="tpu")


# --- the mixers -----------------------------------------------------------------------------------

MIXERS: dict[str, Layer] = {
    "mamba": Mamba(dim=12, inner=20, state=6, dt_rank=2, chunk=4),
    "mamba2": Mamba2(dim=12, num_heads=4, head_dim=6, state=8, groups=2, mlp=10, chunk=4),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)
BATCH, LENGTH = 2, 17


def setting(name: str) -> tuple[Layer, Any, jax.Array]:
    layer, rng = MIXERS[name], np.random.default_rng(0)
    params = map_params(
        lambda p: jnp.asarray(rng.normal(0.2, 0.4, p.shape), p.dtype), layer.declare()
    )
    return layer, params, jnp.asarray(rng.normal(size=(BATCH, LENGTH, 12)), jnp.float32)


@every_mixer
def test_documents_do_not_touch_each_other(name: str) -> None:
    """A document is the same bit for bit whatever stands around it, and equals a row of its own."""
    layer, params, x = setting(name)
    segments = jnp.asarray([[1] * 6 + [2] * 7 + [3] * 4] * 2)
    apply = jax.jit(lambda x, ids: layer.apply(params, x, Context(segment_ids=ids))[0])
    y = apply(x, segments)
    other = apply(x.at[:, :6].add(1.0).at[:, 13:].multiply(-3.0), segments)
    np.testing.assert_array_equal(y[:, 6:13], other[:, 6:13])
    later = apply(x.at[:, 9:].add(1.0), segments)
    np.testing.assert_array_equal(y[:, :9], later[:, :9])
    alone = jax.jit(lambda x: layer.apply(params, x)[0])(x[:, 6:13])
    close(y[:, 6:13], alone)


@every_mixer
def test_pieces_equal_the_whole(name: str) -> None:
    """Chunks of a prompt with padding among their tokens, then token after token, with documents
    that end inside and between the calls."""
    layer, params, x = setting(name)
    ids = jnp.asarray([[1] * 6 + [2] * 7 + [3] * 4, [4] * 11 + [5] * 6])
    whole = layer.apply(params, x, Context(segment_ids=ids))[0]
    apply = jax.jit(layer.apply)
    cache, done, rng = layer.init_cache(BATCH, LENGTH), 0, np.random.default_rng(1)
    shapes = jax.tree.map(jnp.shape, layer.init_cache(BATCH, 10 * LENGTH))
    assert shapes == jax.tree.map(jnp.shape, cache), "constant in length"
    for size in (5, 6, 2, 1, 1, 1, 1):
        padding = 0 if size == 1 else 3
        # every row has its padding elsewhere
        places = [np.sort(rng.permutation(size + padding)[:size]) for _ in range(BATCH)]
        rows = jnp.arange(BATCH)[:, None], jnp.asarray(places)
        here = slice(done, done + size)
        tokens = jnp.full((BATCH, size + padding, 12), 7.0).at[rows].set(x[:, here])
        positions = jnp.full((BATCH, size + padding), -1).at[rows].set(jnp.arange(LENGTH)[here])
        segments = jnp.full((BATCH, size + padding), 9).at[rows].set(ids[:, here])
        ctx = Context(positions=positions, segment_ids=segments)
        y, cache, _ = apply(params, tokens, ctx, cache)
        close(y[rows], whole[:, here], f"tokens {here}")
        done += size
    assert done == LENGTH


def test_gradients_of_taps_are_sums_over_rows_and_tokens_at_once() -> None:
    """Of one row too: over its tokens alone, CPUs sum many times as slowly."""
    conv, x = CausalConv(dim=5, bias=False), jnp.ones((1, 9, 5))
    params = conv.init(jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda p: jax.vjp(lambda p: conv.apply(p, x)[0], p)[1](x))(params)
    sums = [e.params["axes"] for e in jaxpr.eqns if e.primitive.name == "reduce_sum"]
    assert sums == [(0, 1)] * conv.kernel


@every_mixer
def test_a_call_of_padding_changes_nothing(name: str) -> None:
    layer, params, x = setting(name)
    apply = jax.jit(layer.apply)
    _, cache, _ = apply(params, x, Context(), layer.init_cache(BATCH, LENGTH))
    padding = Context(positions=jnp.full((BATCH, LENGTH), -1))
    _, after, _ = apply(params, x + 1, padding, cache)
    jax.tree.map(np.testing.assert_array_equal, after, cache)


@every_mixer
def test_sharded_over_heads_equals_unsharded(name: str, mesh: jax.sharding.Mesh) -> None:
    layer, params, x = setting(name)

    def run(params: Any, x: jax.Array) -> Any:
        ctx = Context(segment_ids=jnp.asarray([[1] * 6 + [2] * 11] * 4))
        y, back = jax.vjp(lambda p, x: layer.apply(p, x, ctx)[0], params, x)
        return y, back(cotangent)

    x = jnp.concatenate((x, x + 1))
    cotangent = x[:, ::-1]
    expected = jax.jit(run)(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        shardings = jax.tree.map(lambda s: s.sharding, layer.abstract(mesh))
        actual = jax.jit(run)(jax.device_put(params, shardings), x)
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-5), actual, expected)


@every_mixer
def test_bfloat16_gradients_are_finite(name: str) -> None:
    layer, params, x = setting(name)
    params, x = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (params, x))

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        return jax.value_and_grad(lambda p: jnp.square(layer.apply(p, x)[0]).mean())(params)

    loss, grads = run(params, 30 * x)
    assert loss.dtype == jnp.bfloat16
    assert all(np.isfinite(np.asarray(v, np.float32)).all() for v in jax.tree.leaves((loss, grads)))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: dataclasses.replace(MIXERS["mamba2"], groups=3), "groups: 3 does not divide"),
        (lambda: dataclasses.replace(MIXERS["mamba2"], mlp=-1), "mlp: -1; need 0 or more"),
        (lambda: dataclasses.replace(MIXERS["mamba2"], dt_limit=(1, 0.5)), "dt_limit: "),
        (lambda: dataclasses.replace(MIXERS["mamba"], kernel=0), "kernel: 0; need at least 1"),
        (lambda: dataclasses.replace(MIXERS["mamba"], method="fast"), "method: 'fast'; need one"),
    ],
)
def test_impossible_options_are_refused(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
