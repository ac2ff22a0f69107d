"""What token mixers take as rows get longer: time, memory and FLOPs of a step, bytes to decode.

    python bench/mixers.py --mixers full,window,nsa,mamba2 --lengths 1024,4096,8192
    python bench/mixers.py --mixers full,window,nsa,mamba2 --topology v5e:2x2

Forward and backward of one mixer, always of as many tokens as the longest row has. Here, in
float32: milliseconds, MiB of temporaries, and GFLOP of matrix products; what needs more memory than
`--limit` is compiled but not run. With `--topology`, compiled for that TPU in bfloat16: per chip
the modelled GB of memory traffic and GFLOP, and the milliseconds which these bound. Last, the bytes
of the cache at the end of a row, which a decoded token reads. "growth" is from the shortest to the
longest rows: at equal tokens 1 is linear in the length, and of the cache 1 is constant.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bestiary.eval import topology as tpu
from bestiary.eval.compare_mixers import MIXERS, Size
from bestiary.eval.hlo import analyse, flops_by_primitive, jaxpr_flops
from bestiary.layers.base import Layer, params_of
from bestiary.train.mesh import MESH_AXES, Mesh, placed
from bestiary.train.runtime import keep_freed_memory

Figures = Mapping[str, float]
"""By what is measured."""
HERE = ("ms", "MiB", "GFLOP")
MODELLED = ("modelled ms", "GB", "GFLOP")


def step(mixer: Layer) -> Any:
    """Gradients of the parameters and the input; what is not trained has some of no use."""

    def loss(params: dict, x: jax.Array) -> jax.Array:
        y, _, aux = mixer.apply(params, x)
        return jnp.square(y.astype(jnp.float32)).mean() + sum(aux.losses.values())

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def measured(mixer: Layer, shape: tuple[int, int, int], rounds: int, limit: float) -> Figures:
    params = mixer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), shape)
    traced = step(mixer).trace(params, x)
    run = traced.lower().compile()
    memory = run.memory_analysis().temp_size_in_bytes / 2**20
    figures = {"MiB": memory, "GFLOP": jaxpr_flops(traced.jaxpr, "cpu") / 1e9}
    if memory > limit:
        return figures

    def milliseconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(params, x))
        return 1e3 * (time.perf_counter() - start)

    milliseconds()  # the first touches its memory
    return figures | {"ms": statistics.median(milliseconds() for _ in range(rounds))}


def modelled(mixer: Layer, shape: tuple[int, int, int], topology: tpu.Topology) -> Figures:
    devices = len(topology.devices)
    config = Mesh(data=devices)
    sizes = zip(MESH_AXES, config.sizes(devices), strict=True)
    mesh = tpu.mesh(topology, dict(sizes))
    over_rows = NamedSharding(mesh, PartitionSpec("data"))
    shape = devices * shape[0], *shape[1:]
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=over_rows)
    with placed(mesh, config.table):
        params, program = mixer.abstract(mesh), step(mixer)
        kernels = flops_by_primitive(program.trace(params, x).jaxpr, "tpu").get("pallas_call", 0)
        compiled, _ = tpu.compile_for(mesh, program, params, x, level="O0")
    report = analyse(compiled.as_text() or "", mesh.shape)
    flops = report.matmul_flops + kernels / devices
    bound = max(flops / topology.chip.flops, report.hbm_bytes / topology.chip.hbm_bandwidth)
    return {"modelled ms": 1e3 * bound, "GB": report.hbm_bytes / 1e9, "GFLOP": flops / 1e9}


def show(title: str, lengths: list[int], rows: Mapping[str, list[float | None]]) -> None:
    def line(*cells: str) -> None:
        print(cells[0].ljust(18), *(cell.rjust(11) for cell in cells[1:]))

    print()
    line(title, *map(str, lengths), "growth")
    for name, values in rows.items():
        first, last = values[0], values[-1]
        growth = f"{last / first:.2f}" if first and last else "-"
        line(name, *("-" if value is None else f"{value:,.1f}" for value in values), growth)


def main() -> None:
    parser = argparse.ArgumentParser(description="token mixers against the length of rows")
    parser.add_argument("--mixers", default=",".join(n for n in MIXERS if n != "hybrid"))
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--span", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=4096, help="MiB")
    parser.add_argument("--topology")
    arguments = parser.parse_args()
    size = Size(dim=arguments.dim, span=arguments.span, head=arguments.head)
    lengths = sorted(int(length) for length in arguments.lengths.split(","))
    names, tokens = arguments.mixers.split(","), max(lengths)

    keep_freed_memory()
    topology = None
    if arguments.topology is not None:
        tpu.quiet_libtpu()
        topology = tpu.parse(arguments.topology)

    found: dict[str, list[Figures]] = {name: [] for name in names}
    caches: dict[str, list[float | None]] = {}
    for name in names:
        mixer = MIXERS[name](size, 0)
        for length in lengths:
            shape = tokens // length, length, size.dim
            if topology is None:
                found[name].append(measured(mixer, shape, arguments.rounds, arguments.limit))
            else:
                found[name].append(modelled(mixer, shape, topology))
            said = ", ".join(f"{value:,.1f} {kind}" for kind, value in found[name][-1].items())
            print(f"{name} at {length}: {said}", flush=True)
        caches[name] = [
            sum(p.nbytes for p in params_of(mixer.cache_spec(1, length, jnp.bfloat16))) / 1024
            for length in lengths
        ]
    for kind in HERE if topology is None else MODELLED:
        show(kind, lengths, {n: [f.get(kind) for f in of] for n, of in found.items()})
    show("KiB of the cache", lengths, caches)


if __name__ == "__main__":
    main()
