"""Mamba and Mamba-2: parity with the published code, documents, padding, decoding, sharding."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.selective_scan import selective_scan
from bestiary.kernels.ssd import ssd
from bestiary.layers import Context, Layer, Mamba, Mamba2
from bestiary.layers.activations import Gelu, GeluTanh, Relu, Silu

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
