"""Balancing the experts: losses of the router, capacity, and measures of load.

All take float32 router outputs [batch, seq, num_experts] and `ctx`, which tells tokens from
padding. Losses come without coefficients.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Context


def counts(chosen: Array, ctx: Context) -> Array:
    """Tokens of each expert: chosen bool [batch, seq, num_experts] -> float32 [num_experts]."""
    return ctx.without_padding(chosen.astype(jnp.float32)).sum((0, 1))


def load_balance(
    p: Array, chosen: Array, ctx: Context, groups: int = 1, before: Array | None = None
) -> Array:
    """E sum_e mean_n(p_e) f_e, f the share of the choices that fall on e: 1 when balanced.

    Fedus et al. 2021 (Switch) over all tokens; with `groups` equal runs of sequences, the mean of
    their losses (one per sequence: DeepSeek-V2; one per expert-parallel group: Pangu Ultra MoE).
    `before` adds the counts [num_experts] of earlier micro-batches of the step (Qwen's global
    batch) to f.
    """
    num_experts = p.shape[-1]
    tokens = _grouped(ctx.real(p), groups).sum(1)
    counted = _grouped(ctx.without_padding(chosen.astype(jnp.float32)), groups).sum(1)
    if before is not None:
        counted += before
    share = counted / jnp.maximum(counted.sum(-1, keepdims=True), 1)
    mean = _grouped(ctx.without_padding(p), groups).sum(1) / jnp.maximum(tokens, 1)[:, None]
    return num_experts * (mean * jax.lax.stop_gradient(share)).sum(-1).mean()


def top1_balance(logits: Array, ctx: Context, temperature: float = 1.0) -> Array:
    """E sum_e mean_n(q_e)^2 / mean_n(max_e q_e), q = softmax(logits / temperature).

    Sigma-MoE-Tiny (2025, arXiv 2512.16248): top-1 shares by a soft maximum, so that they carry a
    gradient.
    """
    q = jax.nn.softmax(logits / temperature)
    return logits.shape[-1] * jnp.square(ctx.mean(q)).sum() / ctx.mean(q.max(-1))


def z_loss(logits: Array, ctx: Context) -> Array:
    """mean_n logsumexp(logits)^2, which keeps the logits small (Zoph et al. 2022, ST-MoE)."""
    return ctx.mean(jnp.square(jax.nn.logsumexp(logits, -1)))


def signed_bias(rate: float, centered: bool) -> Callable[[dict[str, Array]], Array]:
    """The next selection bias [..., num_experts] from {"bias", "load"}: b + rate sign(mean(load) -
    load).

    Loss-free balancing (Wang et al. 2024, DeepSeek-V3); `centered` subtracts the signs' mean, which
    keeps the sum of the biases (Ling 2.0).
    """

    def advance(state: dict[str, Array]) -> Array:
        load = state["load"]
        step = jnp.sign(load.mean(-1, keepdims=True) - load)
        return state["bias"] + rate * (step - step.mean(-1, keepdims=True) if centered else step)

    return advance


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Tokens that one expert takes: ceil(N K / E factor)."""
    return math.ceil(num_tokens * top_k / num_experts * factor)


def within_capacity(gates: Array, most: int, by: str = "probs") -> Array:
    """Which of the gates [tokens, num_experts] (0: not chosen) are kept: bool, the same shape.

    Each expert takes `most` tokens, those with the largest gates ("probs") or the first
    ("position").
    """
    chosen = gates > 0
    if by == "position":
        return chosen & (jnp.cumsum(chosen, 0) <= most)
    _, tokens = jax.lax.top_k(gates.T, min(most, gates.shape[0]))
    kept = jnp.zeros(gates.T.shape, bool).at[jnp.arange(gates.shape[1])[:, None], tokens].set(True)
    return chosen & kept.T


def sinkhorn(logits: Array, tolerance: float = 1e-4, eps: float = 1e-8) -> Array:
    """exp(logits) [tokens, num_experts] scaled to rows of 1 / tokens and columns of 1 / experts.

    Alternates until the column factors move by less than `tolerance` on average (Megatron-LM).
    """
    cost = jnp.exp(logits)
    rows, columns = cost.shape

    def scale(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, column, _ = state
        row = 1 / rows / ((column * cost).sum(1) + eps)
        new = 1 / columns / ((row[:, None] * cost).sum(0) + eps)
        return row, new, jnp.abs(column - new).mean()

    start = jnp.ones(rows), jnp.ones(columns), jnp.float32(jnp.inf)
    row, column, _ = jax.lax.while_loop(lambda state: state[2] > tolerance, scale, start)
    return column * cost * row[:, None]


def load_metrics(load: Array) -> dict[str, Array]:
    """Largest over mean load, and the load's entropy as a share of that of equal loads."""
    share = load / jnp.maximum(load.sum(), 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share)) / math.log(load.size)
    return {"load_max": share.max() * load.size, "load_entropy": entropy}


def _grouped(x: Array, groups: int) -> Array:
    return x.reshape(groups, -1, *x.shape[2:])
