"""A mixture of experts that shows the hidden activations of each token's experts to a probe."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Aux, Context, Layer, Tree, map_params
from bestiary.layers.feedforward import nonzero
from bestiary.layers.router import Routing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChosenRows:
    """The last matrix of a mixture as its tokens see it: every token uses other rows."""

    rows: Array
    """[num_experts * hidden, dim]: the matrices of all experts, one below the other."""
    units: Array
    """int32 [batch, seq, top_k * hidden]: the row that each hidden activation multiplies."""


def probed(
    expert: Layer, params: Tree, x: Array, routing: Routing, num_experts: int, ctx: Context
) -> tuple[Array, Aux]:
    """As `masked`, and what it reports of the hidden activations.

    params["probe"] is called as by `feedforward.down`, with the activations of all of a token's
    experts side by side, times the routing weights: the output is the sum of their products with
    the rows of w, here `ChosenRows`. The gate is that of the experts; both are 0 for a choice of
    none. Every expert computes every token.
    """

    def show(h: Array, gate: Array, w: Array, ctx: Context) -> tuple[Array, Tree]:
        del ctx
        return h, {"h": h, "gate": gate, "w": w}

    def see(params: Tree) -> Tree:
        return expert.apply(params | {"probe": show}, x, ctx)[1].metrics

    stacked = {name: params[name] for name in expert.declare()}
    axes = map_params(lambda p: None if p.inputs is None else 0, expert.declare())
    seen = jax.vmap(see, (axes,))(stacked)

    taken = routing.experts < num_experts
    experts = jnp.minimum(routing.experts, num_experts - 1)

    def chosen(values: Array, scale: Array) -> Array:
        """[num_experts, batch, seq, hidden] -> [batch, seq, top_k * hidden]."""
        values = jnp.take_along_axis(jnp.moveaxis(values, 0, 2), experts[..., None], 2)
        return (values * scale[..., None].astype(x.dtype)).reshape(*x.shape[:2], -1)

    hidden = seen["h"].shape[-1]
    units = experts[..., None] * hidden + jnp.arange(hidden)
    w = ChosenRows(seen["w"].reshape(-1, seen["w"].shape[-1]), units.reshape(*x.shape[:2], -1))
    h = chosen(seen["h"], jnp.where(taken, routing.weights, 0))
    h, metrics = params["probe"](h, chosen(seen["gate"], taken), w, ctx)

    batch, seq, _ = jnp.ogrid[: x.shape[0], : x.shape[1], :1]
    spread = jnp.zeros((*x.shape[:2], len(w.rows)), x.dtype).at[batch, seq, w.units].add(h)
    y = jnp.einsum("bsf,fd->bsd", spread, w.rows.astype(x.dtype))
    return y, Aux(metrics=metrics | {"nonzero": nonzero(h, ctx)})
