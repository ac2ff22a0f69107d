"""How an operation chooses: which implementation, for which platform, on which shard.

An operation's `api.py` validates its arguments and hands its implementations to `dispatch`. The
parts (`by_platform`, `from_inputs`, `on_shards`, `why_not_sharded`) serve operations with other
needs, such as a library kernel that brings its own gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.sharding import PartitionSpec

Impl = Literal["auto", "reference", "tpu", "gpu"]
IMPLS: tuple[Impl, ...] = get_args(Impl)


class Kernel(NamedTuple):
    """One accelerator implementation of an operation.

    `forward(*args) -> out` and `backward(*args, d_out) -> cotangents of args` (a tuple) run on the
    operands of one device. `reason` says why it cannot serve these operands; None: it can.
    """

    forward: Callable[..., Any]
    backward: Callable[..., tuple]
    reason: str | None


def dispatch(
    impl: str,
    *args: jax.Array,
    reference: Callable[..., Any],
    tpu: Kernel,
    gpu: Kernel,
    in_specs: Sequence[PartitionSpec | None],
    out_specs: Any,
) -> Any:
    """Runs one operation on `args` by the implementation that `impl` names.

    "auto" takes, for the platform being lowered for, the kernel that can serve, else the
    reference. Kernels run shard by shard under the current mesh, as `in_specs` say; the reference
    is left to the partitioner. Only `impl="reference"` can be differentiated in forward mode and,
    on accelerators, twice.

    Raises:
      ValueError: unknown `impl`.
      NotImplementedError: the named kernel cannot serve these operands; the message says why.
    """
    kernels = {"tpu": tpu, "gpu": gpu}
    check_impl(impl)
    if impl in kernels and kernels[impl].reason is not None:
        raise NotImplementedError(f"impl={impl!r} cannot serve this call: {kernels[impl].reason}")
    usable = {k: v for k, v in kernels.items() if impl in ("auto", k) and v.reason is None}
    if not usable:
        return reference(*args)
    if impl == "auto":
        run = from_inputs(
            by_platform(reference, {k: v.forward for k, v in usable.items()}),
            by_platform(transposed(reference), {k: v.backward for k, v in usable.items()}),
        )
    else:
        run = from_inputs(usable[impl].forward, usable[impl].backward)
    return on_shards(run, in_specs, out_specs)(*args)


def check_impl(impl: str) -> None:
    """Raises ValueError for an unknown `impl`."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")


def by_platform(default: Callable, accelerated: dict[str, Callable]) -> Callable:
    """The function of the platform being *lowered for*: a TPU program can be built on a laptop."""
    lowered_as = {"tpu": "tpu", "gpu": "cuda"}
    branches = {lowered_as[name]: f for name, f in accelerated.items()}
    return lambda *args: jax.lax.platform_dependent(*args, default=default, **branches)


def transposed(f: Callable) -> Callable[..., tuple]:
    """`backward(*args, d_out)` of a function that JAX can differentiate."""
    return lambda *args: jax.vjp(f, *args[:-1])[1](args[-1])


def from_inputs(forward: Callable, backward: Callable[..., tuple]) -> Callable:
    """`forward`, differentiated by `backward` from the saved inputs alone.

    The gradient rule encloses the choice of platform: differentiating the choice itself would make
    every platform's program save (as zeros) what the other platforms' backward passes need.
    """
    run = jax.custom_vjp(forward)
    run.defvjp(lambda *args: (forward(*args), args), lambda args, d_out: backward(*args, d_out))
    return lambda *args: run(*vary_alike(*args))


def on_shards(f: Callable, in_specs: Sequence[PartitionSpec | None], out_specs: Any) -> Callable:
    """`f` on each device's shard under the current mesh; `f` itself where nothing is sharded."""
    axes = _free_axes()
    if math.prod(axes.values()) == 1:
        return f
    return jax.shard_map(
        f, in_specs=tuple(in_specs), out_specs=out_specs, axis_names=frozenset(axes)
    )


def why_not_sharded(
    shape: tuple[int, ...], spec: PartitionSpec | None, whole: Sequence[int]
) -> str | None:
    """Why an array of `shape`, sharded as `spec` says, cannot be worked on shard by shard.

    `whole` lists the dimensions that a kernel needs unsharded. None: nothing stands in the way.

    Raises:
      ValueError: `spec` has more entries than the array has dimensions or names an unknown axis.
    """
    axes = _free_axes()
    if math.prod(axes.values()) == 1:
        return None
    if spec is None:
        return f"the mesh has axes {axes}, but no spec says how the operand is sharded over them"
    if len(spec) > len(shape):
        raise ValueError(f"spec must have at most {len(shape)} entries (shape {shape}); got {spec}")
    whole = [dim % len(shape) for dim in whole]
    for dim, entry in enumerate(spec):
        names = axis_names(entry)
        if unknown := [name for name in names if name not in axes]:
            raise ValueError(f"spec must name mesh axes {tuple(axes)}; got {unknown[0]!r}")
        shards = math.prod(axes[name] for name in names)
        if shards > 1 and dim in whole:
            return f"dimension {dim} of {shape} is sharded over {names}; the kernel needs it whole"
        if shape[dim] % shards:
            return f"dimension {dim} of {shape} does not divide into {shards} shards over {names}"
    return None


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return (entry,) if isinstance(entry, str) else entry or ()


def vary_alike(*args: jax.Array) -> tuple[jax.Array, ...]:
    """Inside `jax.shard_map`: marks all arguments as differing over the axes that any differs over.

    A replicated weight then gets its gradient summed over the mesh by the transpose of the mark.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in args]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(a, tuple(sorted(union - v)), to="varying") if union - v else a
        for a, v in zip(args, varying, strict=True)
    )


def _free_axes() -> dict[str, int]:
    """Mesh axes (and sizes) that the program is not already written per device for."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
