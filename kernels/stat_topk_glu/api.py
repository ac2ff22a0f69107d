"""Statistical top-k GLU, the public operation: validates and chooses."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bestiary.kernels.dispatch import Kernel, dispatch, why_not_sharded
from bestiary.kernels.stat_topk_glu import reference
from bestiary.kernels.stat_topk_glu.reference import Activation


def stat_topk_glu(
    scores: jax.Array,
    values: jax.Array,
    *,
    quantile: jax.typing.ArrayLike,
    ddof: int = 0,
    activation: Activation = "gelu_tanh",
    spec: PartitionSpec | None = None,
    impl: str = "auto",
) -> jax.Array:
    """activation(max(s - theta, 0)) * v with theta = mean(s) + std(s) * quantile.

    The middle of the Spark feed-forward (arXiv 2506.06644, section 3); mean and standard deviation
    over the last axis. Computed in float32; the gradient flows through the statistics, none
    reaches the quantile.

    Args:
      scores, values: [..., features], the same shape and float dtype.
      quantile: float32 scalar, may be traced; `normal_quantile(k, features)` keeps about k
        features, -inf lets the scores pass unchanged.
      ddof: 0 for the population standard deviation, 1 for that of a sample.
      activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
      spec: how the scores are sharded under the current mesh, whose devices then run the kernel
        on their own rows. The reference serves where the features are sharded or no spec is given.
      impl: "auto" (the kernel for the platform being lowered for, where it can serve),
        "reference", "tpu" or "gpu".

    Returns:
      Like the scores.

    Raises:
      ValueError: a wrong shape, dtype, `ddof`, `activation`, `spec` or `impl`.
      NotImplementedError: the named kernel cannot serve; the message says why.
    """
    if scores.ndim < 1 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"scores must be a float array [..., features]; got {scores.dtype}{list(scores.shape)}"
        )
    if (values.shape, values.dtype) != (scores.shape, scores.dtype):
        raise ValueError(
            f"values must be like scores, {scores.dtype}{list(scores.shape)};"
            f" got {values.dtype}{list(values.shape)}"
        )
    quantile = jnp.asarray(quantile, jnp.float32)
    if quantile.shape:
        raise ValueError(f"quantile must be a scalar []; got {list(quantile.shape)}")
    if not 0 <= ddof < scores.shape[-1]:
        raise ValueError(f"ddof must be in [0, {scores.shape[-1]}) (the features); got {ddof}")
    if activation not in get_args(Activation):
        raise ValueError(
            f"activation must be one of {', '.join(get_args(Activation))}; got {activation!r}"
        )
    from bestiary.kernels.stat_topk_glu import gpu, tpu  # importing Pallas takes 0.3 s

    sharded = why_not_sharded(scores.shape, spec, whole=(-1,))
    options = {"ddof": ddof, "activation": activation}
    return dispatch(
        impl,
        scores,
        values,
        quantile,
        reference=partial(reference.stat_topk_glu, **options),
        tpu=Kernel(
            partial(tpu.forward, **options),
            partial(tpu.backward, **options),
            sharded or tpu.supports(scores),
        ),
        gpu=Kernel(
            partial(gpu.forward, **options),
            partial(gpu.backward, **options),
            sharded or gpu.supports(scores),
        ),
        in_specs=(spec, spec, PartitionSpec()),
        out_specs=spec,
    )
