"""PolyNorm, the public operation: validates and chooses."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bestiary.kernels.dispatch import Kernel, dispatch, why_not_sharded
from bestiary.kernels.poly_norm import reference


def poly_norm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    *,
    eps: float = 1e-6,
    spec: PartitionSpec | None = None,
    impl: str = "auto",
) -> jax.Array:
    """y = sum_p a_p x^p rsqrt(mean(x^2p) + eps) + b, the mean over the last axis.

    Polynomial composition activation (Zhuo et al. 2024, arXiv 2411.03884, eq. 4). Computed in
    float32; the gradient of every argument is defined.

    Args:
      x: [..., features], any float dtype.
      weight: [order], highest power first (as released: cubic, square, linear).
      bias: [].
      eps: added to each mean.
      spec: how x is sharded under the current mesh, whose devices then run the kernel on their
        own rows. The reference serves where the features are sharded or no spec is given.
      impl: "auto" (the kernel for the platform being lowered for, where it can serve),
        "reference", "tpu" or "gpu".

    Returns:
      Like x.

    Raises:
      ValueError: a wrong shape, dtype, `eps`, `spec` or `impl`.
      NotImplementedError: the named kernel cannot serve; the message says why.
    """
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a float array [..., features]; got {x.dtype}{list(x.shape)}")
    if weight.ndim != 1 or not weight.size:
        raise ValueError(f"weight must be [order] with order >= 1; got {list(weight.shape)}")
    if bias.shape:
        raise ValueError(f"bias must be a scalar []; got {list(bias.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0; got {eps}")
    from bestiary.kernels.poly_norm import gpu, tpu  # importing Pallas takes 0.3 s

    sharded = why_not_sharded(x.shape, spec, whole=(-1,))
    return dispatch(
        impl,
        x,
        weight,
        bias,
        reference=partial(reference.poly_norm, eps=eps),
        tpu=Kernel(
            partial(tpu.forward, eps=eps),
            partial(tpu.backward, eps=eps),
            sharded or tpu.supports(x, weight),
        ),
        gpu=Kernel(
            partial(gpu.forward, eps=eps),
            partial(gpu.backward, eps=eps),
            sharded or gpu.supports(x),
        ),
        in_specs=(spec, PartitionSpec(), PartitionSpec()),
        out_specs=spec,
    )
