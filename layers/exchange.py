"""Rows that travel to the devices where their experts lie, and their outputs that travel back.

Nothing is ever dropped and no device needs room for all rows of all others: rows travel in rounds
of bounded buffers, as many as the fullest pair of devices needs. Routing that is nearly even over
the devices takes one round, in which every device sends about as many rows as it has.

A "choice" is one expert of one token. This file runs inside `jax.shard_map`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.kernels.dispatch import vary_alike
from bestiary.layers.base import Array, Layer, Tree
from bestiary.layers.grouped import argsort, inverse, permute, through_experts
from bestiary.layers.router import Routing

SPARE = 1.25  # room in a round, over an even share: hundreds of rows scatter by less around theirs
LEAST = 8  # rows that a buffer has room for: fewer save nothing on a TPU, whose tiles have 8


def exchanged(
    expert: Layer,
    params: Tree,
    x: Array,
    routing: Routing,
    num_experts: int,
    ways: tuple[str, ...],
) -> Array:
    """As `weighted_sum`, with the experts spread over the devices of the mesh axes `ways`.

    `params` are those of this device's experts, the first num_experts / devices on the first
    device. Backwards, rows travel again rather than being kept; the gradient has none itself.
    """
    leaves, treedef = jax.tree.flatten(params)
    x, experts, weights, *leaves = vary_alike(x, *routing, *leaves)
    params = jax.tree.unflatten(treedef, leaves)
    return _exchanged(expert, num_experts, ways, params, x, experts, weights)


@dataclass(frozen=True)
class Routes:
    """Where this device's choices go."""

    ways: tuple[str, ...]
    to: Array
    """int32 [choices]: the device of the expert; as many as there are devices: none."""
    order: Array
    """int32 [choices]: the choices, those for the first device first."""
    counts: Array
    """int32 [devices]: choices for each device."""

    @classmethod
    def of(cls, experts: Array, num_experts: int, ways: tuple[str, ...]) -> "Routes":
        """Of choices [choices], `num_experts` being the choice of none."""
        devices = jax.lax.axis_size(ways)
        to = experts // (num_experts // devices)
        return cls(ways, to, argsort(to), jnp.bincount(to, length=devices))

    @property
    def room(self) -> int:
        """Choices that travel from one device to one other in a round."""
        choices, devices = self.to.size, self.counts.size
        return min(choices, max(LEAST, math.ceil(SPARE * choices / devices)))

    @property
    def rounds(self) -> Array:
        """How many it takes until all have travelled, everywhere."""
        everywhere = tuple(jax.typeof(self.counts).manual_axis_type.varying)
        return jax.lax.pmax(-(-self.counts.max() // self.room), everywhere)

    @property
    def starts(self) -> Array:
        return jnp.cumsum(self.counts) - self.counts

    def send(self, values: Array, i: Array, fill: Any = 0) -> Array:
        """Round i's values [tokens or choices, ...] to the devices of their experts; what arrives
        from all of them, [devices * room, ...]. Places left empty hold `fill`."""
        place = i * self.room + jnp.arange(self.room)
        choice = jnp.take(self.order, self.starts[:, None] + place, mode="clip")
        sent = values[choice // (self.to.size // values.shape[0])]
        filled = (place < self.counts[:, None]).reshape(*choice.shape, *(1,) * (sent.ndim - 2))
        return self._travel(jnp.where(filled, sent, fill)).reshape(-1, *values.shape[1:])

    def collect(self, values: Array, i: Array) -> Array:
        """The way back: what `send` delivered, by choice [choices, ...]; 0 for other rounds'."""
        devices, room = self.counts.size, self.room
        values = self._travel(values.reshape(devices, room, *values.shape[1:]))
        values = values.reshape(devices * room, *values.shape[2:])
        place = inverse(self.order) - jnp.take(self.starts, self.to, mode="clip") - i * room
        travelled = (self.to < devices) & (place >= 0) & (place < room)
        index = jnp.where(travelled, self.to * room + place, devices * room)
        return jnp.take(values, index, axis=0, mode="fill", fill_value=0)

    def _travel(self, buffer: Array) -> Array:
        return jax.lax.all_to_all(buffer, self.ways, 0, 0, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchanged(
    expert: Layer,
    num_experts: int,
    ways: tuple[str, ...],
    params: Tree,
    x: Array,
    experts: Array,
    weights: Array,
) -> Array:
    routes, at_experts = _plan(expert, num_experts, ways, experts)
    tokens, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1)

    def add(i: Array, y: Array) -> Array:
        outputs = at_experts(i)(params, routes.send(tokens, i), routes.send(weights, i))
        return y + _by_token(routes.collect(outputs, i), y)

    y = jax.lax.fori_loop(0, routes.rounds, add, _zeros(tokens))
    return y.astype(x.dtype).reshape(x.shape)


def _forward(
    expert: Layer, num_experts: int, ways: tuple[str, ...], *args: Any
) -> tuple[Array, tuple]:
    return _exchanged(expert, num_experts, ways, *args), args


def _backward(
    expert: Layer, num_experts: int, ways: tuple[str, ...], saved: tuple, dy: Array
) -> tuple[Tree, Array, None, Array]:
    params, x, experts, weights = saved
    routes, at_experts = _plan(expert, num_experts, ways, experts)
    tokens, flat, dy = x.reshape(-1, x.shape[-1]), weights.reshape(-1), dy.reshape(-1, x.shape[-1])

    def add(i: Array, sums: tuple[Tree, Array, Array]) -> tuple[Tree, Array, Array]:
        d_params, dx, d_weights = sums
        _, pull = jax.vjp(at_experts(i), params, routes.send(tokens, i), routes.send(flat, i))
        more, d_rows, d_flat = pull(routes.send(dy, i))
        return (
            jax.tree.map(jnp.add, d_params, more),
            dx + _by_token(routes.collect(d_rows, i), dx),
            d_weights + routes.collect(d_flat, i),
        )

    sums = jax.tree.map(jnp.zeros_like, params), _zeros(tokens), jnp.zeros_like(flat)
    d_params, dx, d_weights = jax.lax.fori_loop(0, routes.rounds, add, sums)
    return d_params, dx.astype(x.dtype).reshape(x.shape), None, d_weights.reshape(weights.shape)


_exchanged.defvjp(_forward, _backward)


def _plan(
    expert: Layer, num_experts: int, ways: tuple[str, ...], experts: Array
) -> tuple[Routes, Callable[[Array], Callable[..., Array]]]:
    """The routes, and what this device does in round i with the rows [n, dim] and weights [n] that
    arrive: (params, rows, weights) -> the experts' outputs, times the weights."""
    routes = Routes.of(experts.reshape(-1), num_experts, ways)
    here = num_experts // routes.counts.size

    def at_experts(i: Array) -> Callable[..., Array]:
        arrived = routes.send(experts.reshape(-1) % here, i, fill=here)
        order = argsort(arrived)
        back = inverse(order)

        def compute(params: Tree, rows: Array, weights: Array) -> Array:
            rows = permute(rows, order, back)
            outputs = through_experts(expert, params, rows, arrived[order], here)
            return permute(outputs, back, order) * weights[:, None].astype(rows.dtype)

        return compute

    return routes, at_experts


def _zeros(tokens: Array) -> Array:
    """What is summed over choices and rounds is summed in float32, and differs as the tokens do."""
    return jnp.zeros_like(tokens, jnp.float32)


def _by_token(values: Array, like: Array) -> Array:
    """Sums over the choices of every token: [choices, dim] -> shaped as `like` [tokens, dim]."""
    return values.reshape(len(like), -1, like.shape[-1]).astype(like.dtype).sum(1)
