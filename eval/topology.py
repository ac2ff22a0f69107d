"""TPUs that are not there: topologies to compile for, chip figures, and a roofline time model.

libtpu compiles for any slice of any generation without a chip. Everything that `Chip`, `wire_bytes`
and `roofline` say about time is modelled, never measured.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh

from bestiary.eval import libtpu
from bestiary.eval.hlo import HloReport

_EXAMPLES = "for example v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1"

# Keeps a large all-gather in front of a matmul in one piece, so that collectives can be counted.
NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of ONE JAX DEVICE: a chip, but on tpu7x one of the `devices_per_chip` = 2 cores.

    Peak bf16 FLOP/s, HBM bandwidth and VMEM (of one TensorCore) are those of
    `pltpu.get_tpu_info_for_chip`. `hbm_bytes` is what libtpu (0.0.42, 0.0.50) lets a program use,
    read from its out-of-memory message. `link_bandwidth` is bytes/s of one link of the chip in one
    direction; a chip has 2 links per dimension. It is the bandwidth per chip on Google Cloud's page
    of the generation (v5e: 1600 Gbit/s one way; v5p and tpu7x 1200, v6e 800 GB/s both ways)
    divided by the links; "How to Scale Your Model" (Austin et al. 2025, part 2) has the same values
    except for tpu7x, which it lacks.
    """

    name: str
    devices_per_chip: int
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    vmem_bytes: int
    link_bandwidth: float
    dimensions: int
    pod: int  # chips of the largest slice


_CHIPS = {
    # name: version, cores per device, devices per chip, usable GiB, link GB/s, dimensions, pod
    "v5e": (pltpu.ChipVersion.TPU_V5E, 1, 1, 15.75, 50, 2, 256),
    "v5p": (pltpu.ChipVersion.TPU_V5P, 2, 1, 95.73, 100, 3, 8960),
    "v6e": (pltpu.ChipVersion.TPU_V6E, 1, 1, 31.24, 100, 2, 256),
    "tpu7x": (pltpu.ChipVersion.TPU_7X, 1, 2, 94.74, 100, 3, 9216),
}
# Links that the path between the two cores of a tpu7x chip is worth (not confirmed).
_ON_CHIP_LINKS = 6


@dataclass(frozen=True)
class Topology:
    """A slice: `name` as "v5p:4x4x4", its layout in chips and its devices as JAX lists them."""

    name: str
    chip: Chip
    layout: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each dimension wraps around: in cubes of 4 on 3-D chips, at 16 on 2-D ones."""
        if self.chip.dimensions == 3:
            return (all(size % 4 == 0 for size in self.layout),) * 3
        return tuple(size == 16 for size in self.layout)


def quiet_libtpu() -> None:
    """Lets libtpu load on a machine without TPU, silently, by several processes at once.

    Call it before anything makes JAX look for devices; it keeps JAX itself on the CPU.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(libtpu.SETTINGS)


def chip(name: str) -> Chip:
    """The table row of `v5e`, `v5p`, `v6e` or `tpu7x`. Raises ValueError for another name."""
    if name not in _CHIPS:
        raise ValueError(f"chip {name!r} is unknown: use one of {', '.join(_CHIPS)}")
    version, cores, devices, gib, link, dimensions, pod = _CHIPS[name]
    core = pltpu.get_tpu_info_for_chip(version, cores)
    return Chip(
        name=name,
        devices_per_chip=devices,
        flops=cores * core.bf16_ops_per_second,
        hbm_bytes=gib * 2**30,
        hbm_bandwidth=cores * core.mem_bw_bytes_per_second,
        vmem_bytes=core.vmem_capacity_bytes,
        link_bandwidth=link * 1e9,
        dimensions=dimensions,
        pod=pod,
    )


def parse(name: str) -> Topology:
    """The slice called `name`: a chip and its layout in chips, such as "v5p:4x4x4".

    Raises ValueError for a wrong name or when libtpu is missing.
    """
    parts = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not parts:
        raise ValueError(f"topology {name!r} is not CHIP:LAYOUT, {_EXAMPLES}")
    if parts[1] not in _CHIPS:
        known = ", ".join(_CHIPS)
        raise ValueError(f"topology {name!r}: chip {parts[1]!r} is not one of {known}, {_EXAMPLES}")
    kind, layout = chip(parts[1]), tuple(map(int, parts[2].split("x")))
    if len(layout) != kind.dimensions:
        raise ValueError(
            f"topology {name!r}: a layout of {kind.name} has {kind.dimensions} sizes, {_EXAMPLES}"
        )
    single = math.prod(layout) == 1
    if 0 in layout or not (single or layout[0] % 2 == layout[1] % 2 == 0):
        raise ValueError(
            f"topology {name!r}: hosts hold 2x2 chips, so the first two sizes must be even "
            f"(or all sizes 1), {_EXAMPLES}"
        )
    if math.prod(layout) > kind.pod:
        raise ValueError(
            f"topology {name!r} has {math.prod(layout)} chips, a {kind.name} pod has {kind.pod}"
        )
    if not importlib.util.find_spec("libtpu"):
        raise ValueError(f"topology {name!r} needs libtpu: pip install 'bestiary[plan]'")
    host = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    try:
        described = topologies.get_topology_desc(name, platform="tpu", **host)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology {name!r} is refused by libtpu: {reason}") from error
    return Topology(name, kind, layout, tuple(described.devices))


