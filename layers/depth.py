"""Mixture of depths: blocks that only some tokens of a sequence pass (Raposo et al. 2024, arXiv
2404.02258).

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

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
    weight,
)
from bestiary.layers.sharding import dot


@layer
class MixtureOfDepths(Layer):
    """y = x + r (block(x) - x) for the tokens with the largest r = x w of their sequence, y = x for
    the others: [batch, seq, dim] -> the same.

    Who passes depends on later tokens. A loss trains the sign of r to say it from the token (the
    paper's section 3.5), and decoding lets those with r > 0 pass; only they enter the block's
    cache. Raises ValueError for a capacity outside (0, 1].
    """

    dim: int
    block: Layer
    capacity: float = 0.125
    """Share of a sequence that passes."""
    predict: float = 0.01
    """Coefficient of the loss that makes the sign of r tell who passes."""

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity: {self.capacity}; need 0 < capacity <= 1")

    def spec(self) -> Tree:
        def part(p: Param) -> Param:
            return replace(p, active=p.active * self.capacity)

        block = map_params(part, self.block.declare())
        return {"router": weight((self.dim, 1), ("embed", None)), "block": block}

    def passing(self, length: int) -> int:
        """How many tokens of a sequence pass."""
        return math.ceil(self.capacity * length)

    def cost(self, length: int) -> Cost:
        """The block's, over the tokens that pass and at their length."""
        passing = self.passing(length)
        inside = self.block.cost(passing) * (passing / length)
        stored = self.block.cost(length).bytes
        return self.spec()["router"].cost() + replace(inside, bytes=stored)

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        return self.block.cache_spec(batch, length, dtype)

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        r = dot("bsd,do->bso", x.astype(jnp.float32), params["router"])[..., 0]
        positions = jnp.arange(x.shape[1])[None] if ctx.positions is None else ctx.positions
        positions = jnp.broadcast_to(positions, r.shape)
        if cache is not None:  # who does not pass is padding to the block
            here = replace(ctx, positions=jnp.where(r > 0, positions, -1))
            y, cache, aux = self.block.apply(params["block"], x, here, cache)
            gate = jnp.maximum(r, 0)[..., None].astype(x.dtype)
            return x + gate * (y - x), cache, Aux.join(block=aux)
        _, best = jax.lax.top_k(jnp.where(ctx.real(r), r, -jnp.inf), self.passing(x.shape[1]))
        best = jnp.sort(best)  # in the order of the sequence

        def of_the_best(v: Array | None) -> Array | None:
            return None if v is None else jnp.take_along_axis(v, best, 1)

        here = replace(
            ctx,
            positions=of_the_best(positions),
            segment_ids=of_the_best(ctx.segment_ids),
            tokens=of_the_best(ctx.tokens),
        )
        inside = jnp.take_along_axis(x, best[..., None], 1)
        y, _, aux = self.block.apply(params["block"], inside, here)
        gate = jnp.take_along_axis(r, best, 1)[..., None].astype(x.dtype)
        rows = jnp.arange(x.shape[0])[:, None]
        passes = jnp.zeros(r.shape).at[rows, best].set(1.0)
        entropy = jax.nn.softplus(r) - passes * r  # of sigmoid(r), by which the token tells
        losses = {"depth": self.predict * ctx.mean(entropy)} if self.predict else {}
        predicted = ctx.mean((r > 0) == (passes > 0))
        aux = Aux(losses, {"predicted": predicted}) | Aux.join(block=aux)
        return x.at[rows, best].add(gate * (y - inside)), None, aux
