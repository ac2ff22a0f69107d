"""Depth: a block repeated with stacked parameters and scanned, and unlike blocks in sequence.

No layer knows how often it is repeated. Both keep the token-mixer role: (params, x, ctx, cache) ->
(y, cache, Aux).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Tree,
    layer,
    map_params,
    positive,
)
from bestiary.layers.rows import Table

Remat = Literal["none", "full", "dots", "dots_no_batch"]
_POLICIES: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@layer
class Chain(Layer):
    """Layers in sequence, each with parameters of its own: the pattern that `Repeat` repeats."""

    layers: tuple[Layer, ...]

    def spec(self) -> Tree:
        return {str(i): layer for i, layer in enumerate(self.layers)}

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        return {
            str(i): layer.cache_spec(batch, length, dtype) for i, layer in enumerate(self.layers)
        }

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        caches, aux = {}, {}
        for i, member in enumerate(self.layers):
            name = str(i)
            member_ctx = (
                ctx if ctx.key is None else replace(ctx, key=jax.random.fold_in(ctx.key, i))
            )
            x, caches[name], aux[name] = member.apply(
                params[name], x, member_ctx, None if cache is None else cache[name]
            )
            ctx = replace(ctx, shared=ctx.shared | aux[name].shared)
        return x, None if cache is None else caches, Aux.join(**aux)


@layer
class Repeat(Layer):
    """`n` copies of `block`: parameters stacked on a leading `layers` axis, applied by `lax.scan`.

    `constants` are per-layer scalars, one tuple of `n` per name, that the block finds in
    `ctx.layer[name]`. Raises ValueError when a tuple of constants is not `n` long.
    """

    block: Layer
    n: int
    remat: Remat = "none"
    """What backward recomputes: nothing, everything, all but matmuls, all but parameter matmuls."""
    unroll: int = 1
    """How many layers one iteration of the loop holds: n leaves no loop."""
    constants: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        positive(n=self.n, unroll=self.unroll)
        if self.remat not in get_args(Remat):
            raise ValueError(f"remat: {self.remat!r}; need one of {', '.join(get_args(Remat))}")
        for name, values in self.constants:
            if len(values) != self.n:
                raise ValueError(
                    f"constants[{name!r}]: {len(values)} values for {self.n} layers; need one each"
                )

    def spec(self) -> Tree:
        return map_params(lambda p: p.stack(self.n), self.block.declare())

    def cost(self, length: int) -> Cost:
        return self.block.cost(length) * self.n

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        return map_params(lambda p: p.stack(self.n), self.block.cache_spec(batch, length, dtype))

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        constants = {name: jnp.asarray(values, jnp.float32) for name, values in self.constants}
        keys = None if ctx.key is None else jax.random.split(ctx.key, self.n)
        tables = {name: t for name, t in ctx.shared.items() if isinstance(t, Table)}

        def with_accounts(accounts: dict[str, Array]) -> dict[str, Table]:
            return {name: tables[name]._replace(account=a) for name, a in accounts.items()}

        def body(carry: tuple[Array, dict], xs: tuple) -> tuple[tuple[Array, dict], tuple]:
            (x, accounts), (params, cache, key, constants) = carry, xs
            shared = ctx.shared | with_accounts(accounts)
            here = replace(ctx, key=key, layer=ctx.layer | constants, shared=shared)
            y, cache, aux = self.block.apply(params, x, here, cache)
            shared |= aux.shared
            accounts = {name: shared[name].account for name in tables}
            return (y, accounts), (cache, replace(aux, shared={}))

        if self.remat != "none":
            # a loop by itself keeps the recomputation from being merged with the forward pass
            loop = self.unroll < self.n
            body = jax.checkpoint(body, prevent_cse=not loop, policy=_POLICIES[self.remat])
        # of a table the account alone is carried: carried values would be saved for every layer
        start = (x, {name: table.account for name, table in tables.items()})
        xs = (params, cache, keys, constants)
        (x, accounts), (cache, aux) = jax.lax.scan(
            body, start, xs, length=self.n, unroll=min(self.unroll, self.n)
        )
        losses = jax.tree.map(lambda v: v.sum(0), aux.losses)
        return x, cache, Aux(losses, aux.metrics, aux.state, with_accounts(accounts))
