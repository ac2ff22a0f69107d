"""Mixture of experts: router, experts, and three equal ways to bring them together.

Feed-forward role: (params, x, ctx) -> (y, Aux).
"""

from dataclasses import replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers import balance
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Tree,
    layer,
    map_params,
    params_of,
)
from bestiary.layers.expert_parallel import expert_parallel
from bestiary.layers.grouped import weighted_sum
from bestiary.layers.probed import probed
from bestiary.layers.router import Router, Routing

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
        parts = {"router": replace(aux, metrics=metrics)}
        operands = (self.expert, params["experts"], x, routing, self.router.num_experts, ctx)
        if "probe" in params["experts"]:
            y, parts["experts"] = probed(*operands)
        else:
            y = (masked if self.path == "masked" else sorted_by_expert)(*operands)
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

    A probe beside the experts sees nothing here.
    """
    del ctx
    params = {name: params[name] for name in expert.declare()}
    mesh = jax.sharding.get_abstract_mesh()
    one_device = mesh.size <= 1 or mesh.manual_axes
    combine = weighted_sum if one_device else expert_parallel
    return combine(expert, params, x, routing, num_experts)
