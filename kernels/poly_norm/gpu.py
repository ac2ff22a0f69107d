"""PolyNorm as Pallas Mosaic GPU kernels."""

from functools import partial

import jax

from bestiary.kernels import rowwise_gpu
from bestiary.kernels.poly_norm import vjp

forward = partial(vjp.forward, rowwise_gpu.rowwise)
backward = partial(vjp.backward, rowwise_gpu.rowwise)


def supports(x: jax.Array) -> str | None:
    """Why the kernels cannot serve these operands, or None."""
    return rowwise_gpu.why_not(x.shape, [x.dtype] * 3)
