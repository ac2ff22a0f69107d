"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464), in the form of Qwen3-Next.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Tree,
    layer,
    positive,
    weight,
)
from bestiary.layers.causal_conv import CausalConv, Places, recurrent, recurrent_spec
from bestiary.layers.linear import project
from bestiary.layers.linear_attention import (
    STATE,
    Documents,
    by_chunks,
    chunk_of,
    power_of_two,
    product,
)
from bestiary.layers.mamba import inverse_softplus_of_log_uniform, log_of_uniform
from bestiary.layers.norms import RMSNorm
from bestiary.layers.sharding import shard


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    beta: Array,
    state: Array | None = None,
    documents: Array | None = None,
    *,
    chunk: int = 64,
) -> tuple[Array, Array]:
    """S_t = exp(decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and y_t = S_t^T q_t, in
    every head.

    In a chunk, what every token writes once the earlier ones are known solves one triangular
    system (the WY form, section 3.3). Decays, that system and states are float32, other products of
    the type of q. Backward keeps the states between chunks only.

    Args:
      q, k: [batch, length, heads, n]; keys of length 1 keep the state bounded.
      v: [batch, length, heads, p].
      decay: float32 [batch, length, heads], at most 0.
      beta: [batch, length, heads], in 0 to 1; 0 writes nothing.
      state: float32 [batch, heads, n, p], of document 0; None: zeros.
      documents: int32 [batch, length], not falling along a row; None: all are 0. Others begin from
        zeros, and no bit of a document depends on another.
      chunk: tokens of one step, a power of two; any gives the same result.

    Returns:
      float32 y [batch, length, heads, p], and the last state.
    """
    if state is None:
        state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), jnp.float32)
    return by_chunks(_step, state, (q, k, v, decay, beta), documents, chunk)


def _step(state: Array, rows: tuple[Array, ...], documents: Documents) -> tuple[Array, Array]:
    q, k, v, decay, beta = rows
    dot, beta = partial(product, dtype=q.dtype), beta.astype(jnp.float32)[..., None]
    same = documents.number[..., :, None] == documents.number[..., None, :]
    # [i, j]: the decay after j up to i
    later = jnp.tril(jnp.ones(same.shape[-2:], bool), -1)
    between = jnp.exp(jnp.cumsum(jnp.where(later, decay[..., :, None], 0), -2))
    between = jnp.where(jnp.tril(same), between, 0)
    before = jnp.where(documents.enters, jnp.exp(jnp.cumsum(decay, -1)), 0)[..., None]

    written = beta * (v - before * dot(k, state))
    written = _inverse(beta * jnp.tril(between, -1) * dot(k, k.mT)) @ written
    y = before * dot(q, state) + dot(between * dot(q, k.mT), written)
    left = between[..., -1, :, None] * k
    return before[..., -1:, :] * state + dot(left.mT, written), y


def _inverse(lower: Array) -> Array:
    """(I + lower)^-1 of strictly lower triangles whose width is a power of two, by halves: stable
    as substitution is, in matrix products."""
    half = lower.shape[-1] // 2
    if not half:
        return jnp.ones_like(lower)
    across = lower[..., half:, :half]
    first, second = _inverse(jnp.stack((lower[..., :half, :half], lower[..., half:, half:])))
    multiply = partial(jnp.matmul, precision="highest")
    across = -multiply(multiply(second, across), first)
    return jnp.block([[first, jnp.zeros_like(first)], [across, second]])


