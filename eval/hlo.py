"""What a compiled program does: matmul FLOPs, collectives by mesh axis, kernels, memory traffic.

XLA's own `cost_analysis` counts the body of a loop once and knows no links between chips, so this
module reads the optimised HLO text itself and follows the loops. `jaxpr_flops` counts the FLOPs of
the same function before compilation, those inside Pallas kernels included.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend import core

from bestiary.eval.hlo_module import HloModule, Op, array_bytes, integers

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """All executions, on one device, of one kind of collective over the same mesh axes.

    `axes` are the mesh axes along which the members of a group differ and `group` is how many
    devices exchange data. `count` is the number of launches. `bytes` sums the whole buffers: the
    result of an all-gather, the operands of the others.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    asynchronous: bool
    count: int
    bytes: int


@dataclass(frozen=True)
class HloReport:
    """One execution of a program on one device. All counts are exact, `hbm_bytes` is an estimate.

    `custom_calls` counts by target, Pallas kernels as `tpu_custom_call:NAME`; the FLOPs inside them
    are not in `matmul_flops`. Loops whose length depends on data (`unknown_loops`) count once, of a
    conditional the branch with the most FLOPs. `hbm_bytes` sums what each unfused instruction reads
    and writes; slices count as slices, arrays placed in on-chip memory count nothing.
    """

    matmul_flops: int
    hbm_bytes: int
    collectives: tuple[Collective, ...]
    custom_calls: Mapping[str, int]
    unknown_loops: int


def analyse(text: str, mesh_axes: Mapping[str, int]) -> HloReport:
    """Reads `compiled.as_text()` of a TPU, GPU or CPU program partitioned over `mesh.shape`.

    To count collectives compile at level O0 or with windowed einsums off: otherwise the pipelined
    loop that replaces a large all-gather shows, rightly, as collective-permutes.
    Raises ValueError when the text is no HLO module or its devices are not those of `mesh_axes`.
    """
    module = HloModule(text)
    flops = hbm_bytes = unknown_loops = 0
    custom_calls: Counter[str] = Counter()
    collectives: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for times, fused, where, op in module.executed(module.entry):
        flops += times * module.matmul_flops(where, op)
        hbm_bytes += 0 if fused else times * module.hbm_bytes(where, op)
        kind = op.opcode.removesuffix("-start")
        if op.opcode == "while":
            unknown_loops += module.trip_count(where, op) is None
        elif op.opcode == "custom-call":
            custom_calls[_kernel(op)] += times
        elif kind in _COLLECTIVES and not module.repeats_async(where):
            groups = _groups(op, math.prod(mesh_axes.values()))
            if groups.shape[1] == 1:  # a device with itself
                continue
            size = sum(array_bytes(module[where][name].type) for name in op.operands)
            if kind == "all-gather":
                size *= groups.shape[1]
            elif where.startswith("all-reduce-scatter"):  # how most TPUs write it
                kind = "reduce-scatter"
            started = module.starts_async(where, op)
            sums = collectives[kind, _axes(groups, mesh_axes), groups.shape[1], started]
            sums[0] += times
            sums[1] += times * size
    table = tuple(Collective(*key, *sums) for key, sums in sorted(collectives.items()))
    return HloReport(flops, hbm_bytes, table, dict(custom_calls), unknown_loops)


def jaxpr_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr, platform: str | None = None) -> int:
    """Matmul FLOPs of a traced function, over all devices (2 per multiply-accumulate).

    Follows scan (times its length), remat, custom derivatives, jit and shard_map (times the devices
    of its manual axes); takes the most expensive branch of a cond, or where branches belong to
    platforms that of `platform`; a `while` body once; and for a `pallas_call` its CostEstimate or
    else its body times its grid.
    """
    return sum(flops_by_primitive(jaxpr, platform).values())


