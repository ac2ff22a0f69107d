"""The feed-forward of the Kolmogorov-Arnold Transformer (Yang & Wang 2024, arXiv 2409.10594), and
how its attention starts."""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Initializer,
    Layer,
    Param,
    Tree,
    layer,
    map_params,
    positive,
)
from bestiary.layers.feedforward import MLP
from bestiary.layers.rational import GroupRational, Start

Init = Literal["paper", "released"]

# 1 / E[F(z)^2] for a standard normal z, which keeps the variance behind F
SQUARED_GAINS: dict[Start, float] = {
    "identity": 1.0,
    "swish": 2.8178205270359653,
    "gelu": 2.3567850379928976,
    "gelu_old": 2.3567850379928976,
}


@layer
class GRKAN(Layer):
    """y = F_2(F_1(x) W_up + b_up) W_down + b_down: [batch, seq, dim] -> the same.

    F_1 and F_2 are group rationals; F_1 starts as the identity, F_2 as `start`. The published
    layer drops out behind both of them; here nothing is dropped.

    Raises ValueError unless the groups divide dim and hidden, and for an unknown init.
    """

    dim: int
    hidden: int
    groups: int = 8
    start: Start = "swish"
    init_as: Init = "paper"
    """"paper": W_up and W_down keep the variance. "released": both have a standard deviation of
    0.02, with which the released code overwrites that, and the checkpoints were trained."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, hidden=self.hidden)
        for name, width in {"dim": self.dim, "hidden": self.hidden}.items():
            if width % self.groups:
                raise ValueError(f"{name}: {width}; need a multiple of the groups {self.groups}")
        if self.init_as not in get_args(Init):
            known = ", ".join(get_args(Init))
            raise ValueError(f"init_as: {self.init_as!r}; need one of {known}")

    @property
    def first(self) -> GroupRational:
        return GroupRational(groups=self.groups, start="identity")

    @property
    def mlp(self) -> MLP:
        """What follows F_1."""
        return MLP(
            dim=self.dim,
            hidden=self.hidden,
            activation=GroupRational(groups=self.groups, start=self.start),
            bias=True,
            out_gain=math.sqrt(SQUARED_GAINS[self.start]),
        )

    def spec(self) -> Tree:
        spec = self.mlp.spec()
        if self.init_as == "released":
            spec = map_params(_as_released, self.mlp.declare())
        return {"first": self.first} | spec

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        return self.mlp.apply(params, self.first.apply(params["first"], x), ctx)


def _as_released(p: Param) -> Param:
    return p if p.inputs is None else replace(p, init=truncated_normal(0.02))


def truncated_normal(std: float, bound: float = 2.0) -> Initializer:
    """Normal, drawn again beyond +-`bound`."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return std * jax.random.truncated_normal(key, -bound / std, bound / std, shape, dtype)

    return init


def kan_mimetic(key: Array, attention: Tree) -> Tree:
    """New projections of one attention layer (Trockman & Kolter 2023, as KAT starts): products of
    a query and a key, or a value and an output, that are near a multiple of the identity.

    W_query W_key^T of a head is 0.7 (Z + I) to rank head_dim, W_value W_out over all heads is
    0.4 (Z - I); Z is uniform with variance 1 / dim. Of each product's singular values both factors
    have the root. `attention` holds query, key and value [dim, heads, head_dim] and out [heads,
    head_dim, dim], as many heads for all and together as wide as dim; the rest of it is kept.
    For a stack of layers, `jax.vmap` over keys and parameters.

    Raises ValueError for fewer heads of keys, or another width.
    """
    dim, heads, head_dim = attention["query"].shape
    kept = attention["key"].shape[1]
    if (kept, heads * head_dim) != (heads, dim):
        raise ValueError(
            f"attention: {heads} heads, {kept} of keys, of {head_dim} channels; need as many of "
            f"keys, and {dim} channels in all"
        )
    keys = jax.random.split(key, heads + 1)
    query_key = jax.vmap(lambda k: _near_identity(k, dim, 0.7, 0.7, head_dim))
    query, key_ = query_key(keys[:-1])
    value, out = _near_identity(keys[-1], dim, 0.4, -0.4, dim)
    new = {
        "query": jnp.moveaxis(query, 0, 1),
        "key": jnp.moveaxis(key_, 0, 1),
        "value": value.reshape(dim, heads, head_dim),
        "out": out.T.reshape(heads, head_dim, dim),
    }
    return attention | {name: x.astype(attention[name].dtype) for name, x in new.items()}


def _near_identity(
    key: Array, dim: int, alpha: float, beta: float, rank: int
) -> tuple[Array, Array]:
    """Two [dim, rank] matrices L and R with L R^T the best of that rank to alpha Z + beta I."""
    bound = math.sqrt(3 / dim)
    z = jax.random.uniform(key, (dim, dim), minval=-bound, maxval=bound)
    u, s, vt = jnp.linalg.svd(alpha * z + beta * jnp.eye(dim))
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, vt[:rank].T * root
