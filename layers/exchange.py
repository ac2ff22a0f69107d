"""Rows that travel to the devices where their experts lie, and back."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from bestiary.kernels.dispatch import axis_names
from bestiary.layers.base import Array, Layer, Param, Tree
from bestiary.layers.grouped import argsort, inverse, permute, through_experts
from bestiary.layers.sharding import pspec


def exchanged(
    expert: Layer,
    params: Tree,
    rows: Array,
    experts: Array,
    num_experts: int,
    ways: tuple[str, ...],
) -> Array:
    """As `through_experts`, with the experts spread over the devices of `ways`: rows travel there
    and back.

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
    outputs = through_experts(expert, params, arrived, local[order], here)
    back = permute(outputs, again, order)
    back = jax.lax.all_to_all(back.reshape(devices, n, -1), ways, 0, 0, tiled=True)
    back = back.reshape(devices * n, -1)
    return jnp.take(back, place, axis=0, mode="fill", fill_value=0)


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
