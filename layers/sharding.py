"""Logical axes, the rules that map them to mesh axes, and the one seam for contractions and look-
ups.

Layers name logical axes only. A rules table, held where it is part of jit's cache key, maps them to
mesh axes. Without rules or without a mesh every function here is the identity on placement.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

# The vocabulary. A new name is added here, with what it measures.
AXES = {
    "batch": "sequences",
    "seq": "positions of a sequence",
    "embed": "width of the residual stream",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head": "channels of one head",
    "mlp": "hidden width of a feed-forward",
    "vocab": "token ids",
    "layers": "stacked repeats",
    "experts": "experts of a mixture",
    "memory": "columns of a memory table",
    "state": "channels of a recurrent state",
}

Axes = str | tuple[str, ...] | None
Rules = Mapping[str, Axes]

DEFAULT_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "fsdp",
    "memory": "fsdp",
}

_RULES = jax.make_user_context(())


def use_rules(rules: Rules) -> AbstractContextManager:
    """Context manager: map logical axes to mesh axes by `rules` ({"mlp": "tensor", "batch":

    ("data", "fsdp")}).
    """
    for name in rules:
        _known(name)
    return _RULES(tuple(sorted(rules.items())))


def pspec(*axes: str | None, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec | None:
    """The PartitionSpec of dimensions named `axes` under the current rules, or None without mesh or
    rules.

    A mesh axis goes to the first dimension that claims it. Raises ValueError for an unknown logical
    name or for a rule that names an axis the mesh does not have.
    """
    for name in axes:
        _known(name)
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    rules = dict(_RULES.value)
    if mesh.empty or not rules:
        return None
    taken: set[str] = set()
    spec: list[Axes] = []
    for name in axes:
        target = rules.get(name) if name else None
        wanted = (target,) if isinstance(target, str) else tuple(target or ())
        for axis in wanted:
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"rule {name!r}: {axis!r} is not an axis of the mesh; it has {mesh.axis_names}"
                )
        free = tuple(axis for axis in wanted if axis not in taken)
        taken.update(free)
        spec.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*spec)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the placement of `x`, whose dimensions are named `axes`; the identity without mesh
    or rules."""
    if len(axes) != x.ndim:
        raise ValueError(f"shard: {len(axes)} axes {axes} for an array of shape {x.shape}")
    spec = pspec(*axes)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def dot(
    equation: str,
    x: jax.Array,
    w: Any,
    *,
    out: tuple[str | None, ...] | None = None,
    dtype: Any = None,
) -> jax.Array:
    """The seam for every contraction of an activation with a parameter: einsum in `x.dtype`.

    A leaf that is not an array (quantised, low-rank) serves itself through its method
    `contract(equation, x)`. `out` names the logical axes of the result, `dtype` its type (None:
    that of x), to which the products of a narrower type are summed without rounding.
    """
    dtype = x.dtype if dtype is None else dtype
    if hasattr(w, "contract"):
        y = w.contract(equation, x).astype(dtype)
    else:
        y = _einsum(equation, x, w.astype(x.dtype), dtype)
    return y if out is None else shard(y, *out)


def _einsum(equation: str, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """einsum; on one device as one matrix product of the rows of x, which CPUs multiply faster.

    Over several devices the leading axes stay apart, since they may be sharded.
    """
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    summed = "".join(axis for axis in right if axis not in result)
    kept = "".join(axis for axis in right if axis in result)
    rows = left.removesuffix(summed)
    one_device = jax.sharding.get_abstract_mesh().size <= 1
    plain = left == rows + summed and result == rows + kept
    if not (one_device and plain and right in (summed + kept, kept + summed)):
        return jnp.einsum(equation, x, w, preferred_element_type=dtype)
    ndim, first = len(summed), right.startswith(summed)
    outputs = w.shape[ndim:] if first else w.shape[:-ndim]
    matrix = x.reshape(-1, math.prod(x.shape[-ndim:]))
    w = w.reshape(matrix.shape[1], -1) if first else w.reshape(-1, matrix.shape[1]).T
    y = jnp.dot(matrix, w, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-ndim], *outputs)


def take(table: Any, ids: jax.Array, dtype: Any) -> jax.Array:
    """The seam for embedding look-ups: rows `ids` of `table`, in `dtype`."""
    if hasattr(table, "take_rows"):
        return table.take_rows(ids, dtype)
    return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)


def _known(name: str | None) -> None:
    if name is not None and name not in AXES:
        raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(AXES)}")
