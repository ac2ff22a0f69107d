"""PolyNorm as Pallas TPU kernels."""

from functools import partial

import jax

from bestiary.kernels import rowwise_tpu
from bestiary.kernels.poly_norm import vjp

forward = partial(vjp.forward, rowwise_tpu.rowwise)
backward = partial(vjp.backward, rowwise_tpu.rowwise)


def supports(x: jax.Array, weight: jax.Array) -> str | None:
    """Why the kernels cannot serve these operands, or None."""
    if weight.size + 1 > rowwise_tpu.MAX_SUMS:
        return f"the TPU kernel takes orders up to {rowwise_tpu.MAX_SUMS - 1}; got {weight.size}"
    return rowwise_tpu.why_not(x.shape, [x.dtype] * 3)
