"""Memory layers: the published programs, brute force over all rows, sharding, depth."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import PartitionSpec as P

from bestiary.layers import (
    DEFAULT_RULES,
    PEER,
    PKM,
    Aux,
    Context,
    Gelu,
    GeluTanh,
    Layer,
    MemoryPlus,
    MemoryTable,
    Silu,
    UltraMem,
    UltraMemV2,
    use_rules,
)
from bestiary.layers.base import flatten, params_of
from bestiary.layers.memory import product_keys
from bestiary.layers.repeat import Remat
from bestiary.layers.rows import Table, dot_rows, lend, sum_rows
from bestiary.layers.ultramem import leading, table_std
from bestiary.train.data import Data
from bestiary.train.experiment import Experiment
from bestiary.train.mesh import placed
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.train.step import init_state, make_step
from bestiary.zoo import load_model
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.llama import byte_llama, swiglu
from bestiary.zoo.ultramem import memory, with_memory, with_paper_init

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


# --- look-ups by brute force ----------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(7, 1), (9, 4), (13, 6), (5, 5)])
def test_product_keys_are_the_best_of_all_sums(n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    rows, columns = rng.normal(size=(2, 3, 2, n)).astype(np.float32)
    found = product_keys(jnp.asarray(rows), jnp.asarray(columns), k)
    sums = (np.float64(rows)[..., :, None] + columns[..., None, :]).reshape(3, 2, n * n)
    best = np.argsort(-sums)[..., :k]
    np.testing.assert_array_equal(found.ids, best)
    close(found.scores, np.take_along_axis(sums, best, -1), rtol=1e-6)


def test_tdqkr_of_rank_one_finds_the_best_of_all_products() -> None:
    """With positive scores: the best product then is of the best row and column keys."""
    table = MemoryTable(rows=121, dim=6, slices=2, reads=10)
    layer = UltraMem(dim=7, key_dim=4, top_k=5, num_heads=2, rank=1, table=table)
    rng = np.random.default_rng(0)
    params = layer.init(jax.random.key(0))
    params |= {
        name: jnp.asarray(rng.uniform(0.1, 1, params[name].shape), jnp.float32)
        for name in ("query", "keys", "core")
    }
    x = rng.uniform(0.1, 1, (2, 3, 7)).astype(np.float32)
    u, v = leading(params["core"], params["u"], params["v"])
    chosen = jax.jit(layer.choose)(params, jnp.asarray(x), u, v)

    def normed(a: np.ndarray, gain: np.ndarray, axis: int) -> np.ndarray:
        a = a / np.sqrt(np.square(a).mean(axis, keepdims=True) + layer.eps)
        return a * np.expand_dims(gain, [i for i in range(a.ndim) if i != axis % a.ndim])

    p = {name: np.asarray(value, np.float64) for name, value in params.items() if name != "table"}
    q = normed(np.einsum("bsd,dpk->bspk", x, p["query"]), p["query_norm"], -1)
    keys = normed(p["keys"], p["key_norm"], 1)
    s = np.einsum("bspk,pkhrn->pbshrn", q, keys)[..., 0, :]
    scores = np.einsum("bshi,bshj,ph->bshijp", s[0], s[1], p["core"][..., 0, 0])
    scores = scores.reshape(*scores.shape[:3], -1, 2)
    best = np.argsort(-scores.sum(-1))[..., :5]
    np.testing.assert_array_equal(chosen.ids, best)
    close(chosen.scores, np.take_along_axis(scores, best[..., None], -2))


def test_more_positions_than_are_searched_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, params, x, _ = ring(shared=False)
    whole = jax.jit(layer.choose)(params, x, params["u"], params["v"])
    monkeypatch.setattr("bestiary.layers.ultramem.POSITIONS", 2)
    parts = jax.jit(lambda *args: layer.choose(*args))(params, x, params["u"], params["v"])
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_rows_are_read_and_written_as_by_dense_products() -> None:
    n, b, s, k, g, p, c = 6, 2, 3, 5, 4, 2, 7
    rng = np.random.default_rng(1)
    table, weights, x = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((n, p, c), (b, s, k, g, p), (b, s, g, p, c))
    )
    rows = jnp.asarray(rng.integers(n, size=(b, s, k)))  # some of them more than once

    def dense_sum(table: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.einsum("bskgp,bskpc->bsgpc", weights, table[rows])

    def dense_dot(table: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("bsgpc,bskpc->bskgp", x, table[rows])

    for ours, dense, other in ((sum_rows, dense_sum, weights), (dot_rows, dense_dot, x)):
        y, pull = jax.vjp(lambda t, o, f=ours: f(lend(t), rows, o)[0], table, other)
        expected, dense_pull = jax.vjp(dense, table, other)
        close(y, expected)
        ct = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
        for a, b_ in zip(pull(ct), dense_pull(ct), strict=True):
            close(a, b_)


def test_reading_makes_no_array_of_all_entries() -> None:
    """Tokens times entries times width would be 32 times the output."""
    k, width = 32, 64
    args = [((1000, 1, width), jnp.float32), ((4, 128, k), jnp.int32)]
    args += [((4, 128, k, 1, 1), jnp.float32)]
    shapes = [jax.ShapeDtypeStruct(*a) for a in args]

    def loss(table: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.square(sum_rows(lend(table), rows, weights)[0]).sum()

    memory = jax.jit(jax.grad(loss, (0, 2))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 128 * width * 4 * 8 + 2 * 1000 * width * 4


# --- UltraMem's state and ring --------------------------------------------------------------------


def ring(*, shared: bool) -> tuple[UltraMemV2, Any, jax.Array, MemoryTable]:
    """One layer of three that share 75 rows, each seeing 36 of them from 25 l on."""
    table = MemoryTable(rows=75, dim=8, pre_dim=6, slices=2, reads=9)
    layer = UltraMemV2(
        dim=10,
        key_dim=4,
        top_k=3,
        num_layers=3,
        share_ratio=0.5,
        balance=0.01,
        shared=shared,
        table=table,
    )
    x = jax.random.normal(jax.random.key(1), (4, 7, 10))
    return layer, layer.init(jax.random.key(0)), x, table


def test_the_singular_vectors_keep_their_signs() -> None:
    rng = np.random.default_rng(0)
    core = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    left, _, right = np.linalg.svd(core.sum(0))
    for sign in (-1, 1):
        noise = rng.normal(scale=0.05, size=(2, 3, 4))
        u, v = leading(
            jnp.asarray(core), sign * left[..., 0] + noise[0], sign * right[:, 0] + noise[1]
        )
        close(u, sign * left[..., 0])
        close(v, sign * right[:, 0])
    positive = leading(jnp.asarray(np.abs(core)), jnp.ones((3, 4)), jnp.ones((3, 4)))
    assert (np.stack(positive) > 0).all(), "the first vectors of a positive core"


def test_each_layer_writes_to_its_window_of_the_ring() -> None:
    layer, params, x, table = ring(shared=True)
    rows = nested(
        {name: p.init(jax.random.key(2), p.shape, p.dtype) for name, p in table.spec().items()}
    )
    assert layer.window == 36

    @jax.jit
    def gradient(rows: Any, index: jax.Array) -> Any:
        ctx = Context(layer={"memory_layer": index})
        return jax.grad(
            lambda rows: layer.apply(params, x, dataclasses.replace(ctx, shared=rows))[0].sum()
        )(rows)

    for index, seen in enumerate([range(36), range(25, 61), [*range(50, 75), *range(11)]]):
        grads = gradient(rows, jnp.float32(index))
        for name in ("values", "pre"):
            touched = np.flatnonzero(np.any(grads[name], (1, 2)))
            assert set(touched) <= set(seen) and len(touched) > 5


def test_the_core_is_drawn_to_rank_one() -> None:
    table = MemoryTable(rows=16, dim=6, slices=2, reads=2)
    layer = UltraMem(dim=5, key_dim=4, top_k=2, rank=3, num_heads=2, core_penalty=2.0, table=table)
    params = layer.init(jax.random.key(0))
    x = jnp.ones((1, 2, 5))
    _, aux, grads, _ = gradients(layer, params, x, jnp.zeros_like(x))
    values = np.linalg.svd(np.asarray(params["core"], np.float64).sum(0), compute_uv=False)
    expected = 2.0 * np.square(np.maximum(values[:, 1:] - 0.15, 0)).mean()
    close(aux.losses["memory_core"], expected)
    nearer = params["core"] - 0.01 * grads["core"]
    smaller = np.linalg.svd(np.asarray(nearer, np.float64).sum(0), compute_uv=False)
    assert (smaller[:, 1] < values[:, 1]).all()


def test_padding_is_left_out_of_the_balance() -> None:
    layer, params, x, _ = ring(shared=False)
    segments = jnp.ones(x.shape[:2], jnp.int32).at[:, 5:].set(0)
    apply = jax.jit(layer.apply)
    _, padded = apply(params, x, Context(segment_ids=segments))
    _, short = apply(params, x[:, :5], PLAIN)
    close(padded.losses["memory_balance"], short.losses["memory_balance"])
    close(padded.metrics["score"], short.metrics["score"])


# --- in models ------------------------------------------------------------------------------------


def small() -> Decoder:
    """Three blocks that share a ring table."""
    dense = byte_llama(3, 64, swiglu(64, 24))
    layer = memory(num_layers=3, dim=64, knum=5, key_dim=8, top_k=4, value_dim=8, pre_dim=12)
    return with_memory(dense, dataclasses.replace(layer, balance=0.1))


def token_loss(model: Decoder, params: Any, ids: jax.Array) -> jax.Array:
    logits, _, aux = model.apply(params, ids)
    return jax.nn.log_softmax(logits)[..., 7].sum() + aux.losses["memory_balance"]


IDS = jax.ShapeDtypeStruct((4, 16), jnp.int32)


def test_every_parameter_learns_through_scan_and_remat() -> None:
    model = small().map_stacks(lambda stack: dataclasses.replace(stack, remat="full"))
    ids = jax.random.randint(jax.random.key(1), (2, 17), 0, 256)

    gradient = jax.jit(jax.grad(partial(token_loss, model), allow_int=True))
    grads = gradient(model.init(jax.random.key(0)), ids)
    declared = dict(flatten(model.declare()))
    for path, g in flatten(grads):
        if declared[path].trainable:
            layers = g if path.startswith("blocks") else g[None]
            assert all(np.any(part) for part in layers), f"{path} gets no gradient"


def equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in eqn.params.values():
            if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                yield from equations(inner)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_add_to_one_gradient_of_their_table(remat: Remat) -> None:
    """Zeros are filled in once for all layers, and nothing of a table's size is added up."""
    model = small().map_stacks(lambda stack: dataclasses.replace(stack, remat=remat))
    gradient = jax.grad(partial(token_loss, model), allow_int=True)
    program = jax.make_jaxpr(gradient)(model.abstract(), IDS)
    for table in model.abstract()["shared"].values():
        made = [
            eqn.primitive.name
            for eqn in equations(program)
            for out in eqn.outvars
            if getattr(out.aval, "size", 0) >= table.size and out.aval.shape[-2:] == table.shape[1:]
        ]
        assert made.count("broadcast_in_dim") == 1
        assert not {"add", "add_any", "concatenate"} & set(made)


