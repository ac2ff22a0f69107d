"""Tokens sorted by expert, so that each is computed by its experts alone, on one device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bestiary.kernels.dispatch import vary_alike
from bestiary.kernels.grouped_dot import grouped_dot
from bestiary.layers.base import Array, Layer, Tree, is_param
from bestiary.layers.router import Routing
from bestiary.layers.sharding import use_rules


@dataclass(frozen=True)
class Grouped:
    """Stacked matrices that stand for one: row i of a product takes the matrix of its group."""

    w: Array
    sizes: Array

    def contract(self, equation: str, x: Array) -> Array:
        """[1, rows, D] by [D, F], whatever the axes are called."""
        del equation
        return grouped_dot(x[0], self.w.astype(x.dtype), self.sizes)[None]


def through_experts(
    expert: Layer, params: Tree, rows: Array, experts: Array, num_experts: int
) -> Array:
    """rows [n, dim], sorted by expert, through their experts; those of none give zeros."""
    sizes = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
    grouped = jax.tree.map(
        lambda p, w: w if p.inputs is None else Grouped(w, sizes),
        expert.declare(),
        params,
        is_leaf=is_param,
    )
    with use_rules({}):  # within one device there is nothing to place
        return expert.apply(grouped, rows[None])[0][0]


def weighted_sum(
    expert: Layer, params: Tree, x: Array, routing: Routing, num_experts: int
) -> Array:
    """The experts' weighted sum for this device's tokens [batch, seq, dim]."""
    k = routing.experts.shape[-1]
    experts = routing.experts.reshape(-1)
    order = argsort(experts)  # "none" comes last
    back = inverse(order)
    copies = jnp.repeat(x.reshape(-1, x.shape[-1]), k, 0)
    rows = permute(copies, order, back)
    outputs = through_experts(expert, params, rows, experts[order], num_experts)
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
