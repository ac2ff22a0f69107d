"""Statistical top-k and its gated product in plain jax.numpy: the definition of truth."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


def stat_topk_glu(
    scores: jax.Array,
    values: jax.Array,
    quantile: jax.Array,
    *,
    ddof: int = 0,
    activation: Activation = "gelu_tanh",
) -> jax.Array:
    """activation(STopK(scores)) * values.

    Shapes and dtypes as in `bestiary.kernels.stat_topk_glu.stat_topk_glu`.
    """
    kept = statistical_topk(scores.astype(jnp.float32), quantile, ddof)
    return (activate(activation, kept) * values.astype(jnp.float32)).astype(scores.dtype)


def statistical_topk(x: jax.Array, quantile: jax.typing.ArrayLike, ddof: int = 0) -> jax.Array:
    """STopK(x) = max(x - theta, 0), theta = mean(x) + std(x) * quantile, over the last axis.

    Keeps about k of n normally distributed entries for `quantile = normal_quantile(k, n)`
    (Spark Transformer, arXiv 2506.06644, section 3). Statistics in float32; the gradient flows
    through them, not to the quantile.

    Args:
      x: [..., features], any float dtype, kept by the result.
      quantile: float32 scalar, or broadcastable to [..., 1]; -inf lets x pass unchanged.
      ddof: 0 for the population standard deviation (Gemma 3n), 1 for that of a sample.
    """
    wide = x.astype(jnp.float32)
    quantile = jax.lax.stop_gradient(jnp.asarray(quantile, jnp.float32))
    cut = quantile > -jnp.inf
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.sum((wide - mean) ** 2, axis=-1, keepdims=True) / (x.shape[-1] - ddof)
    spread = variance > 0  # the square root has no gradient at zero
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)
    above = wide - (mean + std * jnp.where(cut, quantile, 0.0))
    return jnp.where(cut, jnp.where(above > 0, above, 0.0), wide).astype(x.dtype)


def normal_quantile(k: jax.typing.ArrayLike, n: jax.typing.ArrayLike) -> jax.Array:
    """Q(1 - k/n) of the standard normal distribution, float32; -inf (keep everything) if k >= n.

    Takes numbers or arrays: `normal_quantile(k, jnp.arange(1, length + 1))` is a causal table.
    """
    share = jnp.asarray(k, jnp.float32) / jnp.asarray(n, jnp.float32)
    return -jax.scipy.special.ndtri(jnp.minimum(share, 1.0))  # Q(1 - p) = -Q(p), exact for small p


def activate(activation: Activation, x: jax.Array) -> jax.Array:
    """The named activation, in operations that every kernel language has."""
    match activation:
        case "gelu":
            return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
        case "gelu_tanh":
            return 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
        case "relu":
            return jnp.where(x > 0, x, 0.0)
        case "silu":
            return x * jax.lax.logistic(x)
    raise ValueError(f"activation must be one of {get_args(Activation)}; got {activation!r}")
