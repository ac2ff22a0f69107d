"""A mixture over a mesh: where experts and tokens lie, and what each device computes."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from bestiary.kernels.dispatch import axis_names
from bestiary.layers.base import Array, Layer, Param, Tree, map_params
from bestiary.layers.exchange import exchanged
from bestiary.layers.grouped import weighted_sum
from bestiary.layers.router import Routing
from bestiary.layers.sharding import pspec


def expert_parallel(
    expert: Layer, params: Tree, x: Array, routing: Routing, num_experts: int
) -> Array:
    """As `weighted_sum`, each device of the current mesh computing the experts that it holds.

    Where tokens and experts are spread over the same mesh axes, tokens travel; where experts are
    and tokens are not (a single sequence), each device computes its experts' part of the sum.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = fitting(pspec("batch", "seq", None), x.shape, mesh)
    places = map_params(lambda p: place(p, num_experts, mesh), expert.declare())
    ways = axis_names(fitting(pspec("experts"), (num_experts,), mesh)[0])
    travel = bool(ways) and set(ways) <= set(axis_names(rows[0]) + axis_names(rows[1]))
    matrices = [p for p in jax.tree.leaves(places) if len(p)]
    summed = tuple({name for spec in matrices for entry in spec[1:] for name in axis_names(entry)})
    combine = partial(exchanged, ways=ways) if travel else weighted_sum

    def local(params: Tree, x: Array, experts: Array, weights: Array) -> Array:
        here, over = num_experts, summed
        if ways and not travel:
            here, over = num_experts // jax.lax.axis_size(ways), summed + ways
            experts -= here * jax.lax.axis_index(ways)
            experts = jnp.where((experts >= 0) & (experts < here), experts, here)
        y = combine(expert, params, x, Routing(experts, weights), here)
        return jax.lax.psum(y, over) if over else y

    run = jax.shard_map(local, in_specs=(places, rows, rows, rows), out_specs=rows)
    return run(params, x, *routing)


def place(p: Param, num_experts: int, mesh: AbstractMesh) -> P:
    """How a matrix reaches the devices: apart by expert and by hidden unit, else whole."""
    if p.inputs is None:
        return P()
    kept = [axis if axis == "mlp" else None for axis in p.axes]
    return fitting(pspec("experts", *kept), (num_experts, *p.shape), mesh)


def fitting(spec: P | None, shape: tuple[int, ...], mesh: AbstractMesh) -> P:
    """`spec` without mesh axes of one device, and those that a dimension does not divide over."""

    def entry(wanted: Any, size: int) -> tuple[str, ...] | None:
        names = tuple(name for name in axis_names(wanted) if mesh.shape[name] > 1)
        return (
            names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None
        )

    wanted = tuple(spec or ()) + (None,) * len(shape)
    return P(*(entry(names, size) for names, size in zip(wanted, shape, strict=False)))
