"""PolyNorm and its gradient as row-wise kernels, the same for TPU and GPU.

`rowwise` (of `rowwise_tpu` or `rowwise_gpu`) runs the formulas on rows that offer means over the
features and an elementwise write. The backward pass recomputes the statistics from x.
"""

from functools import partial

import jax
import jax.numpy as jnp


def forward(rowwise, x, weight, bias, *, eps):
    (y,), _ = rowwise(
        partial(_forward, eps=eps),
        _scalars(weight, bias),
        x.reshape(-1, x.shape[-1]),
        outputs=[x.dtype],
        flops=6 * weight.size,
        name="poly_norm_forward",
    )
    return y.reshape(x.shape)


def backward(rowwise, x, weight, bias, d_y, *, eps):
    features = x.shape[-1]
    (d_x,), sums = rowwise(
        partial(_backward, eps=eps, features=features),
        _scalars(weight, bias),
        x.reshape(-1, features),
        d_y.reshape(-1, features),
        outputs=[x.dtype],
        sums=weight.size + 1,
        flops=13 * weight.size,
        name="poly_norm_backward",
    )
    return d_x.reshape(x.shape), sums[:-1].astype(weight.dtype), sums[-1].astype(bias.dtype)


def _forward(rows, scalars, eps):
    """y = sum_p a_p x^p s_p + b with s_p = rsqrt(mean(x^2p) + eps)."""
    *weight, bias = scalars
    order = len(weight)
    means = rows.mean(lambda x: [power * power for power in _powers(x, order)])
    scale = [jax.lax.rsqrt(m + eps) for m in means]

    def y(x):
        terms = zip(weight, _powers(x, order), scale, strict=True)
        return [sum((a * power * s for a, power, s in terms), bias)]

    rows.write(y)
    return []


def _backward(rows, scalars, eps, features):
    """With s_p as above and g = dy:

    dx = sum_p a_p p x^(p-1) s_p (g - x^p s_p^2 mean(g x^p)), da_p = sum g x^p s_p, db = sum g.
    """
    *weight, _ = scalars
    order = len(weight)

    def moments(x, g):
        powers = _powers(x, order)
        return [power * power for power in powers] + [g * power for power in powers] + [g]

    means = rows.mean(moments)
    scale = [jax.lax.rsqrt(m + eps) for m in means[:order]]
    along = means[order:-1]

    def d_x(x, g):
        powers = _powers(x, order)
        lower = [*powers[1:], 1.0]
        terms = zip(weight, range(order, 0, -1), powers, lower, scale, along, strict=True)
        return [
            sum(a * p * s * low * (g - power * (s * s * m)) for a, p, power, low, s, m in terms)
        ]

    rows.write(d_x)
    return [features * s * m for s, m in zip(scale, along, strict=True)] + [features * means[-1]]


def _powers(x, order):
    """x^order, ..., x^2, x."""
    powers = [x]
    for _ in range(order - 1):
        powers.insert(0, powers[0] * x)
    return powers


def _scalars(weight, bias):
    return jnp.append(weight.astype(jnp.float32), bias.astype(jnp.float32))
