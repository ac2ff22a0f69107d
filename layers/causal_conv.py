"""The causal depthwise convolution of recurrent mixers, and what their states need to know of
documents and padding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Context, Layer, Param, Tree, constant, layer, positive
from bestiary.layers.linear import scaled

Mix = Callable[[Array, "Places", Tree], tuple[Array, Tree]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """What a recurrent mixer knows of the tokens [batch, seq] that it reads."""

    documents: Array
    """int32 [batch, seq]: how many documents began in this call; 0 continues what is cached."""
    real: Array | None = None
    """bool [batch, seq]: False for padding, which comes last; None: there is none."""

    def of_real(self, x: Array) -> Array:
        """x [batch, seq, ...] with 0 at padding."""
        if self.real is None:
            return x
        return jnp.where(jnp.expand_dims(self.real, range(2, x.ndim)), x, 0)


def recurrent(mix: Mix, x: Array, ctx: Context, cache: Tree) -> tuple[Array, Tree]:
    """Runs a recurrence over x [batch, seq, dim], document by document, padding left out.

    `mix(x, places, state) -> (y, state)` reads real tokens first and padding behind them, whose
    output does not matter; `state` is None where nothing is cached. The cache is {"segment",
    "state"}, as `recurrent_spec` declares it; without `ctx.segment_ids` its document goes on.
    """
    if cache is None:
        segments = jnp.zeros(x.shape[:2], jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
        return mix(x, Places(_starts(segments, segments[:, :1], True)), None)[0], None
    before = cache["segment"][:, None]
    segments = ctx.segment_ids
    segments = jnp.broadcast_to(before, x.shape[:2]) if segments is None else segments
    positions = jnp.zeros(x.shape[:2], jnp.int32) if ctx.positions is None else ctx.positions
    real = jnp.broadcast_to(positions >= 0, x.shape[:2])
    order = jnp.argsort(~real, axis=1, stable=True)
    x, real, segments = (_take(v, order) for v in (x, real, segments))
    y, state = mix(x, Places(_starts(segments, before, real), real), cache["state"])
    count = real.sum(1, keepdims=True)
    segment = jnp.take_along_axis(jnp.concatenate((before, segments), 1), count, 1)[:, 0]
    return _take(y, jnp.argsort(order, axis=1)), {"segment": segment, "state": state}


def recurrent_spec(batch: int, state: Tree) -> Tree:
    """Declares the cache of `recurrent`: the last token's segment int32 [batch], and `state`."""
    return {"segment": Param((batch,), ("batch",), constant(-1), jnp.int32), "state": state}


@layer
class CausalConv(Layer):
    """Every channel's own filter over the past, y_t = b + sum_k w_k x_{t-K+1+k}: [batch, seq, dim]
    -> (the same, the inputs that the next token needs).

    The last tap meets the token itself. Tokens of other documents count as 0.
    """

    dim: int
    kernel: int = 4
    bias: bool = True
    axis: str | None = "mlp"
    """The logical name of the channels."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, kernel=self.kernel)

    def spec(self) -> Tree:
        def uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            bound = self.kernel**-0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        spec = {"weight": Param((self.kernel, self.dim), (None, self.axis), uniform)}
        if self.bias:
            spec["bias"] = Param((self.dim,), (self.axis,), uniform)
        return spec

    def state_spec(self, batch: int, dtype: Any) -> Param:
        """The kernel - 1 inputs before a token, [batch, kernel - 1, dim]."""
        return Param((batch, self.kernel - 1, self.dim), ("batch", None, self.axis), dtype=dtype)

    def apply(
        self, params: Tree, x: Array, places: Places | None = None, state: Array | None = None
    ) -> tuple[Array, Array]:
        """`state` None: nothing came before."""
        past, length = self.kernel - 1, x.shape[1]
        places = Places(jnp.zeros(x.shape[:2], jnp.int32)) if places is None else places
        if state is None:
            state = jnp.zeros((x.shape[0], past, self.dim), x.dtype)
        window = jnp.concatenate((state.astype(x.dtype), x), 1)
        documents = jnp.pad(places.documents, ((0, 0), (past, 0)))
        weight = params["weight"]
        y = scaled(x, weight[-1])
        for k in range(past):
            same = documents[:, k : k + length] == places.documents
            y += jnp.where(same[..., None], scaled(window[:, k : k + length], weight[k]), 0)
        if self.bias:
            y += params["bias"].astype(y.dtype)
        # what is kept belongs to the last real token's document
        first = length if places.real is None else places.real.sum(1, keepdims=True)
        index = jnp.broadcast_to(first + jnp.arange(past), (x.shape[0], past))
        same = _take(documents, index) == places.documents[:, -1:]
        return y, jnp.where(same[..., None], _take(window, index), 0).astype(state.dtype)


def _starts(segments: Array, before: Array, real: Array | bool) -> Array:
    """How many documents began, of segments [batch, seq] behind one of `before` [batch, 1]."""
    previous = jnp.concatenate((before, segments[:, :-1]), 1)
    return jnp.cumsum((segments != previous) & real, 1, dtype=jnp.int32)


def _take(x: Array, index: Array) -> Array:
    """x [batch, seq, ...] at places [batch, n]."""
    return jnp.take_along_axis(x, jnp.expand_dims(index, range(2, x.ndim)), 1)
