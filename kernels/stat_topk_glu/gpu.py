"""Statistical top-k GLU as Pallas Mosaic GPU kernels."""

from functools import partial

import jax

from bestiary.kernels import rowwise_gpu
from bestiary.kernels.stat_topk_glu import vjp

forward = partial(vjp.forward, rowwise_gpu.rowwise)
backward = partial(vjp.backward, rowwise_gpu.rowwise)


def supports(scores: jax.Array) -> str | None:
    """Why the kernels cannot serve these operands, or None."""
    return rowwise_gpu.why_not(scores.shape, [scores.dtype] * 5)
