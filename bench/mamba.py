"""Mamba-2 on the CPU: time per token against length, and against the mixer of HF transformers.

    python bench/mamba.py                       # lengths 1k to 16k, then both programs in turns
    python bench/mamba.py --dim 768 --tokens 2048 --parts peer

Forward and backward of one mixer. A step has equally many tokens at every length. Beside
transformers' torch program (2 threads each, in turns, in processes of their own) outputs and all
gradients are compared first, on the same weights.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import freed_memory
import jax
import numpy as np

from bestiary.layers import Mamba2
from bestiary.layers.base import flatten

LENGTHS = (1024, 2048, 4096, 8192, 16384)
PARTS = "z", "x", "B", "C", "dt"
Step = Callable[[], dict[str, Any]]


def mixer(dim: int, chunk: int) -> Mamba2:
    return Mamba2(dim=dim, num_heads=2 * dim // 64, chunk=chunk)


def arguments(layer: Mamba2, batch: int, length: int) -> tuple[Any, Any, Any]:
    """Parameters, inputs and the gradient of the outputs."""
    params = jax.tree.map(np.asarray, layer.init(jax.random.key(0)))
    shape = 2, batch, length, layer.dim
    return params, *np.random.default_rng(0).standard_normal(shape, np.float32)


def bestiary_step(layer: Mamba2, params: Any, x: Any, dy: Any) -> Step:
    @jax.jit
    def run(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, gradient = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        return y, *gradient(dy)

    args = jax.device_put((params, x, dy))

    def step() -> dict[str, Any]:
        y, grads, dx = jax.block_until_ready(run(*args))
        return {"y": y, "x": dx} | dict(flatten(grads))

    return step


def transformers_step(layer: Mamba2, params: Any, x: Any, dy: Any) -> Step:
    """The published program on the same weights; gradients by our names."""
    import torch
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.set_num_threads(2)
    config = Mamba2Config(
        hidden_size=layer.dim,
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        state_size=layer.state,
        n_groups=layer.groups,
        num_hidden_layers=1,
    )
    module = Mamba2Mixer(config, layer_idx=0)
    weights = {path: torch.tensor(array) for path, array in flatten(params)}
    joined = {
        "in_proj.weight": torch.cat([weights[f"in_{name}"] for name in PARTS], 1).T,
        "conv1d.weight": torch.cat([weights[f"conv_{name}/weight"] for name in "xBC"], 1).T[
            :, None
        ],
        "conv1d.bias": torch.cat([weights[f"conv_{name}/bias"] for name in "xBC"]),
        "norm.weight": weights["norm"],
        "out_proj.weight": weights["out"].T,
    }
    joined |= {name: weights[name] for name in ("dt_bias", "A_log", "D")}
    module.load_state_dict(joined)
    leaves = dict(module.named_parameters())
    inputs, dy = torch.tensor(x, requires_grad=True), torch.tensor(dy)

    def run() -> dict[str, Any]:
        y = module(inputs)
        dx, *grads = torch.autograd.grad(y, [inputs, *leaves.values()], dy)
        return {"y": y.detach(), "x": dx} | dict(zip(leaves, grads, strict=True))

    def by_our_names() -> dict[str, Any]:
        grads = run()
        sizes = [weights[f"in_{name}"].shape[1] for name in PARTS]
        parts = grads.pop("in_proj.weight").T.split(sizes, 1)
        grads |= {f"in_{name}": part for name, part in zip(PARTS, parts, strict=True)}
        conv, bias = grads.pop("conv1d.weight")[:, 0].T, grads.pop("conv1d.bias")
        for name, w, b in zip(
            "xBC", conv.split(sizes[1:4], 1), bias.split(sizes[1:4]), strict=True
        ):
            grads |= {f"conv_{name}/weight": w, f"conv_{name}/bias": b}
        grads |= {"norm": grads.pop("norm.weight"), "out": grads.pop("out_proj.weight").T}
        return grads

    return by_our_names


def worker(pipe: Connection, build: Callable[..., Step], *arguments: Any) -> None:
    """Sends what a step gives, then times as many steps as it is told, until it is told none."""
    run = build(*arguments)
    pipe.send({path: np.asarray(a) for path, a in run().items()})
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            run()
        pipe.send((time.perf_counter() - start) / steps * 1e3)


def difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, str]:
    """The largest, relative to the norm, and where it is."""
    norm = np.linalg.norm
    return max((float(norm(a[path] - b[path]) / norm(a[path])), path) for path in a)


def in_turns(runs: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """The median of what each run returns; the first round warms up."""
    values = [{key: run() for key, run in runs.items()} for _ in range(rounds + 1)]
    return {key: statistics.median(row[key] for row in values[1:]) for key in runs}


def lengths(options: argparse.Namespace) -> None:
    """Microseconds per token of each length."""
    layer = mixer(options.dim, options.chunk)

    def timed(length: int) -> Callable[[], float]:
        step = bestiary_step(layer, *arguments(layer, LENGTHS[-1] // length, length))

        def run() -> float:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) / LENGTHS[-1] * 1e6

        return run

    medians = in_turns({length: timed(length) for length in LENGTHS}, options.rounds)
    print(f"width {options.dim}, {LENGTHS[-1]} tokens in a step, forward and backward")
    for length, value in medians.items():
        relative = value / medians[LENGTHS[0]]
        print(f"length {length:6d} {value:8.1f} us per token  x {relative:.2f}", flush=True)


def beside_transformers(options: argparse.Namespace) -> None:
    """Milliseconds of both programs, and their ratio."""
    layer = mixer(options.dim, options.chunk)
    batch = max(1, options.tokens // options.length)
    args = layer, *arguments(layer, batch, options.length)
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name, build in (("transformers", transformers_step), ("bestiary", bestiary_step)):
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=worker, args=(theirs, build, *args)))
        workers[-1].start()
    largest, where = difference(*(pipe.recv() for pipe in pipes.values()))

    def run(name: str) -> Callable[[], float]:
        def steps() -> float:
            pipes[name].send(2)
            return pipes[name].recv()

        return steps

    medians = in_turns({name: run(name) for name in pipes}, options.rounds)
    for pipe, process in zip(pipes.values(), workers, strict=True):
        pipe.send(0)
        process.join()
    print(f"width {options.dim}, {batch} sequences of {options.length}; both by the same weights:")
    print(f"largest difference {largest:.0e} of the norm, at {where}")
    for name, value in medians.items():
        print(f"{name:13s} {value:8.1f} ms")
    print(f"ratio {medians['transformers'] / medians['bestiary']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Mamba-2 on the CPU")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="beside transformers")
    parser.add_argument("--length", type=int, default=1024, help="beside transformers")
    parser.add_argument("--chunk", type=int, default=Mamba2(dim=64, num_heads=2).chunk)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="lengths,peer", help="lengths, peer or both")
    options = parser.parse_args()
    # freed memory is kept: glibc would hand it back to the kernel after every step
    os.environ |= {"JAX_PLATFORMS": "cpu"} | freed_memory.KEEP
    if "peer" in options.parts:
        beside_transformers(options)
    if "lengths" in options.parts:
        run = multiprocessing.get_context("spawn").Process(target=lengths, args=(options,))
        run.start()
        run.join()


if __name__ == "__main__":
    main()