def test_readers_of_one_table_add_up_their_gradients() -> None:
    """Handed from layer to layer, the table gets what copies of it would get in sum."""
    layer, params, x, table = ring(shared=True)
    arrays = table.init(jax.random.key(2))
    places = [{"memory_layer": jnp.float32(i)} for i in range(3)]

    def loss(tables: list[Any]) -> jax.Array:
        y = x
        for place, shared in zip(places, tables, strict=True):
            y += layer.apply(params, y, Context(layer=place, shared=shared))[0]
        return jnp.square(y).sum()

    def in_turn(arrays: Any) -> jax.Array:
        y, shared = x, table.lent(arrays)
        for place in places:
            out, aux = layer.apply(params, y, Context(layer=place, shared=shared))
            y, shared = y + out, aux.shared
        return jnp.square(y).sum()

    ours = jax.jit(jax.grad(in_turn))(arrays)
    copies = jax.jit(jax.grad(loss))([arrays] * 3)
    for name, g in ours.items():
        close(g, sum(copy[name] for copy in copies), name)


def test_devices_add_up_once_what_their_tokens_booked(mesh: jax.sharding.Mesh) -> None:
    """Three layers in a loop: the sum over the devices stands behind it."""
    table = jax.random.normal(jax.random.key(0), (12, 2, 4))
    rows = jax.random.randint(jax.random.key(1), (4, 6, 5), 0, 12)
    weights = jax.random.normal(jax.random.key(2), (4, 6, 5, 1, 2))

    def loss(table: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
        values, account = lend(table)

        def layer(account: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, again = sum_rows(Table(values, account), rows, weights)
            s, again = dot_rows(again, rows, scale * y)
            return again.account, jnp.square(s).sum()

        return jax.lax.scan(layer, account, jnp.arange(3.0))[1].sum()

    gradient = jax.jit(jax.grad(loss))
    expected = gradient(table, rows, weights)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        places = P(None, None, "fsdp"), P("data"), P("data")
        args = jax.device_put((table, rows, weights), places)
        program = gradient.lower(*args).compile()
        close(program(*args), expected)
    of_the_table = re.compile(r"= f32\[[1,]*12,2,2\]\S* all-reduce\(")
    sums = [line for line in program.as_text().splitlines() if of_the_table.search(line)]
    assert len(sums) == 1 and "while" not in sums[0]


def test_prefill_and_decode_equal_the_full_forward() -> None:
    model = small()
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)
    full, _, _ = jax.jit(model.apply)(params, ids)
    cache = model.init_cache(2, 9)
    step = jax.jit(model.apply)
    first, cache, _ = step(params, ids[:, :7], PLAIN, cache)
    parts = [first]
    for t in (7, 8):
        logits, cache, _ = step(params, ids[:, t : t + 1], PLAIN, cache)
        parts.append(logits)
    close(jnp.concatenate(parts, 1), full)


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    """Tables by columns over the axis that also shards the batch."""
    layer, params, x, _ = ring(shared=False)

    @jax.jit
    def gradient(params: Any, x: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            y, aux = layer.apply(params, x)
            return jnp.square(y).sum() + aux.losses["memory_balance"], (y, aux)

        return jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True)(params, x)

    expected = gradient(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        shardings = jax.tree.map(lambda s: s.sharding, layer.abstract(mesh))
        assert shardings["table"]["values"].spec == P(None, None, "fsdp")
        args = jax.device_put(params, shardings), jax.device_put(x, P(("data", "fsdp")))
        program = gradient.lower(*args).compile()
        ours = program(*args)
    for name in ("values", "pre"):
        assert ours[1][0]["table"][name].sharding.spec == P(None, None, "fsdp")
        rows, slices, width = params["table"][name].shape
        assert f"f32[{rows},{slices},{width}]" not in program.as_text(), "a table is never whole"
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(b.dtype, jnp.floating):
            close(a, b, rtol=1e-4)


def test_with_the_papers_values_a_memory_starts_as_large_as_a_gated_feed_forward() -> None:
    """In NumPy, with scores of mean 1, linear gates, and the latter's output scaled by depth."""
    dim, hidden, k, pre_dim, value_dim, num_layers, tokens = 160, 384, 6, 80, 112, 5, 2000
    std = table_std(
        hidden=hidden,
        entries=k,
        score_std=0.7,
        pre_dim=pre_dim,
        value_dim=value_dim,
        num_layers=num_layers,
    )
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(scale=np.sqrt(2 / (5 * dim)), size=shape)

    x = rng.normal(size=(tokens, dim))
    pre, values = (std * rng.normal(size=(tokens, k, n)) for n in (pre_dim, value_dim))
    scores = rng.normal(1, 0.7, (tokens, k))
    scores *= np.einsum("te,tke->tk", x @ matrix(dim, pre_dim), pre)
    memory = np.einsum("tk,tkc->tc", scores, values) @ matrix(value_dim, dim)
    gated = (x @ matrix(dim, hidden)) * (x @ matrix(dim, hidden))
    dense = gated @ matrix(hidden, dim) / np.sqrt(2 * num_layers)
    np.testing.assert_allclose(memory.std(), dense.std(), rtol=0.05)


def test_the_papers_values_reach_the_table_and_the_matrices() -> None:
    model = with_paper_init(small(), score_std=1.0)
    params = model.init(jax.random.key(0))
    # F = 24, m = 4, pd = 12, vd = 8, L = 3
    expected = (0.2 * 24 / (4 * 2 * 12 * 8 * 3)) ** 0.25
    for table in params["shared"].values():
        np.testing.assert_allclose(table.std(), expected, rtol=0.1)
    layer = params["blocks"]["ffn"]["1"]
    for name in ("query", "pre", "out"):
        np.testing.assert_allclose(layer[name].std(), np.sqrt(2 / (5 * 64)), rtol=0.1)
    np.testing.assert_allclose(layer["keys"].std(), 8**-0.5, rtol=0.1)
    assert model.count() == small().count()


PUBLISHED = {  # millions active and in all; what the embedding adds to the former; tolerances
    "memoryplus_227m": (228, 1190, True, 0.06, 0.02),
    "ultramem_227m": (225, 1180, True, 0.02, 0.02),
    "ultramemv2_227m": (225, 1180, True, 0.03, 0.01),
    "ultramemv2_1b7b": (1079, 6700, False, 0.01, 0.08),
}


def test_a_mesh_of_one_device_is_no_mesh() -> None:
    table = jnp.ones((20, 2, 3))
    rows, weights = jnp.arange(2 * 5 * 4).reshape(2, 5, 4) % 20, jnp.ones((2, 5, 4, 1, 2))

    def loss(table: jax.Array) -> jax.Array:
        y, again = sum_rows(lend(table), rows, weights)
        return dot_rows(again, rows, y)[0].sum()

    one = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    expected = jax.grad(loss)(table)
    with jax.set_mesh(one), use_rules(DEFAULT_RULES):
        close(jax.jit(jax.grad(loss))(table), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """The published totals leave embeddings out, and so do the active parameters where input and
    output have an embedding each; the rest of the difference is the papers' own: the 6.70B need
    tables of 16 x 552^2 rows, not the published 528^2."""
    active, total, tied, active_tolerance, total_tolerance = PUBLISHED[name]
    model = load_model(name)
    trained = [p for p in params_of(model.declare()) if p.trainable]
    embeddings = model.embedding.count().total * (1 if tied else 2)
    assert tied == (model.head is None)
    counted = sum(p.size for p in trained) - embeddings
    assert counted == pytest.approx(1e6 * total, rel=total_tolerance)
    used = sum(p.size * p.active for p in trained) - (0 if tied else embeddings)
    assert used == pytest.approx(1e6 * active, rel=active_tolerance)


def test_the_tiny_model_costs_what_the_dense_one_does() -> None:
    dense, tiny = load_model("llama_tiny").cost(128), load_model("ultramemv2_tiny").cost(128)
    assert tiny.active_flops == pytest.approx(dense.active_flops, rel=0.01)


# --- the optimiser --------------------------------------------------------------------------------


def test_the_learning_rate_of_tables_falls_to_that_of_the_rest() -> None:
    optimizer = Optimizer(table_rate=4.0, table_rate_until=0.5)
    scales = [float(optimizer.table_scale(jnp.int32(i), jnp.int32(40))) for i in (0, 5, 20, 39)]
    assert scales == pytest.approx([4.0, 3.25, 1.0, 1.0])
    assert float(Optimizer().table_scale(jnp.int32(0), jnp.int32(40))) == 1.0


def test_tables_learn_by_rules_of_their_own() -> None:
    """Adam's first step: entries move by the rate, rows of tables by that times 4 on average."""
    rules = {"weight_decay": 0.0, "clip": 0.0, "eps": 1e-30}
    experiment = Experiment(
        model=small(),
        data=Data(batch_size=2, length=9),
        optimizer=Optimizer(learning_rate=0.01, table_rate=4.0, table_moments="rows", **rules),
        schedule=Schedule(warmup=0.0),
        steps=1000,
    )
    mesh = experiment.mesh.build(jax.devices()[:1])
    ids = jax.random.randint(jax.random.key(1), (2, 10), 0, 256)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": jnp.ones((2, 9))}
    batch |= {"positions": jnp.arange(9) + jnp.zeros((2, 1), int)}
    batch |= {"segment_ids": jnp.ones((2, 9), jnp.int32)}
    with placed(mesh, experiment.mesh.table):
        before = init_state(experiment, mesh)
        start = jax.tree.map(jnp.copy, before["params"])
        state, _ = make_step(experiment, mesh)(before, batch, jnp.int32(1000))
    moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), state["params"], start)
    for name, change in moved["shared"].items():
        size = np.sqrt(np.square(change).mean((1, 2)))
        touched = size > 0
        assert 10 < touched.sum() < len(size)
        np.testing.assert_allclose(size[touched], 0.04, rtol=1e-3, err_msg=name)
    change = moved["blocks"]["ffn"]["1"]["pre"]
    np.testing.assert_allclose(np.abs(change[change != 0]), 0.01, rtol=1e-2)


def test_rows_of_moments_take_a_quarter_of_the_memory() -> None:
    table = MemoryTable(rows=50, dim=16, slices=2, reads=3)
    declared, params = table.declare(), table.init(jax.random.key(0))
    tx = Optimizer(table_moments="rows", clip=0.0, weight_decay=0.5).build(declared)
    opt = tx.init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(opt)) == 2 * 50 * 16 + 4 * 50 + 2 * 4
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, opt, params)
    close(updates["values"], -0.5 * params["values"], "tables decay")


