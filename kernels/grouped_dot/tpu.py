"""The grouped product by `jax.lax.ragged_dot`, which XLA compiles to a grouped kernel for TPU."""

import jax
import jax.numpy as jnp

Array = jax.Array


def forward(x: Array, w: Array, sizes: Array) -> Array:
    """x [rows, D], w [groups, D, F] -> float32 [rows, F]."""
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)


def rows(dy: Array, w: Array, sizes: Array) -> Array:
    """The gradient of x: dy [rows, F], w [groups, D, F] -> float32 [rows, D]."""
    return forward(dy, w.swapaxes(1, 2), sizes)


def matrices(x: Array, dy: Array, sizes: Array) -> Array:
    """The gradient of w: x [rows, D], dy [rows, F] -> float32 [groups, D, F]."""
    contract_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        x, dy, sizes, contract_rows, preferred_element_type=jnp.float32
    )
