"""Mixture of hidden dimensions (Chen et al. 2024, arXiv 2412.05644): each token uses a part of a
wide hidden state.

The paper released no code. `MoHDFFN` routes the hidden units of a feed-forward, as an unofficial
re-implementation does; `MoHDResidual` routes the residual stream that a sub-layer reads, as the
abstract says. Both take the same gate and the same fusion.
"""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers import balance
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
    map_params,
    positive,
    sum_costs,
    weight,
)
from bestiary.layers.feedforward import HIDDEN, down
from bestiary.layers.sharding import dot

FusionKind = Literal["none", "block", "monarch"]


@layer
class SubDimensions(Layer):
    """Which parts of a width a token uses, and how much of each.

    s = softmax(x C); g = s for the first `num_shared` parts and for the `top_k` best of the others,
    else 0; alpha = num sum(g) restores the magnitude.

    Raises ValueError unless num_shared + top_k is 1 to num.
    """

    dim: int
    num: int
    num_shared: int
    top_k: int
    balance: float = 1e-2
    """Coefficient of the load-balancing loss over the parts that are not shared (the paper's value
    could not be confirmed)."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num=self.num)
        if min(self.num_shared, self.top_k) < 0 or not 0 < self.num_active <= self.num:
            raise ValueError(
                f"num_shared: {self.num_shared} and top_k {self.top_k}; need 0 or more, and 1 to "
                f"num {self.num} together"
            )
        if not self.balance >= 0:
            raise ValueError(f"balance: {self.balance}; need 0 or more")

    @property
    def num_active(self) -> int:
        return self.num_shared + self.top_k

    @property
    def share(self) -> float:
        """Of the width, that a token uses."""
        return self.num_active / self.num

    def spec(self) -> Tree:
        return {"centroids": weight((self.dim, self.num), ("embed", None))}

    def gates(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        """alpha g: [batch, seq, dim] -> float32 [batch, seq, num]."""
        s = self.affinities(params, x)
        special = s[..., self.num_shared :]
        best = jax.lax.top_k(special, self.top_k)[1]
        chosen = (best[..., None] == jnp.arange(special.shape[-1])).any(-2)
        g = jnp.concatenate((s[..., : self.num_shared], jnp.where(chosen, special, 0)), -1)
        alpha = self.num * g.sum(-1, keepdims=True)
        if not 0 < self.top_k < special.shape[-1]:
            return alpha * g, Aux()  # there is nothing to balance
        metrics, losses = balance.load_metrics(balance.counts(chosen, ctx)), {}
        if self.balance:
            # per choice, of which a token has top_k: the re-implementation does not divide by them
            loss = self.top_k * balance.load_balance(special, chosen, ctx)
            losses["load_balance"] = self.balance * loss
        return alpha * g, Aux(losses, metrics)

    def affinities(self, params: Tree, x: Array) -> Array:
        """s: float32 [batch, seq, num]."""
        with jax.default_matmul_precision("highest"):
            return jax.nn.softmax(dot("bsd,dn->bsn", x.astype(jnp.float32), params["centroids"]))


@layer
class Fusion(Layer):
    """Mixes the parts of a width by structured matrices that start as the identity: [batch, seq,
    width] -> the same.

    "block": one matrix per part. "monarch" (Dao et al. 2022): two block-diagonal matrices with the
    transposition of [blocks, block] between them and back after them, as near to square as the
    width's divisors allow. "none": the identity.
    """

    width: int
    kind: FusionKind = "none"
    num: int = 1
    """Parts, for "block"."""

    def __post_init__(self) -> None:
        positive(width=self.width, num=self.num)
        if self.kind not in get_args(FusionKind):
            raise ValueError(f"kind: {self.kind!r}; need one of {', '.join(get_args(FusionKind))}")
        if self.width % self.num:
            raise ValueError(f"num: {self.num}; need a divisor of the width {self.width}")

    @property
    def blocks(self) -> int:
        """Blocks of the first Monarch factor: the largest divisor up to the square root."""
        return next(n for n in range(math.isqrt(self.width), 0, -1) if self.width % n == 0)

    def spec(self) -> Tree:
        def diagonal(blocks: int, size: int) -> Param:
            return Param((blocks, size, size), ("experts", None, None), identity, inputs=1)

        if self.kind == "block":
            return {"block": diagonal(self.num, self.width // self.num)}
        if self.kind == "monarch":
            n, size = self.blocks, self.width // self.blocks
            return {"right": diagonal(n, size), "left": diagonal(size, n)}
        return {}

    def apply(self, params: Tree, x: Array) -> Array:
        if self.kind == "none":
            return x
        parts = self.num if self.kind == "block" else self.blocks
        y = x.reshape(*x.shape[:-1], parts, -1)
        if self.kind == "block":
            y = dot("bsni,nij->bsnj", y, params["block"])
        else:
            y = dot("bsni,nij->bsnj", y, params["right"])
            y = dot("bsnj,jnm->bsmj", y, params["left"])
        return y.reshape(x.shape)


def identity(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)


@layer
class MoHDFFN(Layer):
    """y = act(Fusion(alpha g_i (x W_up)_i)) W_down over the parts i of the hidden width.

    [batch, seq, dim] -> the same. Raises ValueError unless the gate's parts divide the hidden
    width.
    """

    gate: SubDimensions
    hidden: int
    activation: Layer = Silu()
    fusion: FusionKind = "block"
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(hidden=self.hidden)
        _divides(self.gate, hidden=self.hidden)

    @property
    def dim(self) -> int:
        return self.gate.dim

    def spec(self) -> Tree:
        # parts that are off stay 0, unless Monarch's permutation spreads the others over them
        active = self.gate.share
        spread = 1.0 if self.fusion == "monarch" else active
        hidden, dim = self.hidden, self.dim
        return {
            "gate": self.gate,
            "up": weight((dim, hidden), ("embed", "mlp"), active=active),
            "fusion": Fusion(width=hidden, kind=self.fusion, num=self.gate.num),
            "activation": self.activation,
            "down": weight((hidden, dim), ("mlp", "embed"), gain=self.out_gain, active=spread),
        }

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        gates, aux = self.gate.gates(params["gate"], x, ctx)
        u = scaled(dot("bsd,df->bsf", x, params["up"], out=HIDDEN), gates)
        fusion = Fusion(width=self.hidden, kind=self.fusion, num=self.gate.num)
        h = fusion.apply(params["fusion"], u)
        h = self.activation.apply(params["activation"], h)
        y, own = down(h, params, "down", ctx)
        aux = Aux.join(gate=aux)
        return y, replace(aux, metrics=aux.metrics | own.metrics)


@layer
class MoHDResidual(Layer):
    """y = Fusion(f(alpha g_i x_i)) over the parts i of the residual stream: a sub-layer f, token
    mixer or feed-forward, that reads the active part of its input and writes all of its output.

    Of every matrix of f that reads the stream, a token uses the gate's share. Where exactly scale
    and norm stand is not known; here the gate sees what f is given, the normalised stream.

    Raises ValueError unless the gate's parts divide the width.
    """

    gate: SubDimensions
    inner: Layer
    fusion: FusionKind = "monarch"

    def __post_init__(self) -> None:
        _divides(self.gate, dim=self.gate.dim)
        dim = getattr(self.inner, "dim", self.gate.dim)
        if dim != self.gate.dim:
            raise ValueError(f"inner.dim: {dim}; need gate.dim {self.gate.dim}")

    @property
    def dim(self) -> int:
        return self.gate.dim

    def spec(self) -> Tree:
        def read(p: Param) -> Param:
            reads = p.inputs is not None and p.axes[p.batch_ndim] == "embed"
            return replace(p, active=p.active * self.gate.share) if reads else p

        fusion = Fusion(width=self.dim, kind=self.fusion, num=self.gate.num)
        inner = map_params(read, self.inner.declare())
        return {"gate": self.gate, "inner": inner, "fusion": fusion}

    def cost(self, length: int) -> Cost:
        """That of f with fewer active parameters."""
        unread = sum_costs(self.inner.declare(), length) * -1
        return super().cost(length) + self.inner.cost(length) + unread

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        return self.inner.cache_spec(batch, length, dtype)

    def apply(self, params: Tree, x: Array, ctx: Context = Context(), *cache: Tree) -> Any:
        """In the role of f: a token mixer takes a cache and returns it."""
        gates, gate_aux = self.gate.gates(params["gate"], x, ctx)
        y, *cached, aux = self.inner.apply(params["inner"], scaled(x, gates), ctx, *cache)
        fusion = Fusion(width=self.dim, kind=self.fusion, num=self.gate.num)
        y = fusion.apply(params["fusion"], y)
        return y, *cached, Aux.join(gate=gate_aux, inner=aux)


def scaled(x: Array, gates: Array) -> Array:
    """x [batch, seq, width], its parts multiplied by gates [batch, seq, parts]."""
    parts = x.reshape(*gates.shape, -1)
    return (parts * gates[..., None].astype(x.dtype)).reshape(x.shape)


def _divides(gate: SubDimensions, **widths: int) -> None:
    for name, width in widths.items():
        if width % gate.num:
            raise ValueError(f"{name}: {width}; need a multiple of the gate's num {gate.num}")
