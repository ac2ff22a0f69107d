"""Statistical top-k GLU as Pallas TPU kernels."""

from functools import partial

import jax

from bestiary.kernels import rowwise_tpu
from bestiary.kernels.stat_topk_glu import vjp

forward = partial(vjp.forward, rowwise_tpu.rowwise)
backward = partial(vjp.backward, rowwise_tpu.rowwise)


def supports(scores: jax.Array) -> str | None:
    """Why the kernels cannot serve these operands, or None."""
    return rowwise_tpu.why_not(scores.shape, [scores.dtype] * 5)
