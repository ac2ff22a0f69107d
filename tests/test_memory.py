"""Memory layers: the published programs, brute force over all rows, sharding, depth."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.layers import (
    Aux,
    Context,
    Gelu,
    GeluTanh,
    Layer,
    Silu,
)
from bestiary.layers.base import flatten
from bestiary.layers.memory import PEER, PKM, MemoryPlus, MemoryTable
from bestiary.layers.ultramem import UltraMem, UltraMemV2

RTOL = 1e-5
PLAIN = Context()


def close(actual: Any, expected: Any, name: str = "", rtol: float = RTOL) -> None:
    expected = np.asarray(expected)
    atol = rtol * float(np.abs(expected).max(initial=1e-30))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol, err_msg=name)


def gradients(
    layer: Layer, params: Any, x: Any, cotangent: Any, ctx: Context = PLAIN
) -> tuple[jax.Array, Aux, dict[str, Any], jax.Array]:
    """(y, Aux, gradient by path, gradient of x) of sum(y * cotangent) plus the layer's losses."""

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        own, there = params
        y, aux = layer.apply(own, x, dataclasses.replace(ctx, shared=there))
        return (y * cotangent).sum() + sum(aux.losses.values()), (y, aux)

    both = (params, ctx.shared)
    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True, allow_int=True))
    ((own, there), gx), (y, aux) = gradient(both, jnp.asarray(x))
    return y, aux, dict(flatten(own | {"shared": there})), gx


# --- the published programs -----------------------------------------------------------------------


def leaves(names: dict[str, tuple[str, Callable]], a: dict[str, np.ndarray], prefix: str) -> dict:
    """Our flat parameters (or, with prefix "g", their gradients) from a vector's arrays."""
    return {
        path: jnp.asarray(convert(a[prefix + name]))
        for path, (name, convert) in names.items()
        if prefix + name in a
    }


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def check(
    layer: Layer, names: dict[str, tuple[str, Callable]], a: dict, ctx: Context, extra: dict
) -> Aux:
    """Values and every gradient of the vector; `extra` are parameters without weights."""
    params = nested(leaves(names, a, ""))
    there = params.pop("shared", {})
    params |= extra
    ctx = dataclasses.replace(ctx, shared=there)
    y, aux, grads, gx = gradients(layer, params, a["x"], a["cotangent"], ctx)
    close(y, a["y"], "y")
    close(gx, a["gx"], "gx")
    expected = leaves(names, a, "g")
    assert {f"g{names[path][0]}" for path in expected} | {"gx"} == {
        name for name in a if name.startswith("g")
    }, "every gradient of the vector is compared"
    for path, value in expected.items():
        close(grads[path], value, f"gradient of {path}")
    return aux


def rows_of(v: np.ndarray) -> np.ndarray:
    return v[:, None]


def product_key_fields(hp: dict) -> dict[str, Any]:
    assert hp["score_activation"] == "softmax"
    assert not hp["query_batch_norm"] and not hp["query_dropout"]
    names = ("num_heads", "num_keys", "key_dim", "top_k", "query_bias")
    return {"dim": hp["hidden_size"]} | {name: hp[name] for name in names}


def check_product_keys(
    layer: Any, names: dict[str, tuple[str, Callable]], a: dict, extra: dict
) -> None:
    names = product_key_names_for(layer) | names
    params = nested(leaves(names, a, ""))
    found = layer.find(params, jnp.asarray(a["x"]))
    close(found.scores.reshape(a["topk_scores"].shape), a["topk_scores"], "topk_scores")
    np.testing.assert_array_equal(found.ids.reshape(a["topk_indices"].shape), a["topk_indices"])
    check(layer, names, a, Context(), extra)


def product_key_names_for(layer: Any) -> dict[str, tuple[str, Callable]]:
    heads, half = (layer.num_heads, 2), layer.key_dim // 2
    names = {
        "query": ("W_q", lambda w: w.T.reshape(-1, *heads, half)),
        "keys": ("keys", lambda k: k.reshape(*heads, -1, half).swapaxes(-1, -2)),
    }
    if layer.query_bias:
        names["query_bias"] = ("b_q", lambda b: b.reshape(*heads, half))
    return names


ACTIVATIONS = {"silu": Silu, "gelu": Gelu}


@pytest.mark.golden("pkm")
def test_pkm(golden: SimpleNamespace) -> None:
    layer = PKM(**product_key_fields(golden.hp))
    check_product_keys(layer, {"table/values": ("V", rows_of)}, golden.arrays, {})


