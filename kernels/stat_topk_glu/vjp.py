"""Statistical top-k GLU and its gradient as row-wise kernels, the same for TPU and GPU.

`rowwise` (of `rowwise_tpu` or `rowwise_gpu`) runs the formulas on rows that offer means over the
features and an elementwise write. The backward pass recomputes the statistics from the scores.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from bestiary.kernels.stat_topk_glu.reference import activate


def forward(rowwise, scores, values, quantile, *, ddof, activation):
    features = scores.shape[-1]
    (y,), _ = rowwise(
        partial(_forward, ddof=ddof, activation=activation, features=features),
        quantile.reshape(1),
        scores.reshape(-1, features),
        values.reshape(-1, features),
        outputs=[scores.dtype],
        flops=14,
        transcendentals=1,
        name="stat_topk_glu_forward",
    )
    return y.reshape(scores.shape)


def backward(rowwise, scores, values, quantile, d_y, *, ddof, activation):
    features = scores.shape[-1]
    (d_scores, d_values), _ = rowwise(
        partial(_backward, ddof=ddof, activation=activation, features=features),
        quantile.reshape(1),
        scores.reshape(-1, features),
        values.reshape(-1, features),
        d_y.reshape(-1, features),
        outputs=[scores.dtype, values.dtype],
        flops=50,
        transcendentals=2,
        name="stat_topk_glu_backward",
    )
    d_scores, d_values = d_scores.reshape(scores.shape), d_values.reshape(values.shape)
    return d_scores, d_values, jnp.zeros_like(quantile)


def _forward(rows, scalars, ddof, activation, features):
    """y = activation(max(s - theta, 0)) * v, theta = mean(s) + std(s) * quantile."""
    cut, quantile = _threshold(scalars)
    mean, std, _ = _moments(rows, ddof, features)
    shift, floor = _shift(cut, mean + std * quantile)
    rows.write(lambda s, v: [activate(activation, jnp.maximum(s - shift, floor)) * v])
    return []


def _backward(rows, scalars, ddof, activation, features):
    """With n features, z = s - theta and g = dy:

    dv = g act(z), dz = g v act'(z) [z > 0],
    ds = dz - mean(dz) (1 + quantile n / (n - ddof) (s - mean(s)) / std(s)).
    """
    cut, quantile = _threshold(scalars)
    mean, std, inverse_std = _moments(rows, ddof, features)
    shift, floor = _shift(cut, mean + std * quantile)

    def through(s, v, g):
        z = s - shift
        kept = jnp.maximum(z, floor)
        d_z = jnp.where(z > floor, _slope(activation, kept) * v * g, 0.0)
        return activate(activation, kept) * g, d_z

    (d_theta,) = rows.mean(lambda s, v, g: [through(s, v, g)[1]])
    d_theta = jnp.where(cut, d_theta, 0.0)
    d_std = d_theta * quantile * inverse_std * (features / (features - ddof))

    def d_inputs(s, v, g):
        d_v, d_z = through(s, v, g)
        return [d_z - d_theta - d_std * (s - mean), d_v]

    rows.write(d_inputs)
    return []


def _threshold(scalars):
    """Whether there is a threshold at all, and its quantile (0 if there is none)."""
    (quantile,) = scalars
    cut = quantile > -jnp.inf
    return cut, jnp.where(cut, quantile, 0.0)


def _moments(rows, ddof, features):
    """Mean, standard deviation and its inverse (0 for a constant row)."""
    (mean,) = rows.mean(lambda s, *_: [s])
    (variance,) = rows.mean(lambda s, *_: [(s - mean) * (s - mean)])
    variance = variance * (features / (features - ddof))
    inverse_std = jnp.where(variance > 0, jax.lax.rsqrt(variance), 0.0)
    return mean, variance * inverse_std, inverse_std


def _slope(activation, x):
    """Derivative of the activation; the kernel languages lack what `jax.jvp` would write."""
    match activation:
        case "gelu":
            density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
            return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5))) + x * density
        case "gelu_tanh":
            c = math.sqrt(2 / math.pi)
            t = jnp.tanh(c * (x + 0.044715 * (x * x * x)))
            return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 0.134145 * (x * x))
        case "relu":
            return jnp.where(x > 0, 1.0, 0.0)
        case "silu":
            s = jax.lax.logistic(x)
            return s * (1.0 + x * (1.0 - s))


def _shift(cut, theta):
    """max(s - shift, floor) is the soft threshold at theta, or s itself."""
    return jnp.where(cut, theta, 0.0), jnp.where(cut, 0.0, -jnp.inf)
