"""The grouped product, the public operation: validates and chooses."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.kernels.dispatch import by_platform, check_impl, vary_alike
from bestiary.kernels.grouped_dot import reference, tpu

Array = jax.Array


def grouped_dot(
    x: Array, w: Array, sizes: Array, *, dtype: Any = None, impl: str = "auto"
) -> Array:
    """y[i] = x[i] @ w[group of i]: [rows, D], [groups, D, F] -> [rows, F].

    The first sizes[0] rows are group 0, the next sizes[1] group 1, ...; the rows behind the last
    group give zeros. Products are summed in float32. The cost grows with the rows, not the groups.

    Args:
      x: [rows, D], any float type.
      w: [groups, D, F], the type of x.
      sizes: int32 [groups], their sum at most `rows`; no gradient.
      dtype: of the result; None: that of x.
      impl: "auto" (`jax.lax.ragged_dot`, a grouped kernel, for TPU; a loop over blocks of rows
        elsewhere, where `ragged_dot` would multiply every row by every matrix), "reference" or
        "tpu".

    Raises:
      ValueError: shapes or types that do not fit, an unknown `impl`.
      NotImplementedError: impl "gpu", for which there is no kernel.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or sizes.shape != w.shape[:1]:
        raise ValueError(
            f"shapes x {x.shape}, w {w.shape}, sizes {sizes.shape}; need [rows, D], [groups, D, F] "
            "and [groups]"
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}, w {w.dtype}; need one float type")
    check_impl(impl)
    if impl == "gpu":
        raise NotImplementedError("impl='gpu' cannot serve this call: there is no GPU kernel yet")
    x, w, sizes = vary_alike(x, w, sizes)
    return _grouped_dot(x, w, sizes, jnp.dtype(dtype or x.dtype), impl)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_dot(x: Array, w: Array, sizes: Array, dtype: Any, impl: str) -> Array:
    return _choose(impl, "forward")(x, w, sizes).astype(dtype)


def _forward(x: Array, w: Array, sizes: Array, dtype: Any, impl: str) -> tuple[Array, tuple]:
    return _grouped_dot(x, w, sizes, dtype, impl), (x, w, sizes)


def _backward(dtype: Any, impl: str, saved: tuple, dy: Array) -> tuple[Array, Array, Any]:
    x, w, sizes = saved
    dy = dy.astype(x.dtype)
    dx = _choose(impl, "rows")(dy, w, sizes).astype(x.dtype)
    dw = _choose(impl, "matrices")(x, dy, sizes).astype(w.dtype)
    return dx, dw, np.zeros(sizes.shape, jax.dtypes.float0)


_grouped_dot.defvjp(_forward, _backward)


def _choose(impl: str, part: str) -> Any:
    """`forward`, or the gradient of the `rows` or of the `matrices`."""
    portable, kernel = getattr(reference, part), getattr(tpu, part)
    if impl == "auto":
        return by_platform(portable, {"tpu": kernel})
    return kernel if impl == "tpu" else portable