@layer
class GatedDeltaNet(Layer):
    """Gated DeltaNet [batch, seq, dim] -> the same: states that a key replaces its value in.

    q, k and v pass a short convolution and silu, q and k are then of length 1; with alpha =
    exp(-exp(A_log) softplus(x W_decay + dt_bias)) and beta = sigmoid(x W_beta) the delta rule gives
    o, and y = (RMSNorm(o) silu(x W_gate)) W_out. The cache is constant in length: kernel - 1 inputs
    of the convolutions, and the states. Raises ValueError when `num_key_heads` does not divide
    `num_heads` or `chunk` is not a power of two.
    """

    dim: int
    num_heads: int
    """Of values, gates and states."""
    num_key_heads: int
    """Of queries and keys; consecutive heads read the same."""
    key_dim: int
    """Of a head."""
    value_dim: int
    """Of a head."""
    kernel: int = 4
    activation: Layer = Silu()
    """Behind the convolution."""
    norm_eps: float = 1e-6
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""
    chunk: int = 64
    """Tokens of one step; any gives the same result."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_heads=self.num_heads, num_key_heads=self.num_key_heads)
        positive(key_dim=self.key_dim, value_dim=self.value_dim, kernel=self.kernel)
        if self.num_heads % self.num_key_heads:
            raise ValueError(
                f"num_key_heads: {self.num_key_heads} does not divide num_heads {self.num_heads}"
            )
        power_of_two(self.chunk)

    def spec(self) -> Tree:
        values = self.num_heads * self.value_dim
        spec: Tree = {
            name: weight((self.dim, conv.dim), ("embed", conv.axis))
            for name, conv in self.convs.items()
        }
        spec |= {f"{name}_conv": conv for name, conv in self.convs.items()}
        per_head = ("embed", "heads")
        return spec | {
            "decay": weight((self.dim, self.num_heads), per_head),
            "dt_bias": Param((self.num_heads,), ("heads",), inverse_softplus_of_log_uniform),
            "A_log": Param((self.num_heads,), ("heads",), log_of_uniform(0.01, 16)),
            "beta": weight((self.dim, self.num_heads), per_head),
            "gate": weight((self.dim, values), per_head),
            "norm": self.norm,
            "out": weight((values, self.dim), ("heads", "embed"), gain=self.out_gain),
        }

    @property
    def convs(self) -> dict[str, CausalConv]:
        """Of queries, keys and values, together the published convolution."""
        keys, values = self.num_key_heads * self.key_dim, self.num_heads * self.value_dim
        conv = partial(CausalConv, kernel=self.kernel, bias=False)
        return {
            "query": conv(dim=keys, axis="kv_heads"),
            "key": conv(dim=keys, axis="kv_heads"),
            "value": conv(dim=values, axis="heads"),
        }

    @property
    def norm(self) -> RMSNorm:
        return RMSNorm(dim=self.value_dim, eps=self.norm_eps)

    def cost(self, length: int) -> Cost:
        """Adds the products of the chunks, of which the pairs in the future are not active."""
        chunk, n, p = chunk_of(length, self.chunk), self.key_dim, self.value_dim
        states, pair, inverse = 6 * n * p, 4 * (n + p), 2 * (chunk**2 - 1) / 3
        padded = -(-length // chunk) * chunk / length
        executed = padded * (states + pair * chunk + inverse)
        active = states + pair * (chunk + 1) / 2 + inverse
        return super().cost(length) + Cost(executed, min(active, executed)) * self.num_heads

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        del length
        shape = (batch, self.num_heads, self.key_dim, self.value_dim)
        state = {name: conv.state_spec(batch, dtype) for name, conv in self.convs.items()}
        return recurrent_spec(batch, state | {"kv": Param(shape, STATE)})

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        """With a cache, negative `ctx.positions` are padding."""
        y, cache = recurrent(partial(self._mix, params), x, ctx, cache)
        return y, cache, Aux()

    def _mix(self, params: Tree, x: Array, places: Places, state: Tree) -> tuple[Array, Tree]:
        state, new = {} if state is None else state, {}

        def read(name: str, axis: str | None = "heads") -> Array:
            return project("bsd,de->bse", x, params, name, out=("batch", "seq", axis))

        def by_head(u: Array, heads: int, axis: str | None = "heads") -> Array:
            return shard(u.reshape(*u.shape[:2], heads, -1), "batch", "seq", axis, None)

        def convolved(name: str, heads: int) -> Array:
            conv, kept = self.convs[name], state.get(name)
            u = read(name, conv.axis)
            u, new[name] = conv.apply(params[f"{name}_conv"], u, places, kept)
            return by_head(self.activation.apply({}, u), heads, conv.axis)

        def of_length_one(u: Array) -> Array:
            u32 = u.astype(jnp.float32)
            u32 *= jax.lax.rsqrt(jnp.square(u32).sum(-1, keepdims=True) + 1e-6)
            return jnp.repeat(u32.astype(u.dtype), self.num_heads // self.num_key_heads, 2)

        q, k = (of_length_one(convolved(name, self.num_key_heads)) for name in ("query", "key"))
        v = convolved("value", self.num_heads)
        dt = jax.nn.softplus(read("decay").astype(jnp.float32) + params["dt_bias"])
        decay = -jnp.exp(params["A_log"].astype(jnp.float32)) * dt
        beta = jax.nn.sigmoid(read("beta").astype(jnp.float32))
        o, new["kv"] = delta_rule(
            q * self.key_dim**-0.5,
            k,
            v,
            places.of_real(decay),
            places.of_real(beta),
            state.get("kv"),
            places.documents,
            chunk=self.chunk,
        )
        o = self.norm.apply(params["norm"], o.astype(x.dtype))
        gate = jax.nn.silu(by_head(read("gate"), self.num_heads))
        o = (o * gate).reshape(*x.shape[:2], -1)
        return project("bse,ed->bsd", o, params, "out"), new
