"""Whether an experiment fits its mesh, and which rows of a batch each process provides."""

import jax
import jax.sharding as js

from bestiary.layers.base import flatten
from bestiary.train.experiment import Experiment
from bestiary.train.mesh import placed
from bestiary.train.step import abstract_batch


def check(experiment: Experiment, mesh: js.Mesh) -> None:
    """Raises ValueError when a parameter or a micro-batch does not divide over the mesh."""
    with placed(mesh, experiment.mesh.table):
        params = dict(flatten(experiment.model.abstract(mesh)))
    declared = dict(flatten(experiment.model.declare()))
    for path, leaf in params.items():
        split = _indivisible(leaf)
        if split is not None:
            axis, names, parts = split
            raise ValueError(
                f"mesh: {' x '.join(names)} splits {declared[path].axes[axis]!r} of {path} into "
                f"{parts}; need a divisor of {leaf.shape[axis]}"
            )
    for rows in abstract_batch(experiment, mesh).values():
        micro = (rows.shape[0] // experiment.accumulate, *rows.shape[1:])
        split = _indivisible(jax.ShapeDtypeStruct(micro, rows.dtype, sharding=rows.sharding))
        if split is None:
            continue
        axis, names, parts = split
        if axis == 1:
            raise ValueError(f"data.length: {micro[1]}; need a multiple of {parts} ({names})")
        raise ValueError(
            f"data.batch_size: {rows.shape[0]} with accumulate {experiment.accumulate}; need a "
            f"multiple of {parts * experiment.accumulate}, {' x '.join(names)} of the mesh "
            "times accumulate"
        )


def batch_part(batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[int, int]:
    """Which part of the rows of a global batch this process provides, and of how many.

    Processes that hold the same rows, split only along other axes, provide the same part.
    """
    rows = next(iter(batch.values()))
    assert rows.sharding is not None
    held: dict[int, set[int]] = {}
    for device, index in rows.sharding.devices_indices_map(rows.shape).items():
        held.setdefault(device.process_index, set()).add(index[0].start or 0)
    parts = sorted({tuple(sorted(starts)) for starts in held.values()})
    if sum(map(len, parts)) != len(set().union(*parts)):
        raise ValueError("mesh: processes share some rows of a batch; need all or none in common")
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def _indivisible(leaf: jax.ShapeDtypeStruct) -> tuple[int, tuple[str, ...], int] | None:
    """A dimension that does not divide over its mesh axes: its number, these axes, the parts."""
    sharding = leaf.sharding
    assert isinstance(sharding, js.NamedSharding)
    for axis, names in enumerate(sharding.spec):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        parts = 1
        for name in names:
            parts *= sharding.mesh.shape[name]
        if leaf.shape[axis] % parts:
            return axis, names, parts
    return None
