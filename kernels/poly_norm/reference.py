"""PolyNorm in plain jax.numpy: the definition of truth, and the CPU path."""

import jax
import jax.numpy as jnp


def poly_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """y = sum_p a_p x^p / rms(x^p) + b, highest power first (Zhuo et al. 2024, eq. 4).

    Shapes and dtypes as in `bestiary.kernels.poly_norm.poly_norm`.
    """
    wide, order = x.astype(jnp.float32), weight.shape[0]
    y = bias.astype(jnp.float32)
    for a, p in zip(weight.astype(jnp.float32), range(order, 0, -1), strict=True):
        power = wide**p
        y = y + a * power * jax.lax.rsqrt(jnp.mean(power**2, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)
