"""Mixture of experts: router, experts, and three equal ways to bring them together.

Feed-forward role: (params, x, ctx) -> (y, Aux).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from bestiary.kernels.dispatch import vary_alike
from bestiary.kernels.grouped_dot import grouped_dot
from bestiary.layers import balance
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Tree,
    is_param,
    layer,
    map_params,
    params_of,
)
from bestiary.layers.router import Router, Routing
from bestiary.layers.sharding import pspec, use_rules

Path = Literal["auto", "masked", "sorted"]


@layer
class MoE(Layer):
    """y = sum_k w_k expert_k(x) + shared(x): [batch, seq, dim] -> the same.

    `expert` is one expert, any feed-forward without biases; its matrices are stacked for
    `router.num_experts`, what is not a matrix (an activation's coefficients) serves all experts.
    Dropless, unless `capacity_factor` is given. Raises ValueError for unlike widths and for a
    router with per-expert biases.
    """

    router: Router
    expert: Layer
    shared: Layer | None = None
    """A feed-forward that every token uses (DeepSeek-MoE's shared experts, side by side in one)."""
    capacity_factor: float | None = None
    """An expert takes at most ceil(tokens top_k / num_experts x this); the rest is dropped, and
    weights are not renormalised. For comparisons."""
    drop: Literal["probs", "position"] = "probs"
    """Which tokens an expert keeps: those with the largest weights, or the first."""
    path: Path = "auto"
    """"masked": every expert computes every token; "sorted": tokens sorted by expert, each computed
    once, on a mesh where the experts lie (all-to-all); auto: sorted."""

    def __post_init__(self) -> None:
        if self.path not in get_args(Path):
            raise ValueError(f"path: {self.path!r}; need one of {', '.join(get_args(Path))}")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor: {self.capacity_factor}; need more than 0")
        for name in ("expert", "shared"):
            dim = getattr(getattr(self, name), "dim", self.router.dim)
            if dim != self.router.dim:
                raise ValueError(f"{name}.dim: {dim}; need router.dim {self.router.dim}")
        if getattr(self.expert, "bias", False):
            raise ValueError("expert.bias: True; experts have none")

    def spec(self) -> Tree:
        n = self.router.num_experts
        used = self.router.top_k / n

        def stacked(p: Param) -> Param:
            return p if p.inputs is None else replace(p.stack(n, "experts"), active=p.active * used)

        spec = {"router": self.router, "experts": map_params(stacked, self.expert.declare())}
        return spec if self.shared is None else spec | {"shared": self.shared}

    def cost(self, length: int) -> Cost:
        """Sorted, a token costs the experts that it uses, and no more."""
        cost = super().cost(length)
        if self.path == "masked":
            return cost
        n, k = self.router.num_experts, self.router.top_k
        one = sum(p.cost().flops for p in params_of(self.expert.declare()))
        return replace(cost, flops=cost.flops - (n - k) * one)

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        routing, aux = self.router.apply(params["router"], x, ctx)
        metrics = dict(aux.metrics)
        if self.capacity_factor is not None:
            kept = self.within_capacity(routing)
            chosen = (routing.experts < self.router.num_experts).astype(jnp.float32)
            metrics["dropped"] = 1 - ctx.mean((kept * chosen).sum(-1)) / ctx.mean(chosen.sum(-1))
            routing = Routing(
                jnp.where(kept, routing.experts, self.router.num_experts),
                jnp.where(kept, routing.weights, 0),
            )
        combine = masked if self.path == "masked" else sorted_by_expert
        y = combine(self.expert, params["experts"], x, routing, self.router.num_experts, ctx)
        parts = {"router": replace(aux, metrics=metrics)}
        if self.shared is not None:
            z, parts["shared"] = self.shared.apply(params["shared"], x, ctx)
            y += z
        return y, Aux.join(**parts)

    def within_capacity(self, routing: Routing) -> Array:
        """Which choices the experts have room for: bool [batch, seq, top_k]."""
        experts = routing.experts
        n, k = self.router.num_experts, self.router.top_k
        flat = experts.reshape(-1, k)
        gates = jnp.zeros((flat.shape[0], n))
        rows = jnp.arange(flat.shape[0])[:, None]
        gates = gates.at[rows, flat].add(routing.weights.reshape(-1, k), mode="drop")
        most = balance.capacity(flat.shape[0], n, k, self.capacity_factor or 1.0)
        kept = balance.within_capacity(gates, most, self.drop)
        return jnp.take_along_axis(kept, jnp.minimum(flat, n - 1), 1).reshape(experts.shape)


def masked(
    expert: Layer, params: Tree, x: Array, routing: Routing, num_experts: int, ctx: Context
) -> Array:
    """Every expert computes every token: the definition, and the quickest for few experts."""
    chosen = routing.experts[..., None] == jnp.arange(num_experts)
    gates = jnp.where(chosen, routing.weights[..., None], 0).sum(-2)
    axes = map_params(lambda p: None if p.inputs is None else 0, expert.declare())
    outputs = jax.vmap(lambda params: expert.apply(params, x, ctx)[0], (axes,))(params)
    return (outputs * jnp.moveaxis(gates, -1, 0)[..., None].astype(x.dtype)).sum(0)


def sorted_by_expert(
    expert: Layer, params: Tree, x: Array, routing: Routing, num_experts: int, ctx: Context
) -> Array:
    """Every token is computed by its experts only, on the devices where they lie.

    Where tokens and experts are spread over the same mesh axes, tokens travel; where experts are
    and tokens are not (a single sequence), each device computes its experts' part of the sum.
    """
    del ctx
    declared = expert.declare()
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or mesh.manual_axes:
        return _local(expert, declared, params, x, routing, num_experts, ())
    rows = _fitting(pspec("batch", "seq", None), x.shape, mesh)
    places = map_params(lambda p: _place(p, num_experts, mesh), declared)
    ways = _names(_fitting(pspec("experts"), (num_experts,), mesh)[0])
    travel = bool(ways) and set(ways) <= set(_names(rows[0]) + _names(rows[1]))
    matrices = [p for p in jax.tree.leaves(places) if len(p)]
    summed = tuple({name for spec in matrices for entry in spec[1:] for name in _names(entry)})

    def local(params: Tree, x: Array, experts: Array, weights: Array) -> Array:
        here, over = num_experts, summed
        if ways and not travel:
            here, over = num_experts // jax.lax.axis_size(ways), summed + ways
            experts -= here * jax.lax.axis_index(ways)
            experts = jnp.where((experts >= 0) & (experts < here), experts, here)
        with use_rules({}):  # within one device there is nothing to place
            routing = Routing(experts, weights)
            y = _local(expert, declared, params, x, routing, here, ways if travel else ())
        return jax.lax.psum(y, over) if over else y

    run = jax.shard_map(local, in_specs=(places, rows, rows, rows), out_specs=rows)
    return run(params, x, *routing)


@dataclass(frozen=True)
class Grouped:
    """Stacked matrices that stand for one: row i of a product takes the matrix of its group."""

    w: Array
    sizes: Array

    def contract(self, equation: str, x: Array) -> Array:
        """[1, rows, D] by [D, F], whatever the axes are called."""
        del equation
        return grouped_dot(x[0], self.w.astype(x.dtype), self.sizes)[None]


def _local(
    expert: Layer,
    declared: Tree,
    params: Tree,
    x: Array,
    routing: Routing,
    num_experts: int,
    ways: tuple[str, ...],
) -> Array:
    """The experts' weighted sum for this device's tokens; experts lie over the mesh axes `ways`."""
    k = routing.experts.shape[-1]
    experts = routing.experts.reshape(-1)
    order = argsort(experts)  # "none" comes last
    back = inverse(order)
    copies = jnp.repeat(x.reshape(-1, x.shape[-1]), k, 0)
    compute = _exchanged if ways else _grouped
    outputs = compute(
        expert, declared, params, permute(copies, order, back), experts[order], num_experts, ways
    )
    outputs = permute(outputs, back, order).reshape(*routing.experts.shape, -1)
    return (outputs * routing.weights[..., None].astype(x.dtype)).sum(-2)


def argsort(x: Array) -> Array:
    """Stable `jnp.argsort`, which forgets that its result differs over the mesh as x does."""
    keys, places = vary_alike(x, jnp.arange(x.size))
    return jax.lax.sort_key_val(keys, places)[1]


def inverse(order: Array) -> Array:
    """The permutation that undoes `order`."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size))


def permute(x: Array, order: Array, back: Array) -> Array:
    """x[order], `back` undoing `order`: the gradient is a look-up too, where JAX would scatter."""
    return _permute(*vary_alike(x, order, back))


@jax.custom_vjp
def _permute(x: Array, order: Array, back: Array) -> Array:
    del back
    return x[order]


def _permute_forward(x: Array, order: Array, back: Array) -> tuple[Array, Array]:
    return x[order], back


def _permute_backward(back: Array, dy: Array) -> tuple[Array, None, None]:
    return dy[back], None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _grouped(
    expert: Layer,
    declared: Tree,
    params: Tree,
    rows: Array,
    experts: Array,
    num_experts: int,
    ways: tuple[str, ...] = (),
) -> Array:
    """rows [n, dim], sorted by expert, through their experts; those of none give zeros."""
    del ways
    sizes = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
    grouped = jax.tree.map(
        lambda p, w: w if p.inputs is None else Grouped(w, sizes),
        declared,
        params,
        is_leaf=is_param,
    )
    return expert.apply(grouped, rows[None])[0][0]


def _exchanged(
    expert: Layer,
    declared: Tree,
    params: Tree,
    rows: Array,
    experts: Array,
    num_experts: int,
    ways: tuple[str, ...],
) -> Array:
    """As `_grouped`, with the experts spread over the devices of `ways`: rows travel to their
    expert and back.

    A device has room to send all its rows to each other one, so that nothing is ever dropped: the
    buffers grow with the devices, of which a few per group are enough (the mesh's axis for
    "experts").
    """
    devices = jax.lax.axis_size(ways)
    here = num_experts // devices  # experts per device
    n, dim = rows.shape
    to = jnp.minimum(experts // here, devices)
    first = jnp.searchsorted(to, jnp.arange(devices))
    slot = jnp.arange(n) - first[jnp.minimum(to, devices - 1)]
    place = jnp.where(to < devices, to * n + slot, devices * n)

    def send(values: Array, fill: Any) -> Array:
        buffer = jnp.full((devices * n, *values.shape[1:]), fill, values.dtype)
        buffer = buffer.at[place].set(values, mode="drop").reshape(devices, n, *values.shape[1:])
        return jax.lax.all_to_all(buffer, ways, 0, 0, tiled=True)

    arrived = send(rows, 0).reshape(-1, dim)
    local = send(experts % here, here).reshape(-1)
    order = argsort(local)
    again = inverse(order)
    arrived = permute(arrived, order, again)
    outputs = _grouped(expert, declared, params, arrived, local[order], here)
    back = permute(outputs, again, order)
    back = jax.lax.all_to_all(back.reshape(devices, n, -1), ways, 0, 0, tiled=True)
    back = back.reshape(devices * n, -1)
    return jnp.take(back, place, axis=0, mode="fill", fill_value=0)


def _place(p: Param, num_experts: int, mesh: AbstractMesh) -> P:
    """How a matrix reaches the devices: apart by expert and by hidden unit, else whole."""
    if p.inputs is None:
        return P()
    kept = [axis if axis == "mlp" else None for axis in p.axes]
    return _fitting(pspec("experts", *kept), (num_experts, *p.shape), mesh)


def _fitting(spec: P | None, shape: tuple[int, ...], mesh: AbstractMesh) -> P:
    """`spec` without mesh axes of one device, and those that a dimension does not divide over."""

    def entry(wanted: Any, size: int) -> tuple[str, ...] | None:
        names = tuple(name for name in _names(wanted) if mesh.shape[name] > 1)
        return (
            names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None
        )

    wanted = tuple(spec or ()) + (None,) * len(shape)
    return P(*(entry(names, size) for names, size in zip(wanted, shape, strict=False)))


def _names(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()
