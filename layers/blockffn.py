"""BlockFFN (Song et al. 2025, arXiv 2507.08771): experts that a ReLU router switches on and off.

Any number of experts may be on, and the router is differentiable everywhere. Two losses make
neighbouring tokens use the same experts, so that a chunk of tokens reads few weights.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Layer,
    Param,
    Tree,
    constant,
    layer,
    ones,
    positive,
    weight,
)
from bestiary.layers.feedforward import HIDDEN, down
from bestiary.layers.sharding import dot


@dataclass(frozen=True, kw_only=True)
class AdaptiveFactor:
    """The coefficient of a loss, which goes with the loss as training goes on.

    For `stable_steps` it is `start`. Then, every `step_size` steps, it is multiplied by the ratio
    of the mean loss over these steps to that over the steps before, a ratio above 1 being at least
    `min_factor`, up to `max_factor` times `start`; the change is spread linearly over the next
    `step_size` steps. Ramp and cap are those of the released code; the paper has neither.

    Raises ValueError for a stable phase that ends before there are two means.
    """

    start: float
    stable_steps: int = 1000
    step_size: int = 100
    max_factor: float = 4.0
    min_factor: float = 1.025
    per_layer: bool = False
    """Whether every layer's factor goes with its own loss; the released code has one for all."""

    def __post_init__(self) -> None:
        positive(step_size=self.step_size)
        if self.stable_steps <= self.step_size:
            raise ValueError(
                f"stable_steps: {self.stable_steps}; need more than step_size {self.step_size}"
            )
        if not self.start >= 0:
            raise ValueError(f"start: {self.start}; need 0 or more")

    def spec(self) -> Tree:
        """The state, float32 scalars: steps done, ends of the present ramp, mean loss of the last
        whole span of steps, sum and number of the losses since."""
        initial = {"steps": 0, "from": self.start, "to": self.start}
        initial |= {"previous": 0, "sum": 0, "count": 0}

        def state(name: str) -> Param:
            init = constant(initial[name])
            return Param((), (), init, trainable=False, advance=lambda s: self.advance(s)[name])

        return {name: state(name) for name in initial}

    def value(self, state: Tree) -> Array:
        """The coefficient in the present step."""
        share = (jnp.mod(state["steps"], self.step_size) + 1) / self.step_size
        return state["from"] + share * (state["to"] - state["from"])

    def observe(self, state: Tree, loss: Array) -> Tree:
        """The next values of what a micro-batch's loss changes."""
        return {"sum": state["sum"] + loss, "count": state["count"] + 1}

    def advance(self, state: Tree) -> Tree:
        """The state after a step; its arrays may have leading axes for layers."""
        steps = state["steps"] + 1
        full = jnp.mod(steps, self.step_size) == 0
        mean = state["sum"] / jnp.maximum(state["count"], 1)
        if not self.per_layer:
            mean = jnp.full_like(mean, mean.mean())
        known = (state["previous"] > 0) & (mean > 0)
        ratio = mean / jnp.where(known, state["previous"], 1)
        ratio = jnp.where(ratio > 1, jnp.maximum(ratio, self.min_factor), ratio)
        target = jnp.minimum(state["to"] * ratio, self.start * self.max_factor)
        return {
            "steps": steps,
            "from": jnp.where(full, state["to"], state["from"]),
            "to": jnp.where(full & known & (steps >= self.stable_steps), target, state["to"]),
            "previous": jnp.where(full, mean, state["previous"]),
            "sum": jnp.where(full, 0, state["sum"]),
            "count": jnp.where(full, 0, state["count"]),
        }


@layer
class BlockFFN(Layer):
    """y = sum_i A_i act(x W_up_i) W_down_i with A = gain * rmsnorm(relu(x W_router)).

    [batch, seq, dim] -> the same; no biases, no shared expert, no balancing. All experts are
    computed, as in the released training code; those that are off count as zeros.

    Raises ValueError for sizes below 1 and for numbers out of their range.
    """

    dim: int
    num_experts: int
    expert_dim: int
    activation: Layer = Silu()
    eps: float = 1e-5
    locality: float = 0.0
    """Coefficient of the activation-locality loss. The paper averages its losses over layers, which
    here are summed: divide its coefficients by the number of layers."""
    sharpness: float = 100.0
    """alpha of the locality loss."""
    detach_target: bool = False
    """Whether the locality loss leaves its target without gradient; the released code does not."""
    sparsity: AdaptiveFactor | None = None
    """Coefficient of the chunk-sparsification loss. None: no loss."""
    chunk: int = 64
    """Tokens that should use few experts together."""
    window: int = 8
    """Tokens over which the metric "cls" counts experts."""
    density: float = 1.0
    """Share of the experts that a token is expected to use: for the accounting alone."""
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_experts=self.num_experts, expert_dim=self.expert_dim)
        positive(chunk=self.chunk, window=self.window)
        if not self.locality >= 0:
            raise ValueError(f"locality: {self.locality}; need 0 or more")
        if not 0 < self.density <= 1:
            raise ValueError(f"density: {self.density}; need 0 < density <= 1")

    def spec(self) -> Tree:
        hidden, density = self.num_experts * self.expert_dim, self.density
        spec: Tree = {
            "router": weight((self.dim, self.num_experts), ("embed", None)),
            "gain": Param((self.num_experts,), (None,), ones),
            "up": weight((self.dim, hidden), ("embed", "mlp"), active=density),
            "activation": self.activation,
            "down": weight(
                (hidden, self.dim), ("mlp", "embed"), gain=self.out_gain, active=density
            ),
        }
        return spec if self.sparsity is None else spec | {"sparsity": self.sparsity.spec()}

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        scores = self.scores(params, x)
        pattern = self.pattern(scores)
        h = dot("bsd,df->bsf", x, params["up"], out=HIDDEN)
        h = self.activation.apply(params["activation"], h)
        scale = (pattern * params["gain"]).astype(x.dtype)
        h = (h.reshape(*scale.shape, self.expert_dim) * scale[..., None]).reshape(h.shape)
        y, aux = down(h, params, "down", ctx)
        own = self.report(params, scores, pattern, ctx)
        return y, replace(own, metrics=aux.metrics | own.metrics)

    def scores(self, params: Tree, x: Array) -> Array:
        """A0: float32 [batch, seq, num_experts]."""
        with jax.default_matmul_precision("highest"):
            return dot("bsd,de->bse", x.astype(jnp.float32), params["router"])

    def pattern(self, scores: Array) -> Array:
        """A1 = relu(A0), divided by its root mean square over the experts."""
        a = jax.nn.relu(scores)
        return a * jax.lax.rsqrt(jnp.mean(jnp.square(a), -1, keepdims=True) + self.eps)

    def report(self, params: Tree, scores: Array, pattern: Array, ctx: Context) -> Aux:
        active = scores > 0
        metrics = {
            "tls": token_sparsity(active, ctx),
            "cls": chunk_sparsity(active, ctx, self.window),
            "reuse": reuse(active, ctx),
        }
        losses, state = {}, {}
        if self.locality:
            loss = locality_loss(scores, ctx, self.sharpness, self.detach_target)
            losses["locality"] = self.locality * loss
        if self.sparsity is not None:
            loss = chunk_loss(normalized(pattern), ctx, self.chunk)
            factor = self.sparsity.value(params["sparsity"])
            losses["chunk_sparsity"] = factor * loss
            metrics["chunk_factor"] = factor
            seen = self.sparsity.observe(params["sparsity"], jax.lax.stop_gradient(loss))
            state["sparsity"] = seen
        return Aux(losses, metrics, state)


