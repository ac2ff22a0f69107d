"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): state-space duality, one decay per head.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.kernels.dispatch import Impl
from bestiary.kernels.ssd import ssd
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
    ones,
    positive,
    weight,
)
from bestiary.layers.causal_conv import CausalConv, Places, recurrent, recurrent_spec
from bestiary.layers.linear import project, scaled
from bestiary.layers.mamba import inverse_softplus_of_log_uniform, log_of_uniform
from bestiary.layers.sharding import shard


@layer
class Mamba2(Layer):
    """The Mamba-2 mixer [batch, seq, dim] -> the same, of `num_heads` heads.

    Heads shard, and groups do where there are several; every part of the published in_proj is a
    parameter of its own. The cache is constant in length: kernel - 1 inputs of the convolutions,
    and the states. Raises ValueError when `groups` does not divide `num_heads`.
    """

    dim: int
    num_heads: int
    """2 dim / head_dim as published."""
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    """Heads of a group read the same B and C, and are normalised together."""
    mlp: int = 0
    """Channels beside the heads that pass through a gated MLP, silu(z) x."""
    kernel: int = 4
    bias: bool = False
    """Of the projections in and out."""
    conv_bias: bool = True
    activation: Layer = Silu()
    """Behind the convolution."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    norm_before_gate: bool = False
    out_gain: float = 1.0
    """Scales the initial output projection; as published 1 / sqrt(number of layers)."""
    chunk: int = 64
    """Tokens of one matrix product; any gives the same result. The paper's GPUs liked 256."""
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_heads=self.num_heads, head_dim=self.head_dim, state=self.state)
        positive(groups=self.groups, kernel=self.kernel, chunk=self.chunk)
        if self.num_heads % self.groups:
            raise ValueError(f"groups: {self.groups} does not divide num_heads {self.num_heads}")
        if self.mlp < 0:
            raise ValueError(f"mlp: {self.mlp}; need 0 or more")
        low, high = self.dt_limit
        if not 0 <= low < high:
            raise ValueError(f"dt_limit: {self.dt_limit}; need 0 <= lower < upper")

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def group_axis(self) -> str | None:
        return "kv_heads" if self.groups > 1 else None

    def spec(self) -> Tree:
        parts = {
            "z": (self.inner, "heads"),
            "x": (self.inner, "heads"),
            "B": (self.groups * self.state, self.group_axis),
            "C": (self.groups * self.state, self.group_axis),
            "dt": (self.num_heads, "heads"),
        }
        if self.mlp:
            parts |= {"z_mlp": (self.mlp, "mlp"), "x_mlp": (self.mlp, "mlp")}
        spec: Tree = {
            f"in_{name}": weight((self.dim, width), ("embed", axis))
            for name, (width, axis) in parts.items()
        }
        spec |= {f"conv_{name}": conv for name, conv in self.convs.items()}
        spec |= {
            "dt_bias": Param((self.num_heads,), ("heads",), inverse_softplus_of_log_uniform),
            "A_log": Param((self.num_heads,), ("heads",), log_of_uniform(1, 16)),
            "D": Param((self.num_heads,), ("heads",), ones),
            "norm": Param((self.inner,), ("heads",), ones),
            "out": weight((self.inner, self.dim), ("heads", "embed"), gain=self.out_gain),
        }
        if self.mlp:
            spec["out_mlp"] = weight((self.mlp, self.dim), ("mlp", "embed"), gain=self.out_gain)
        if self.bias:
            spec |= {
                f"in_{name}_bias": Param((width,), (axis,)) for name, (width, axis) in parts.items()
            }
            spec["out_bias"] = Param((self.dim,), (None,))
        return spec

    @property
    def convs(self) -> dict[str, CausalConv]:
        """Of x, B and C, together the published convolution."""
        widths = {"x": self.inner, "B": self.groups * self.state, "C": self.groups * self.state}
        return {
            name: CausalConv(
                dim=width,
                kernel=self.kernel,
                bias=self.conv_bias,
                axis="heads" if name == "x" else self.group_axis,
            )
            for name, width in widths.items()
        }

    def cost(self, length: int) -> Cost:
        """Adds the products of the chunks, of which the pairs in the future are not active."""
        chunk = min(self.chunk, length)
        states = 4 * self.inner * self.state
        pair = 2 * (self.groups * self.state + self.inner)
        padded = -(-length // chunk) * chunk / length
        norm = 2 * self.inner
        executed, active = padded * (states + pair * chunk), states + pair * (chunk + 1) / 2
        return super().cost(length) + Cost(executed + norm, active + norm)

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        del length
        shape = (batch, self.num_heads, self.head_dim, self.state)
        state = {name: conv.state_spec(batch, dtype) for name, conv in self.convs.items()}
        state["ssm"] = Param(shape, ("batch", "heads", "head", "state"))
        return recurrent_spec(batch, state)

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        """With a cache, negative `ctx.positions` are padding."""
        y, cache = recurrent(lambda *args: self._mix(params, *args), x, ctx, cache)
        return y, cache, Aux()

    def _mix(self, params: Tree, u: Array, places: Places, state: Tree) -> tuple[Array, Tree]:
        state = {} if state is None else state

        def read(name: str, axis: str | None) -> Array:
            return project("bsd,de->bse", u, params, f"in_{name}", out=("batch", "seq", axis))

        def convolved(name: str, count: int, axis: str | None) -> tuple[Array, Array]:
            v, kept = self.convs[name].apply(
                params[f"conv_{name}"], read(name, axis), places, state.get(name)
            )
            # made once: fused into its readers, the convolution would be repeated in each
            v = jax.lax.optimization_barrier(self.activation.apply({}, v))
            v = v.reshape(*v.shape[:2], count, -1)
            return shard(v, "batch", "seq", axis, None), kept

        new: Tree = {}
        x, new["x"] = convolved("x", self.num_heads, "heads")
        B, new["B"] = convolved("B", self.groups, self.group_axis)
        C, new["C"] = convolved("C", self.groups, self.group_axis)
        dt = jax.nn.softplus(read("dt", "heads").astype(jnp.float32) + params["dt_bias"])
        y, new["ssm"] = ssd(
            x,
            places.of_real(jnp.clip(dt, *self.dt_limit)),
            -jnp.exp(params["A_log"].astype(jnp.float32)),
            B,
            C,
            D=params["D"],
            initial_state=state.get("ssm"),
            documents=places.documents,
            chunk=self.chunk,
            impl=self.impl,
        )
        y = y.reshape(*y.shape[:2], self.inner)
        y = self._norm(params["norm"], y, read("z", "heads"))
        y = project("bse,ed->bsd", y, params, "out")
        if self.mlp:
            h = jax.nn.silu(read("z_mlp", "mlp")) * read("x_mlp", "mlp")
            y += project("bsf,fd->bsd", h, params, "out_mlp")
        return y, new

    def _norm(self, gain: Array, y: Array, z: Array) -> Array:
        """RMSNorm_group(y silu(z)), the statistics in float32, or RMSNorm_group(y) silu(z)."""
        gate, y32 = jax.nn.silu(z.astype(jnp.float32)), y.astype(jnp.float32)
        if not self.norm_before_gate:
            y32 *= gate
        width = self.inner // self.groups
        by_group = y32.reshape(*y.shape[:2], self.groups, width)
        # as a product, which CPUs differentiate several times as fast as a mean
        square = jnp.einsum("bsge,bsge->bsg", by_group, by_group, precision="highest") / width
        y32 *= jnp.repeat(jax.lax.rsqrt(square + self.norm_eps), width, -1)
        y32 = scaled(y32, gain)
        return (y32 * gate if self.norm_before_gate else y32).astype(y.dtype)