def mesh(topology: Topology, axes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices with Auto axes, neighbours on the torus where possible.

    Raises ValueError unless the sizes are positive and multiply to the number of devices.
    """
    sizes, total = tuple(axes.values()), len(topology.devices)
    if any(size < 1 for size in sizes) or math.prod(sizes) != total:
        written = ",".join(f"{name}={size}" for name, size in axes.items())
        per_chip = topology.chip.devices_per_chip
        raise ValueError(
            f"mesh {written!r} has {math.prod(sizes)} devices: the sizes must multiply to the "
            f"{total} devices of {topology.name} ({total // per_chip} chips of {per_chip})"
        )
    grid = mesh_utils.create_device_mesh(sizes, topology.devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_for(
    mesh: Mesh,
    jitted: jax.stages.Wrapped,
    *args: Any,
    level: str = "O2",
    options: Mapping[str, str] | None = None,
) -> tuple[jax.stages.Compiled, float]:
    """Compiles a `jax.jit` function for the devices of `mesh`; also returns the seconds it took.

    `args` are trees of ShapeDtypeStruct with NamedSharding over `mesh`. Level "O0" keeps sharding
    and collectives, several times faster, without overlap or on-chip placement. Nothing goes to
    JAX's compilation cache, which does not work for absent devices. A program that does not fit in
    HBM raises `jax.errors.JaxRuntimeError`, starting with RESOURCE_EXHAUSTED.
    """
    settings = {
        "jax_optimization_level": level,
        "jax_persistent_cache_min_compile_time_secs": 1e9,  # an entry could not be read back
    }
    before = {name: getattr(jax.config, name) for name in settings}
    started = time.perf_counter()
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        # Kernels ask this mesh which chip they are lowered for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = jitted.lower(*args).compile(dict(options or {}))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    return compiled, time.perf_counter() - started


def wire_bytes(kind: str, size: float, sides: Sequence[int]) -> float:
    """Bytes each device sends in one collective over a torus of `sides`; `(n,)` is a ring of n.

    `size` is the whole buffer, as in `Collective.bytes`. Gathering and scattering pass on all but
    one of n shards, an all-reduce does both; the shards of an all-to-all travel k/4 hops on average
    along a side of k.
    """
    n = math.prod(sides)
    if kind in ("all-gather", "reduce-scatter"):
        return size * (n - 1) / n
    if kind == "all-reduce":
        return 2 * size * (n - 1) / n
    if kind in ("all-to-all", "ragged-all-to-all"):
        return size * sum(side**2 // 4 / side for side in sides)
    return size


def collective_seconds(
    kind: str, size: float, axes: Sequence[str], topology: Topology, mesh: Mesh
) -> float:
    """Modelled time of a collective of `size` whole-buffer bytes over mesh `axes`.

    Every dimension of the torus that the axes extend over adds the bandwidth of its links: both
    directions when the axes cover a whole ring, else one, since the ends of a line have one link.
    The devices of a chip share its links. Latency and contention between axes are left out.
    """
    group = mesh.devices[tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)]
    where = np.array([(*device.coords, device.core_on_chip) for device in group.flat])
    *extents, cores = (len(set(along)) for along in where.T)
    sides = [extent for extent in (*extents, cores) if extent > 1]
    if not sides:
        return 0.0
    links = sum(
        1 + (extent == whole and ring)
        for extent, whole, ring in zip(extents, topology.layout, topology.rings, strict=False)
        if extent > 1
    )
    if kind == "collective-permute":
        links = min(links, 1)
    shared = topology.chip.devices_per_chip if links else 1
    bandwidth = (links or _ON_CHIP_LINKS) * topology.chip.link_bandwidth / shared
    return wire_bytes(kind, size, sides) / bandwidth


def roofline(report: HloReport, topology: Topology, mesh: Mesh) -> dict[str, float]:
    """Modelled seconds of one execution: "compute", "memory", and "KIND AXES" per collective.

    Each is the bound of its own resource; how far they overlap is not modelled.
    """
    seconds = {
        "compute": report.matmul_flops / topology.chip.flops,
        "memory": report.hbm_bytes / topology.chip.hbm_bandwidth,
    }
    for item in report.collectives:
        name = f"{item.kind} {','.join(item.axes)}"
        seconds[name] = seconds.get(name, 0.0) + collective_seconds(
            item.kind, item.bytes, item.axes, topology, mesh
        )
    return seconds
