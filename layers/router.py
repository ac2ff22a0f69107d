"""Routers: which experts a token goes to, and with which weights.

The paper's steps in order: scores, selection (biased, by groups), weights, losses and load.
"""

from typing import Literal, NamedTuple, get_args

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
    normal,
    positive,
    weight,
)
from bestiary.layers.sharding import dot

Score = Literal["softmax", "topk_softmax", "sigmoid"]
Bias = Literal["none", "sign", "centered"]
Over = Literal["batch", "sequence", "group", "step"]


class Routing(NamedTuple):
    """Of every token: its experts int32 [batch, seq, top_k], the number of experts for "none"; its
    weights float32 [batch, seq, top_k]."""

    experts: Array
    weights: Array


@layer
class Router(Layer):
    """Top-k routing: [batch, seq, dim] -> (`Routing`, Aux).

    Everything from the logits on is float32. The per-layer constant "top_k", where there is one,
    bounds how many of the `top_k` experts a token of that layer uses (Sigma-MoE-Tiny's progressive
    sparsification).

    Raises ValueError for fields out of range, and for top-1 with "topk_softmax", whose weight would
    always be 1 and its gradient 0.
    """

    dim: int
    num_experts: int
    top_k: int
    score: Score = "softmax"
    """softmax over all experts, then top-k (Switch, OLMoE); "topk_softmax" over the chosen ones
    (Mixtral); sigmoid (DeepSeek-V3, Ling)."""
    normalize: bool = False
    """Divides the weights by their sum; not with top_k 1 and sigmoid, as Ling."""
    scale: float = 1.0
    """Multiplies the weights (DeepSeek-V3, Ling: 2.5)."""
    num_groups: int = 1
    """Experts are split into so many groups, of which a token may use `top_groups`."""
    top_groups: int = 1
    group_top: int = 2
    """A group's score is the sum of so many of its best (Ling and DeepSeek-V3: 2; Megatron: top_k /
    top_groups)."""
    bias: Bias = "none"
    """A bias on the selection alone follows the load, once per optimiser step, with no gradient: by
    its sign (DeepSeek-V3), or centred (Ling)."""
    bias_rate: float = 1e-3
    balance: float = 0.0
    """Coefficient of the load-balancing loss, taken `balance_over` the micro-batch, each sequence,
    each of `balance_groups` runs of sequences, or all micro-batches of the step so far."""
    balance_over: Over = "batch"
    balance_groups: int = 1
    top1_balance: float = 0.0
    """Coefficient of Sigma-MoE-Tiny's top-1 loss at `top1_temperature`."""
    top1_temperature: float = 1.0
    z_loss: float = 0.0
    """Coefficient of the squared log-partition function."""
    gradient_scale: float = 1.0
    """Scales the gradient of the router's matrix and leaves its value."""
    unit_experts: bool = False
    """Normalises each expert's column of the matrix to length 1."""
    precision: Literal["highest", "default"] = "highest"
    """Of the float32 product: "default" lets TPUs round its factors to bfloat16."""
    std: float | None = None
    """Of the initial matrix; None: dim ** -0.5."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_experts=self.num_experts, top_k=self.top_k)
        positive(num_groups=self.num_groups, top_groups=self.top_groups, group_top=self.group_top)
        positive(balance_groups=self.balance_groups)
        kinds = {"score": Score, "bias": Bias, "balance_over": Over}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name}: {getattr(self, name)!r}; need one of {known}")
        if self.num_experts % self.num_groups or self.top_groups > self.num_groups:
            raise ValueError(
                f"num_groups: {self.num_groups}; need a divisor of num_experts {self.num_experts}, "
                f"and at least top_groups {self.top_groups}"
            )
        size = self.num_experts // self.num_groups
        if self.group_top > size and self.num_groups > 1:
            raise ValueError(f"group_top: {self.group_top}; need at most the group's {size}")
        if self.top_k > size * self.top_groups:
            raise ValueError(
                f"top_k: {self.top_k}; need at most the {size * self.top_groups} experts to choose "
                "from"
            )
        if self.score == "topk_softmax" and self.top_k == 1:
            raise ValueError(
                "score: 'topk_softmax' with top_k 1 cannot learn: its weight is always 1; need "
                "'softmax' or 'sigmoid'"
            )
        for name in ("balance", "top1_balance", "z_loss", "bias_rate", "gradient_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}; need 0 or more")
        if not self.top1_temperature > 0:
            raise ValueError(f"top1_temperature: {self.top1_temperature}; need more than 0")

    def spec(self) -> Tree:
        shape, axes = (self.dim, self.num_experts), ("embed", None)
        matrix = weight(shape, axes)
        if self.std is not None:
            matrix = Param(shape, axes, normal(self.std), inputs=1)
        spec = {"weight": matrix}
        per_expert = (self.num_experts,), (None,)
        if self.bias != "none":
            advance = balance.signed_bias(self.bias_rate, self.bias == "centered")
            spec["bias"] = Param(*per_expert, trainable=False, advance=advance)
        if self.bias != "none" or self.balance_over == "step":
            # of the step so far; the next one starts again
            spec["load"] = Param(
                *per_expert, trainable=False, advance=lambda state: jnp.zeros_like(state["load"])
            )
        return spec

    def cost(self, length: int) -> Cost:
        return self.spec()["weight"].cost()

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Routing, Aux]:
        logits = self.logits(params, x)
        scores = jax.nn.sigmoid(logits) if self.score == "sigmoid" else jax.nn.softmax(logits)
        experts = self.select(logits if self.score == "topk_softmax" else scores, params)
        weights = self.weigh(logits, scores, experts)
        if "top_k" in ctx.layer:
            used = jnp.arange(self.top_k) < ctx.layer["top_k"]
            experts = jnp.where(used, experts, self.num_experts)
            weights = jnp.where(used, weights, 0)
        return Routing(experts, weights), self.report(params, logits, scores, experts, ctx)

    def logits(self, params: Tree, x: Array) -> Array:
        """float32 [batch, seq, num_experts]."""
        w = params["weight"]
        if self.unit_experts:
            w = w / jnp.linalg.norm(w.astype(jnp.float32), axis=0, keepdims=True)
        if self.gradient_scale != 1:
            w = self.gradient_scale * w + (1 - self.gradient_scale) * jax.lax.stop_gradient(w)
        with jax.default_matmul_precision("highest" if self.precision == "highest" else None):
            return dot("bsd,de->bse", x.astype(jnp.float32), w)

    def select(self, scores: Array, params: Tree) -> Array:
        """The `top_k` experts with the best scores plus bias, best first."""
        if self.bias != "none":
            scores = scores + params["bias"]
        if self.num_groups > 1:
            groups = scores.reshape(*scores.shape[:-1], self.num_groups, -1)
            best = jax.lax.top_k(groups, self.group_top)[0].sum(-1)
            kept = jax.lax.top_k(best, self.top_groups)[1]
            allowed = jax.nn.one_hot(kept, self.num_groups, dtype=bool).any(-2)
            scores = jnp.where(allowed[..., None], groups, -jnp.inf).reshape(scores.shape)
        return jax.lax.top_k(scores, self.top_k)[1]

    def weigh(self, logits: Array, scores: Array, experts: Array) -> Array:
        """The weights of the chosen experts, from scores without bias."""
        if self.score == "topk_softmax":
            weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, -1))
        else:
            weights = jnp.take_along_axis(scores, experts, -1)
        if self.normalize and not (self.score == "sigmoid" and self.top_k == 1):
            weights /= weights.sum(-1, keepdims=True) + 1e-20
        return self.scale * weights

    def report(
        self, params: Tree, logits: Array, scores: Array, experts: Array, ctx: Context
    ) -> Aux:
        """Losses with their coefficients, the load of this micro-batch, and the state's."""
        chosen = (experts[..., None] == jnp.arange(self.num_experts)).any(-2)
        load = balance.counts(chosen, ctx)
        losses = {}
        if self.balance:
            p = scores / scores.sum(-1, keepdims=True) if self.score == "sigmoid" else scores
            groups = {"sequence": p.shape[0], "group": self.balance_groups}
            losses["load_balance"] = self.balance * balance.load_balance(
                p,
                chosen,
                ctx,
                groups=groups.get(self.balance_over, 1),
                before=params["load"] if self.balance_over == "step" else None,
            )
        if self.top1_balance:
            losses["top1_balance"] = self.top1_balance * balance.top1_balance(
                logits, ctx, self.top1_temperature
            )
        if self.z_loss:
            losses["router_z"] = self.z_loss * balance.z_loss(logits, ctx)
        state = {"load": params["load"] + load} if "load" in params else {}
        return Aux(losses, balance.load_metrics(load), state)
