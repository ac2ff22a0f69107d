"""Mamba (Gu & Dao 2023, arXiv 2312.00752): a selective state space in every channel.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp

from bestiary.kernels.dispatch import Impl
from bestiary.kernels.selective_scan import selective_scan
from bestiary.kernels.selective_scan.reference import Method
from bestiary.layers.activations import Silu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Initializer,
    Layer,
    Param,
    Tree,
    layer,
    ones,
    positive,
    weight,
)
from bestiary.layers.causal_conv import CausalConv, Places, recurrent, recurrent_spec
from bestiary.layers.feedforward import HIDDEN
from bestiary.layers.linear import project


@layer
class Mamba(Layer):
    """The Mamba mixer [batch, seq, dim] -> the same: `inner` channels with `state` states each.

    The cache is constant in length: kernel - 1 inputs of the convolution, and the states. The scan
    is float32 whatever the type of x.
    """

    dim: int
    inner: int
    """Channels; 2 dim as published."""
    state: int = 16
    dt_rank: int
    """Width through which dt is projected; ceil(dim / 16) as published."""
    kernel: int = 4
    bias: bool = False
    """Of the projections in and out."""
    conv_bias: bool = True
    activation: Layer = Silu()
    """Behind the convolution and of the gate."""
    out_gain: float = 1.0
    """Scales the initial output projection; as published 1 / sqrt(number of layers)."""
    chunk: int = 64
    """Tokens whose states exist at a time; any gives the same result."""
    method: Method = "sequential"
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        positive(dim=self.dim, inner=self.inner, state=self.state, dt_rank=self.dt_rank)
        positive(kernel=self.kernel, chunk=self.chunk)
        if self.method not in get_args(Method):
            raise ValueError(f"method: {self.method!r}; need one of {', '.join(get_args(Method))}")

    def spec(self) -> Tree:
        to_hidden, from_hidden = ("embed", "mlp"), ("mlp", None)
        states = (self.inner, self.state)
        spec: Tree = {
            "x": weight((self.dim, self.inner), to_hidden),
            "z": weight((self.dim, self.inner), to_hidden),
            "conv": self.conv,
            "dt_down": weight((self.inner, self.dt_rank), from_hidden),
            "B": weight(states, from_hidden),
            "C": weight(states, from_hidden),
            "dt": weight((self.dt_rank, self.inner), (None, "mlp")),
            "dt_bias": Param((self.inner,), ("mlp",), inverse_softplus_of_log_uniform),
            "A_log": Param(states, ("mlp", None), _log_of_1_to_n, decay=False),
            "D": Param((self.inner,), ("mlp",), ones),
            "out": weight((self.inner, self.dim), ("mlp", "embed"), gain=self.out_gain),
        }
        if self.bias:
            spec |= {f"{name}_bias": Param((self.inner,), ("mlp",)) for name in "xz"}
            spec["out_bias"] = Param((self.dim,), (None,))
        return spec

    @property
    def conv(self) -> CausalConv:
        return CausalConv(dim=self.inner, kernel=self.kernel, bias=self.conv_bias)

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        del length
        ssm = Param((batch, self.inner, self.state), ("batch", "mlp", None))
        state = {"conv": self.conv.state_spec(batch, dtype), "ssm": ssm}
        return recurrent_spec(batch, state)

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        """With a cache, negative `ctx.positions` are padding."""

        def mix(u: Array, places: Places, state: Tree) -> tuple[Array, Tree]:
            state = {"conv": None, "ssm": None} if state is None else state
            x = project("bsd,de->bse", u, params, "x", out=HIDDEN)
            z = project("bsd,de->bse", u, params, "z", out=HIDDEN)
            x, conv = self.conv.apply(params["conv"], x, places, state["conv"])
            x = self.activation.apply({}, x)
            dt = project("bsr,re->bse", project("bse,er->bsr", x, params, "dt_down"), params, "dt")
            dt = jax.nn.softplus(dt.astype(jnp.float32))
            B = project("bse,en->bsn", x, params, "B")
            C = project("bse,en->bsn", x, params, "C")
            A = -jnp.exp(params["A_log"].astype(jnp.float32))
            y, ssm = selective_scan(
                x,
                places.of_real(dt),
                A,
                B[:, :, None],
                C[:, :, None],
                D=params["D"],
                initial_state=state["ssm"],
                documents=places.documents,
                chunk=self.chunk,
                method=self.method,
                impl=self.impl,
            )
            y = project("bse,ed->bsd", y * self.activation.apply({}, z), params, "out")
            return y, {"conv": conv, "ssm": ssm}

        y, cache = recurrent(mix, x, ctx, cache)
        return y, cache, Aux()


def inverse_softplus_of_log_uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """The bias of dt: softplus of it is log-uniform in 0.001 to 0.1."""
    low, high = math.log(1e-3), math.log(0.1)
    t = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high)), 1e-4)
    return (t + jnp.log(-jnp.expm1(-t))).astype(dtype)


def log_of_uniform(low: float, high: float) -> Initializer:
    """Of a decay's A_log: A is uniform."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high)).astype(dtype)

    return init


def _log_of_1_to_n(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[-1] + 1)), shape).astype(dtype)
