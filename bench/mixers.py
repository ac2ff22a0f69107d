"""What token mixers take as a row gets longer: a training step of one mixer, and a decoded token.

    python bench/mixers.py --mixers full,window,nsa --lengths 1024,4096 --record figures.jsonl
    python bench/mixers.py --mixers full,window,nsa --topology v5e:1x1 --record modelled.jsonl

Here, in float32: milliseconds of forward and backward, MiB of temporaries, GFLOP of matrix
products, and milliseconds of a token decoded at the end of the row; what needs more memory than
`--limit` is compiled but not run. With `--topology`, compiled for that TPU in bfloat16: the
modelled GB of memory traffic and GFLOP, the milliseconds which these bound, and the MB of memory
traffic of a decoded token, its parameters with it. Last, the KiB that a decoded token reads of the
cache as it is declared, in bfloat16.

With `--record` the figures are added to a file, and the tables show all that it holds: long rows
are measured best by a process of their own. "growth" is the exponent of the length that fits the
three longest rows: 1 is linear, 2 quadratic.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bestiary.eval import topology as tpu
from bestiary.eval.compare_mixers import MIXERS, Size
from bestiary.eval.hlo import analyse, flops_by_primitive, jaxpr_flops
from bestiary.layers.base import Context, Layer, abstract, params_of
from bestiary.train.runtime import keep_freed_memory

Figures = dict[str, float]
"""By what is measured."""
HERE = ("ms", "MiB", "GFLOP", "ms of a token")
MODELLED = ("modelled ms", "GB", "GFLOP", "MB of a token")
READ = "KiB read of the cache"


def step(mixer: Layer) -> Any:
    """Gradients of the parameters and the input; what is not trained has some of no use."""

    def loss(params: dict, x: jax.Array) -> jax.Array:
        y, _, aux = mixer.apply(params, x)
        return jnp.square(y.astype(jnp.float32)).mean() + sum(aux.losses.values())

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def decoding(mixer: Layer) -> Any:
    """One token, and the cache behind it, in the place of the one before."""

    def run(params: dict, x: jax.Array, position: jax.Array, cache: dict) -> tuple:
        return mixer.apply(params, x, Context(positions=position), cache)[:2]

    return jax.jit(run, donate_argnums=3)


def median(run: Callable[[], Any], rounds: int) -> float:
    """Milliseconds, without the first round, which touches its memory."""

    def one() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return 1e3 * (time.perf_counter() - start)

    one()
    return statistics.median(one() for _ in range(rounds))


def measured(mixer: Layer, length: int, dim: int, rounds: int, limit: float) -> Figures:
    params = mixer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, length, dim))
    cache = mixer.init_cache(1, length)
    token = decoding(mixer)
    last = x[:, :1], jnp.full((1, 1), length - 1)

    def decode() -> Any:
        nonlocal cache
        y, cache = token(params, *last, cache)
        return y

    figures = {"ms of a token": median(decode, 20)}
    traced = step(mixer).trace(params, x)
    run = traced.lower().compile()
    memory = run.memory_analysis().temp_size_in_bytes / 2**20
    figures |= {"MiB": memory, "GFLOP": jaxpr_flops(traced.jaxpr, "cpu") / 1e9}
    if memory > limit:
        return figures
    return figures | {"ms": median(lambda: run(params, x), rounds)}


def modelled(mixer: Layer, length: int, dim: int, topology: tpu.Topology) -> Figures:
    mesh = tpu.mesh(topology, {"data": len(topology.devices)})
    whole = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda s: array(*s.shape, dtype=s.dtype), tree)

    def work(program: Any, *arguments: Any) -> tuple[float, float]:
        """Bytes and FLOPs."""
        kernels = flops_by_primitive(program.trace(*arguments).jaxpr, "tpu").get("pallas_call", 0)
        compiled, _ = tpu.compile_for(mesh, program, *arguments, level="O0")
        report = analyse(compiled.as_text() or "", mesh.shape)
        return report.hbm_bytes, report.matmul_flops + kernels

    params = placed(mixer.abstract())
    moved, flops = work(step(mixer), params, array(1, length, dim))
    bound = max(flops / topology.chip.flops, moved / topology.chip.hbm_bandwidth)
    cache = placed(abstract(mixer.cache_spec(1, length, jnp.bfloat16)))
    position = array(1, 1, dtype=jnp.int32)
    of_token, _ = work(decoding(mixer), params, array(1, 1, dim), position, cache)
    figures = {"modelled ms": 1e3 * bound, "GB": moved / 1e9, "GFLOP": flops / 1e9}
    return figures | {"MB of a token": of_token / 1e6}


def read_by_a_token(mixer: Layer, length: int) -> float:
    """KiB of the cache."""
    entries = params_of(mixer.cache_spec(1, length, jnp.bfloat16))
    return sum(p.nbytes * p.active for p in entries) / 1024


def growth(of: Mapping[int, float]) -> float | None:
    """The exponent of the length, of the three longest rows."""
    points = sorted(of.items())[-3:]
    if len(points) < 2 or min(of.values()) <= 0:
        return None
    lengths, values = np.log(np.array(points)).T
    return float(np.polyfit(lengths, values, 1)[0])


def show(kind: str, found: Mapping[str, Mapping[int, Figures]]) -> None:
    lengths = sorted({length for of in found.values() for length in of})

    def line(*cells: str) -> None:
        print(cells[0].ljust(22), *(cell.rjust(11) for cell in cells[1:]))

    print()
    line(kind, *map(str, lengths), "growth")
    for name, of in found.items():
        values = {length: figures[kind] for length, figures in of.items() if kind in figures}
        exponent = growth(values)
        cells = (f"{values[n]:,.2f}" if n in values else "-" for n in lengths)
        line(name, *cells, "-" if exponent is None else f"{exponent:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="token mixers against the length of a row")
    parser.add_argument("--mixers", default=",".join(n for n in MIXERS if n != "hybrid"))
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--span", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=4096, help="MiB")
    parser.add_argument("--topology")
    parser.add_argument("--record", type=Path, help="file of figures that are kept and shown")
    arguments = parser.parse_args()
    size = Size(dim=arguments.dim, span=arguments.span, head=arguments.head)

    keep_freed_memory()
    tpu.quiet_libtpu()
    take = partial(measured, rounds=arguments.rounds, limit=arguments.limit)
    if arguments.topology is not None:
        take = partial(modelled, topology=tpu.parse(arguments.topology))

    rows = []
    if arguments.record and arguments.record.exists():
        rows = [json.loads(line) for line in arguments.record.read_text().splitlines()]
    for name in filter(None, arguments.mixers.split(",")):
        mixer = MIXERS[name](size, 0)
        for length in map(int, arguments.lengths.split(",")):
            figures = take(mixer, length, size.dim) | {READ: read_by_a_token(mixer, length)}
            said = ", ".join(f"{value:,.2f} {kind}" for kind, value in figures.items())
            print(f"{name} at {length}: {said}", flush=True)
            rows.append({"mixer": name, "length": length, "figures": figures})
            if arguments.record:
                with arguments.record.open("a") as file:
                    print(json.dumps(rows[-1]), file=file)
    found: dict[str, dict[int, Figures]] = {}
    for row in rows:
        found.setdefault(row["mixer"], {})[row["length"]] = row["figures"]
    for kind in (*(HERE if arguments.topology is None else MODELLED), READ):
        show(kind, found)


if __name__ == "__main__":
    main()