@pytest.mark.golden("memory_plus")
def test_memory_plus(golden: SimpleNamespace) -> None:
    hp = golden.hp
    activation = ACTIVATIONS[hp["gate_activation"]]()
    layer = MemoryPlus(**product_key_fields(hp), bias=hp["projection_bias"], activation=activation)
    names = {
        "table/values": ("V", rows_of),
        "gate": ("W_s", np.transpose),
        "out": ("W_o", np.transpose),
    }
    if layer.bias:
        names |= {"gate_bias": ("b_s", np.array), "out_bias": ("b_o", np.array)}
    check_product_keys(layer, names, golden.arrays, {"activation": {}})


@pytest.mark.golden("peer")
def test_peer(golden: SimpleNamespace) -> None:
    hp = golden.hp
    activation = ACTIVATIONS[hp["expert_activation"]]()
    activation = GeluTanh() if hp["gelu_approximate"] else activation
    layer = PEER(**product_key_fields(hp), activation=activation)
    names = {"table/pre": ("U", rows_of), "table/values": ("V", rows_of)}
    check_product_keys(layer, names, golden.arrays, {"activation": {}})


def ultramem_names(layer: UltraMem) -> dict[str, tuple[str, Callable]]:
    slices, shape = layer.table.slices, (layer.expand, layer.table.slices, -1, layer.dim)
    names = {
        "query": ("W_q", lambda w: w.T.reshape(layer.dim, 2, -1)),
        "query_norm": ("q_norm", np.array),
        "keys": ("keys", lambda k: k.transpose(1, 3, 0, 4, 2)),
        "key_norm": ("k_norm", np.array),
        "core": ("core", np.array),
        "u": ("u", lambda u: u[0, :, 0]),
        "v": ("v", lambda v: v[0, :, 0]),
        "shuffle": ("shuffle", lambda s: s.astype(np.int32)),
        "out": ("W_v", lambda w: w.T.reshape(shape)),
    }
    where = "shared" if layer.shared else "table"
    return names | {f"{where}/values": ("V", lambda v: v.reshape(len(v), slices, -1))}


def check_ultramem(
    layer: UltraMem, names: dict[str, tuple[str, Callable]], a: dict, ctx: Context, extra: dict
) -> Aux:
    params = nested(leaves(names, a, ""))
    chosen = layer.choose(params, jnp.asarray(a["x"]), params["u"], params["v"])
    close(chosen.scores.reshape(a["scores"].shape), a["scores"], "scores")
    np.testing.assert_array_equal(chosen.ids.reshape(a["indices"].shape), a["indices"])
    aux = check(layer, names, a, ctx, extra)
    close(aux.state["u"], params["u"], "u")
    close(aux.state["v"], params["v"], "v")
    return aux


@pytest.mark.golden("ultramem_v1")
def test_ultramem(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    layer = UltraMem(
        dim=hp["hidden_size"],
        key_dim=hp["key_dim"],
        top_k=hp["top_k"],
        num_heads=hp["num_heads"],
        rank=hp["rank"],
        expand=hp["value_expand"],
        eps=hp["norm_eps"],
        table=MemoryTable(
            rows=hp["num_values"],
            dim=hp["value_dim"],
            slices=hp["tucker_multihead"],
            reads=hp["top_k"] * hp["num_heads"],
        ),
    )
    assert layer.num_keys == hp["num_keys"]
    check_ultramem(layer, ultramem_names(layer), a, Context(), {})


@pytest.mark.golden("ultramem_v2")
def test_ultramem_v2(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    layer = UltraMemV2(
        dim=hp["hidden_size"],
        key_dim=hp["key_dim"],
        top_k=hp["top_k"],
        num_heads=hp["num_heads"],
        rank=hp["rank"],
        expand=hp["value_expand"],
        eps=hp["norm_eps"],
        balance=hp["balance_coef"],
        num_layers=hp["num_memory_layers"],
        share_ratio=hp["share_ratio"],
        pre_activation=Gelu() if hp["use_glu_activation"] else None,
        shared=True,
        table=MemoryTable(
            rows=hp["num_all_values"],
            dim=hp["value_dim"],
            pre_dim=hp["pre_value_dim"],
            slices=hp["tucker_multihead"],
            reads=hp["top_k"] * hp["num_heads"],
        ),
    )
    assert (layer.num_keys, layer.window) == (hp["num_keys"], hp["num_values"])
    assert layer.table.rows == hp["num_memory_layers"] * hp["knum"] ** 2
    names = ultramem_names(layer) | {"shared/pre": ("P", rows_of), "pre": ("W_p", np.transpose)}
    ctx = Context(layer={"memory_layer": jnp.float32(hp["layer_id"])})
    extra = {"pre_activation": {}} if hp["use_glu_activation"] else {}
    aux = check_ultramem(layer, names, a, ctx, extra)
    if layer.balance:
        close(aux.losses["memory_balance"] / layer.balance, a["balance_loss"], "balance_loss")
