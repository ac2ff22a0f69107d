"""Spark Transformer (You et al. 2025, arXiv 2506.06644): sparse feed-forward and attention.

Part of each projection predicts which entries matter; a mean and a standard deviation, not a sort,
give the threshold that keeps about k of them (statistical top-k).
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bestiary.kernels.attention import visible
from bestiary.kernels.attention.masks import seen_keys
from bestiary.kernels.dispatch import Impl
from bestiary.kernels.stat_topk_glu import normal_quantile, stat_topk_glu
from bestiary.layers.attention import Attention
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Tree,
    layer,
    positive,
    weight,
)
from bestiary.layers.feedforward import HIDDEN, down
from bestiary.layers.sharding import dot, pspec

GateActivation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@layer
class SparkFFN(Layer):
    """y = (gelu(STopK(x_1 K1)) * (x_2 K2)) V with x_1 the first `predictor_dim` channels of x.

    About `top_k` of the `hidden` units are non-zero. Parameters: 2 dim hidden, so hidden is 1.5
    times that of a gated layer of equal size.

    Raises ValueError when predictor_dim is not inside the width or top_k not inside hidden.
    """

    dim: int
    hidden: int
    predictor_dim: int
    top_k: int
    ddof: Literal[0, 1] = 0
    """0: population standard deviation (Gemma 3n); 1: sample standard deviation."""
    activation: GateActivation = "gelu_tanh"
    impl: Impl = "auto"
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, hidden=self.hidden)
        if not 0 < self.predictor_dim < self.dim:
            raise ValueError(
                f"predictor_dim: {self.predictor_dim}; need 1 to {self.dim - 1} of dim"
            )
        if not 0 < self.top_k <= self.hidden:
            raise ValueError(f"top_k: {self.top_k}; need 1 to hidden {self.hidden}")

    def spec(self) -> Tree:
        r, active = self.predictor_dim, self.top_k / self.hidden
        wide = ("embed", "mlp")
        return {
            "predictor": weight((r, self.hidden), wide),
            "value": weight((self.dim - r, self.hidden), wide, active=active),
            "out": weight((self.hidden, self.dim), wide[::-1], gain=self.out_gain, active=active),
        }

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        r = self.predictor_dim
        scores = dot("bsd,df->bsf", x[..., :r], params["predictor"], out=HIDDEN)
        values = dot("bsd,df->bsf", x[..., r:], params["value"], out=HIDDEN)
        glu = partial(
            stat_topk_glu,
            scores,
            quantile=normal_quantile(self.top_k, self.hidden),
            ddof=self.ddof,
            activation=self.activation,
            spec=pspec(*HIDDEN),
            impl=self.impl,
        )
        return down(glu(values), params, "out", ctx, lambda: glu(jnp.ones_like(values)))


@layer
class GaussianGLU(Layer):
    """Gemma 3n's form: y = (gelu(STopK(x W_gate)) * x W_up) W_down, the whole width predicting.

    About 1 - `sparsity` of the hidden units are non-zero; 0 leaves the gate dense. A per-layer
    schedule comes as the repeat's constant "sparsity" and replaces the field.
    """

    dim: int
    hidden: int
    sparsity: float = 0.95
    ddof: Literal[0, 1] = 0
    activation: GateActivation = "gelu_tanh"
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        positive(dim=self.dim, hidden=self.hidden)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: {self.sparsity}; need 0 <= sparsity < 1")

    def spec(self) -> Tree:
        active = 1 - self.sparsity
        return {
            "gate": weight((self.dim, self.hidden), ("embed", "mlp")),
            "up": weight((self.dim, self.hidden), ("embed", "mlp"), active=active),
            "down": weight((self.hidden, self.dim), ("mlp", "embed"), active=active),
        }

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        gate = dot("bsd,df->bsf", x, params["gate"], out=HIDDEN)
        up = dot("bsd,df->bsf", x, params["up"], out=HIDDEN)
        sparsity = ctx.layer["sparsity"] if "sparsity" in ctx.layer else jnp.float32(self.sparsity)
        glu = partial(
            stat_topk_glu,
            gate,
            quantile=jax.scipy.special.ndtri(sparsity),  # -inf at 0: no threshold
            ddof=self.ddof,
            activation=self.activation,
            spec=pspec(*HIDDEN),
            impl=self.impl,
        )
        return down(glu(up), params, "down", ctx, lambda: glu(jnp.ones_like(up)))


@layer
class SparkAttention(Attention):
    """Attention over about `top_k` keys per query, weighed by softmax(TopK(s1)) * softplus(s2).

    s1 = q_1 k_1 over the first `predictor_dim` channels of a head, s2 = q_2 k_2 over the rest, each
    part rotated by itself. A query that sees n > top_k keys drops those below mean + std Q(1 - k/n)
    of s1 over these n; its best key always stays. The product is not renormalised.

    The scales and the absence of a soft-cap are this library's defaults: the paper's could not be
    confirmed. Raises ValueError for options that the paper does not combine with it.
    """

    predictor_dim: int
    top_k: int
    ddof: Literal[0, 1] = 1
    predictor_scale: float | None = None
    """Multiplies s1; None: predictor_dim ** -0.5."""
    value_scale: float | None = None
    """Multiplies s2; None: (head_dim - predictor_dim) ** -0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.predictor_dim < self.head_dim:
            raise ValueError(
                f"predictor_dim: {self.predictor_dim}; need 1 to {self.head_dim - 1} of head_dim"
            )
        positive(top_k=self.top_k)
        if self.rope:
            self.rope.frequencies(self.predictor_dim)
            self.rope.frequencies(self.head_dim - self.predictor_dim)
        for name, value in (("softcap", self.softcap), ("scale", self.scale)):
            if value is not None:
                raise ValueError(f"{name}: {value}; Spark attention takes none")
        if self.sinks:
            raise ValueError("sinks: True; Spark attention takes none")

    def cost(self, length: int) -> Cost:
        """Every seen key is scored by the predictor; only the kept ones need s2 and the values."""
        rest, pattern = 2 * self.head_dim - self.predictor_dim, self.pattern
        seen, kept = seen_keys(pattern, length), seen_keys(pattern, length, self.top_k)
        executed = (self.predictor_dim + rest) * length
        active = self.predictor_dim * seen + rest * kept
        heads = 2 * self.num_heads
        return Layer.cost(self, length) + Cost(heads * executed, heads * active)

    def rotate(self, x: Array, positions: Array) -> Array:
        r = self.predictor_dim
        parts = super().rotate(x[..., :r], positions), super().rotate(x[..., r:], positions)
        return jnp.concatenate(parts, -1)

    def attend(self, params: Tree, q: Array, k: Array, v: Array, **where: Any) -> Array:
        rows = {"q_positions": jnp.arange(q.shape[1])[None]}
        rows |= {"kv_positions": jnp.arange(k.shape[1])[None]}
        seen = visible(**rows | where, mask=self.pattern)
        weights = self.weigh(params, k, q, seen).astype(v.dtype)
        y = jnp.einsum("bkgts,bskh->btkgh", weights, v)
        return y.reshape(q.shape)

    def weigh(self, params: Tree, k: Array, q: Array, seen: Array) -> Array:
        """Float32 [batch, kv_heads, heads / kv_heads, T, S], 0 outside the kept keys.

        q [batch, T, heads, head], k [batch, S, kv_heads, head], seen as `visible` returns.
        """
        del params
        s1, s2 = self.scores(q, k)
        kept = self.reaches(s1, (seen[:, None] if seen.ndim == 3 else seen)[:, :, None])
        return jax.nn.softmax(s1, -1, where=kept) * jnp.where(kept, jax.nn.softplus(s2), 0)

    def scores(self, q: Array, k: Array) -> tuple[Array, Array]:
        """s1 and s2, float32 [batch, kv_heads, heads / kv_heads, T, S]."""
        r, rest = self.predictor_dim, self.head_dim - self.predictor_dim
        q = q.reshape(*q.shape[:2], k.shape[2], -1, self.head_dim)

        def product(part: slice, scale: float) -> Array:
            operands = q[..., part], k[..., part]
            s = jnp.einsum("btkgh,bskh->bkgts", *operands, preferred_element_type=jnp.float32)
            return scale * s

        s1 = product(slice(r), r**-0.5 if self.predictor_scale is None else self.predictor_scale)
        s2 = product(slice(r, None), rest**-0.5 if self.value_scale is None else self.value_scale)
        return s1, s2

    def reaches(self, s1: Array, seen: Array) -> Array:
        """Which of the seen keys reach the threshold: bool, shaped as the predictor scores `s1`."""
        s1 = jax.lax.stop_gradient(s1)
        best = jnp.where(seen, s1, -jnp.inf).max(-1, keepdims=True)
        return seen & (s1 >= jnp.minimum(self.threshold(s1, seen), best))

    def threshold(self, s1: Array, seen: Array) -> Array:
        """Mean + std Q(1 - k/n) of the n seen scores [..., S] -> [..., 1]; -inf where n <= k."""
        n = seen.sum(-1, keepdims=True)
        mean = jnp.where(seen, s1, 0).sum(-1, keepdims=True) / jnp.maximum(n, 1)
        square = jnp.where(seen, jnp.square(s1 - mean), 0).sum(-1, keepdims=True)
        std = jnp.sqrt(square / jnp.maximum(n - self.ddof, 1))
        first = self.top_k + 1  # up to here all is kept, and the quantile would be -inf
        by_n = normal_quantile(self.top_k, jnp.maximum(jnp.arange(s1.shape[-1] + 1), first))
        return jnp.where(n < first, -jnp.inf, mean + std * by_n[n])
