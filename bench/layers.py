"""Every layer beside straightforward, eager PyTorch: forward and backward, on the same weights.

    python bench/layers.py                                   # milliseconds of both, and the ratio
    python bench/layers.py --layers moe_olmoe,pkm --tokens 4096 --dim 1024

A layer and its peer (bench/peers.py) take turns in processes of their own, 2 threads each. Before
any timing, outputs and all gradients are compared; "difference" is the largest, relative to the
norm of the array: about 1e-6 by rounding, and up to 1e-2 where near-ties of a top-k among many go
another way in the other program (with few tokens there are none).
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import freed_memory
import jax
import numpy as np
import peers
import torch
from torch import Tensor

from bestiary.layers import (
    MLA,
    MLP,
    PEER,
    PKM,
    Attention,
    BlockFFN,
    GaussianGLU,
    LatentExperts,
    Layer,
    MemoryPlus,
    MemoryTable,
    MoHDFFN,
    PolyNorm,
    SparkFFN,
    SubDimensions,
    UltraMemV2,
)
from bestiary.layers.base import flatten
from bestiary.zoo.ling import ling_ffn
from bestiary.zoo.llama import swiglu
from bestiary.zoo.mixtures import olmoe_ffn

TOLERANCE = 1e-2
Arrays = dict[str, Any]
Peer = Callable[[Any, Arrays, Tensor], Tensor]
Step = Callable[[], Arrays]


def layers(dim: int) -> dict[str, tuple[Layer, Peer]]:
    """The published proportions at another width; tables of 65536 rows or about as many."""
    heads, hidden = max(1, dim // 64), 4 * dim
    router = olmoe_ffn(dim, 64, 8, swiglu(dim, dim // 2)).router
    keys: dict[str, Any] = {"dim": dim, "num_keys": 256, "key_dim": dim}
    table = MemoryTable(
        rows=4 * 180**2, dim=dim // 4, pre_dim=dim // 4, slices=2, reads=4 * 32, std=1.0
    )
    spark = SparkFFN(dim=dim, hidden=6 * dim, predictor_dim=dim // 2, top_k=round(0.48 * dim))
    gate = SubDimensions(dim=dim, num=16, num_shared=6, top_k=2)
    latent = LatentExperts(router=router, group_size=8, latent=dim // 4, hidden=dim // 4)
    mla = MLA(
        dim=dim,
        num_heads=heads,
        kv_rank=dim // 4,
        q_rank=dim // 2,
        nope_dim=64,
        rope_dim=32,
        value_dim=64,
    )
    return {
        "spark_ffn": (spark, peers.spark_ffn),
        "gaussian_glu": (GaussianGLU(dim=dim, hidden=hidden), peers.gaussian_glu),
        "poly_norm_mlp": (
            MLP(dim=dim, hidden=hidden, activation=PolyNorm()),
            peers.poly_norm_mlp,
        ),
        "block_ffn": (
            BlockFFN(dim=dim, num_experts=hidden // 64, expert_dim=64),
            peers.block_ffn,
        ),
        "mohd_ffn": (MoHDFFN(gate=gate, hidden=hidden), peers.mohd_ffn),
        "moe_olmoe": (olmoe_ffn(dim, 64, 8, swiglu(dim, dim // 2)), peers.moe),
        "moe_ling": (ling_ffn(dim, dim // 4, num_experts=64), peers.moe),
        "latent_experts": (latent, peers.latent_experts),
        "pkm": (PKM(**keys, num_heads=4, top_k=32), peers.pkm),
        "memory_plus": (MemoryPlus(**keys, num_heads=2, top_k=80), peers.memory_plus),
        "peer": (PEER(**keys, num_heads=8, top_k=16), peers.peer),
        "ultramem_v2": (
            UltraMemV2(
                dim=dim, key_dim=dim // 4, top_k=32, num_layers=4, share_ratio=0.5, table=table
            ),
            peers.ultramem_v2,
        ),
        "attention": (
            Attention(dim=dim, num_heads=heads, num_kv_heads=max(1, heads // 4), head_dim=64),
            peers.attention,
        ),
        "mla": (mla, peers.mla),
    }


def trained(layer: Layer) -> list[str]:
    return [path for path, p in flatten(layer.declare()) if p.trainable]


def bestiary_step(layer: Layer, peer: Peer, params: Arrays, x: Any, dy: Any) -> Step:
    del peer

    @jax.jit
    def run(params: Arrays, x: jax.Array, dy: jax.Array) -> Arrays:
        y, gradient = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        grads, dx = gradient(dy)
        grads = dict(flatten(grads))
        return {"y": y, "x": dx} | {path: grads[path] for path in trained(layer)}

    params, x, dy = jax.device_put((params, x, dy))
    return lambda: jax.block_until_ready(run(params, x, dy))


def torch_step(layer: Layer, peer: Peer, params: Arrays, x: Any, dy: Any) -> Step:
    torch.set_num_threads(2)

    def tensor(path: str, array: np.ndarray) -> Any:
        if path.startswith("experts/"):  # as in a list of modules
            return [torch.tensor(one, requires_grad=True) for one in array]
        return torch.tensor(array, requires_grad=path in paths)

    paths = trained(layer)
    weights = {path: tensor(path, array) for path, array in flatten(params)}
    inputs, dy = torch.tensor(x, requires_grad=True), torch.tensor(dy)
    wanted = {"x": inputs} | {path: weights[path] for path in paths}

    def run() -> Arrays:
        y = peer(layer, weights, inputs)
        leaves, tree = jax.tree.flatten(wanted)
        grads = torch.autograd.grad(y, leaves, dy)
        return {"y": y.detach()} | jax.tree.unflatten(tree, grads)

    return run


def worker(pipe: Connection, build: Callable[..., Step], *arguments: Any) -> None:
    """Sends what a step gives, then times as many steps as it is told, until it is told none."""
    run = build(*arguments)
    results = run()
    pipe.send(
        {path: np.stack(a) if isinstance(a, list) else np.asarray(a) for path, a in results.items()}
    )
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            run()
        pipe.send((time.perf_counter() - start) / steps * 1e3)


def difference(a: Arrays, b: Arrays) -> tuple[float, str]:
    """The largest, relative to the norm, and where it is."""

    def one(path: str) -> float:
        return float(np.linalg.norm(a[path] - b[path]) / np.linalg.norm(a[path]))

    return max((one(path), path) for path in a)


def compare(name: str, layer: Layer, peer: Peer, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    params = jax.tree.map(np.asarray, layer.init(jax.random.key(0)))
    length = min(options.length, options.tokens)
    shape = 2, options.tokens // length, length, options.dim
    x, dy = np.random.default_rng(0).standard_normal(shape, np.float32)
    arguments = layer, peer, params, x, dy
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for build in (torch_step, bestiary_step):
        mine, theirs = context.Pipe()
        pipes.append(mine)
        workers.append(context.Process(target=worker, args=(theirs, build, *arguments)))
        workers[-1].start()
    largest, where = difference(*(pipe.recv() for pipe in pipes))
    if not largest < TOLERANCE:
        for process in workers:
            process.terminate()
        sys.exit(f"{name}: {where} differs by {largest:.1e} of its norm; no time was taken")
    times: list[list[float]] = [[], []]
    for turn in range(options.rounds + 1):
        for pipe, values in zip(pipes, times, strict=True):
            pipe.send(options.steps)
            milliseconds = pipe.recv()
            if turn:  # the first is to warm up
                values.append(milliseconds)
    for pipe, process in zip(pipes, workers, strict=True):
        pipe.send(0)
        process.join()
    theirs, ours = map(statistics.median, times)
    millions = layer.count().total / 1e6
    return [
        name,
        *(f"{value:.1f}" for value in (millions, theirs, ours)),
        f"{theirs / ours:.2f}",
        f"{largest:.0e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="layers beside eager PyTorch on the CPU")
    parser.add_argument("--layers", help="names, separated by commas; by default all")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence, at most")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="in one turn")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    # both workers keep freed memory: glibc would hand it back to the kernel after every step
    os.environ |= {"JAX_PLATFORMS": "cpu"} | freed_memory.KEEP
    known = layers(options.dim)
    names = options.layers.split(",") if options.layers else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--layers: unknown {unknown[0]!r}; known: {', '.join(known)}")

    def line(*cells: str) -> None:
        print(cells[0].ljust(16), *(cell.rjust(12) for cell in cells[1:]), flush=True)

    line("layer", "M parameters", "pytorch ms", "bestiary ms", "ratio", "difference")
    for name in names:
        line(*compare(name, *known[name], options))


if __name__ == "__main__":
    main()