# --- losses: float32 scores or patterns [batch, seq, num_experts] -> float32 scalar ---------------


def normalized(pattern: Array, eps: float = 1e-5) -> Array:
    """p: the share of every expert in a token's pattern."""
    return pattern / (pattern.sum(-1, keepdims=True) + eps)


def locality_loss(
    scores: Array, ctx: Context, sharpness: float = 100.0, detach_target: bool = False
) -> Array:
    """Mean cross-entropy between a token's sigmoid(alpha A0), the target, and its predecessor's in
    the document."""
    z = sharpness * scores
    target = jax.nn.sigmoid(z[:, 1:])
    target = jax.lax.stop_gradient(target) if detach_target else target
    loss = jax.nn.softplus(z[:, :-1]) - target * z[:, :-1]
    return mean_of(loss.mean(-1), neighbours(scores, ctx))


def chunk_loss(p: Array, ctx: Context, size: int = 64, eps: float = 1e-5) -> Array:
    """1 - mean over chunks and experts of exp(sum_t ln(1 - p_t + eps)).

    Chunks are runs of `size` tokens from the beginning of each document; what is missing in the
    last one counts as p = 0.
    """
    log_off = jnp.log((1 - p + eps) / (1 + eps))
    sums, tokens = chunk_sums(log_off, ctx, size)
    off = jnp.exp(sums + size * jnp.log1p(eps)).mean(-1)
    return 1 - mean_of(off, tokens > 0)


# --- statistics: active bool [batch, seq, num_experts] -> float32 scalar --------------------------


def token_sparsity(active: Array, ctx: Context) -> Array:
    """TLS: the share of experts that a token leaves unused."""
    return 1 - ctx.mean(active).mean()


def chunk_sparsity(active: Array, ctx: Context, size: int) -> Array:
    """CLS: the share of experts that all of `size` successive tokens of a document leave unused; 1
    where no document is so long."""
    sums, tokens = chunk_sums(active.astype(jnp.float32), ctx, size)
    return 1 - mean_of((sums > 0).mean(-1), tokens == size)


def reuse(active: Array, ctx: Context) -> Array:
    """Mean share of a token's experts that its successor in the document uses as well; tokens
    without experts are left out."""
    count = active[:, :-1].sum(-1)
    both = (active[:, :-1] & active[:, 1:]).sum(-1)
    return mean_of(both / jnp.maximum(count, 1), neighbours(active, ctx) & (count > 0))


# --- documents ------------------------------------------------------------------------------------


def mean_of(x: Array, where: Array) -> Array:
    """Mean of the entries that count; 0 without any."""
    return jnp.where(where, x, 0).sum() / jnp.maximum(where.sum(), 1)


def neighbours(x: Array, ctx: Context) -> Array:
    """Which tokens and their successors belong to one document: bool [batch, seq - 1]."""
    if ctx.segment_ids is None:
        return jnp.ones((x.shape[0], x.shape[1] - 1), bool)
    this, successor = ctx.segment_ids[:, :-1], ctx.segment_ids[:, 1:]
    return (this == successor) & (this > 0)


def chunk_sums(x: Array, ctx: Context, size: int) -> tuple[Array, Array]:
    """Sums of x [batch, seq, ...] over the chunks of every row, of which there are at most seq, and
    their tokens int32 [batch, seq]: 0 where there is no further chunk."""
    length = x.shape[1]
    begins = jnp.pad(~neighbours(x, ctx), ((0, 0), (1, 0)), constant_values=True)
    place = jnp.arange(length)
    offset = place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    chunk = jnp.cumsum(offset % size == 0, 1) - 1
    add = jax.vmap(partial(jax.ops.segment_sum, num_segments=length))
    return add(ctx.without_padding(x), chunk), add(ctx.real(x).astype(jnp.int32), chunk)