# --- errors ---------------------------------------------------------------------------------------

KEYS: dict[str, Any] = {"dim": 12, "num_heads": 2, "num_keys": 6, "key_dim": 8, "top_k": 3}
TABLE = MemoryTable(rows=75, dim=8, pre_dim=6, slices=2, reads=9)
V1: dict[str, Any] = {"dim": 10, "key_dim": 4, "top_k": 3}


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PKM(**KEYS | {"top_k": 7}), "top_k: 7; need at most num_keys 6"),
        (lambda: PEER(**KEYS | {"key_dim": 5}), "key_dim: 5; need an even number"),
        (lambda: MemoryPlus(**KEYS | {"num_heads": 0}), "num_heads: 0; need at least 1"),
        (lambda: dataclasses.replace(TABLE, dim=7), "dim: 7; need a multiple of slices 2"),
        (lambda: UltraMem(**V1, table=TABLE), "table.rows: 75; need a square"),
        (lambda: UltraMem(**V1, table=TABLE, expand=3), "expand: 3; need a square"),
        (
            lambda: UltraMemV2(**V1, table=TABLE, rank=1, core_penalty=0.1),
            "core_penalty: 0.1; a core of rank 1 has none",
        ),
        (lambda: UltraMemV2(**V1, table=TABLE, share_ratio=0), "share_ratio: 0; need 0 < "),
        (lambda: UltraMemV2(**V1, table=TABLE, num_layers=4), "table.rows: 75; need a multiple"),
        (lambda: UltraMemV2(**V1 | {"top_k": 9}, table=TABLE), "top_k: 9; need at most 8"),
        (lambda: Optimizer(table_rate=0), "optimizer.table_rate: 0; need more than 0"),
        (
            lambda: Optimizer(table_moments="columns"),  # type: ignore[arg-type]
            "optimizer.table_moments: 'columns'; need one of",
        ),
        (
            lambda: Optimizer(table_moments="rows", name="lion"),
            "optimizer.table_moments: 'rows' with lion; only adamw",
        ),
        (
            lambda: UltraMemV2(**V1, table=dataclasses.replace(TABLE, pre_dim=0)),
            "pre_dim: 0; need at least 1",
        ),
    ],
)
def test_impossible_sizes_are_refused(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