def flops_by_primitive(
    jaxpr: core.Jaxpr | core.ClosedJaxpr, platform: str | None = None
) -> dict[str, int]:
    """The parts of `jaxpr_flops` by the primitive that does the work, such as "dot_general"."""
    total: dict[str, int] = defaultdict(int)
    for eqn in jaxpr.eqns:
        params, name = eqn.params, eqn.primitive.name
        avals: list[Any] = [var.aval for var in [*eqn.invars, *eqn.outvars]]
        inner = [
            flops_by_primitive(sub, platform)
            for value in params.values()
            for sub in _subjaxprs(value)
        ]
        times = 1
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total[name] += 2 * avals[-1].size * math.prod(avals[0].shape[i] for i in contracted)
        elif name == "ragged_dot_general":
            total[name] += 2 * avals[0].size * avals[1].shape[-1]
        elif name == "conv_general_dilated":
            channels = avals[1].shape[params["dimension_numbers"].rhs_spec[0]]
            total[name] += 2 * avals[-1].size * avals[1].size // channels
        elif name == "cond":
            inner = [_branch(inner, params.get("branches_platforms"), platform)]
        elif name == "scan":
            times = params["length"]
        elif name == "shard_map":
            times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        elif name == "pallas_call":
            cost, grid = params["cost_estimate"], params["grid_mapping"].grid
            body = math.prod(grid) * sum(sum(part.values()) for part in inner)
            total[name] += cost.flops if cost else body
            inner = []
        for part in inner:
            for primitive, flops in part.items():
                total[primitive] += times * flops
    return total


def _branch(
    branches: list[dict[str, int]], platforms: tuple | None, platform: str | None
) -> dict[str, int]:
    if platform is not None and platforms is not None:
        chosen = (i for i, names in enumerate(platforms) if names is None or platform in names)
        return branches[next(chosen)]
    return max(branches, key=lambda flops: sum(flops.values()))


def _subjaxprs(value: Any) -> list[core.Jaxpr | core.ClosedJaxpr]:
    values = value if isinstance(value, tuple | list) else [value]
    return [sub for sub in values if isinstance(sub, core.Jaxpr | core.ClosedJaxpr)]


def _kernel(op: Op) -> str:
    target = op.attribute(r'custom_call_target="([^"]*)"')
    name = op.attribute(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call"')
    return f"{target}:{name}" if name else target


def _groups(op: Op, devices: int) -> np.ndarray:
    """Logical device ids [groups, members] that exchange data, from any of the printed forms."""
    text = op.attributes
    if pairs := op.attribute(r"source_target_pairs=\{(\{[\d,{}]*\})\}"):
        groups = np.array(integers(pairs)).reshape(-1, 2)
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = integers(iota[3])
        order = integers(iota[4]) if iota[4] else range(len(dims))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        groups = ids.reshape(int(iota[1]), int(iota[2]))
    elif mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? \{([^}]*)\}", text
    ):
        groups = _mesh_groups(*mesh.groups(default=""))
    elif lists := op.attribute(r"replica_groups=\{(\{[\d,{}]*\})\}"):
        groups = np.array([integers(group) for group in lists.split("},{")])
    else:  # an empty list means everybody
        groups = np.arange(devices)[None]
    if groups.max() >= devices:
        raise ValueError(f"{op.name} speaks of device {groups.max()}, mesh_axes of {devices}")
    return groups


def _mesh_groups(axes: str, device_ids: str, members: str) -> np.ndarray:
    """`'x'=4,'y'=8` and `'y':(2)4`: split every axis into (before, member, after) and collect."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    split = {name: (size, 1, 1) for name, size in sizes.items()}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", members):
        before, size = int(before or 1), int(size or sizes[name])
        split[name] = (before, size, sizes[name] // (before * size))
    dims = [size for parts in split.values() for size in parts]
    ids = np.array(integers(device_ids) or range(math.prod(dims))).reshape(dims)
    inside = range(1, len(dims), 3)
    ids = np.moveaxis(ids, inside, range(-len(inside), 0))
    return ids.reshape(-1, math.prod(dims[i] for i in inside))


def _axes(groups: np.ndarray, mesh_axes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which some group extends; logical ids count the mesh in row-major order."""
    coordinates = np.unravel_index(groups, tuple(mesh_axes.values()))
    return tuple(
        name
        for name, along in zip(mesh_axes, coordinates, strict=True)
        if (along != along[:, :1]).any()
    )
