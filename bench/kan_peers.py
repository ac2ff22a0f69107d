"""One Kolmogorov-Arnold layer beside those of jaxkan, pykan and efficient-kan: see bench/kan.py.

Each package runs in a process of its own and does the same work: forward, and the gradients of all
parameters and of x. Splines have the same weights everywhere, and what they give is compared.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from bestiary.layers import KAN, RBF, Basis, BSpline, Chebyshev, Fourier, Legendre, Sine
from bestiary.train.runtime import keep_freed_memory

Shape = tuple[int, int, int]  # inputs, outputs, rows
Key = tuple[str, str]  # package and layer

SHAPES: tuple[Shape, ...] = ((64, 64, 256), (128, 128, 512), (784, 64, 64))
INTERVALS, ORDER = 5, 3
SIZE = INTERVALS + ORDER  # functions of every basis
TURN = 0.1  # seconds, about
SLOW = 0.2  # seconds of a step, from which on one turn has to do

BASES: dict[str, Basis] = {
    "spline": BSpline(num_intervals=INTERVALS, order=ORDER),
    "moved knots": BSpline(num_intervals=INTERVALS, order=ORDER, adaptive=True),
    "chebyshev": Chebyshev(degree=SIZE - 1),
    "legendre": Legendre(degree=SIZE - 1),
    "fourier": Fourier(frequencies=SIZE // 2),
    "rbf": RBF(num_centres=SIZE, norm=False),
    "sine": Sine(num=SIZE),
}
PEERS = {
    "jaxkan": ("spline", "base", "chebyshev", "legendre", "fourier", "rbf", "sine"),
    "torch": ("pykan", "efficient-kan"),
}


class Program(NamedTuple):
    """A step, which returns y and the gradient of x, and its temporary MiB where it is compiled."""

    run: Callable[[], tuple[Any, Any]]
    memory: float | None = None


class Reply(NamedTuple):
    """Of the steps asked for, ms each; and what one more before them gave."""

    ms: float
    memory: Any
    outputs: tuple[np.ndarray, ...]


def arguments(shape: Shape) -> tuple[np.ndarray, ...]:
    """The same in every process: x [rows, inputs], the gradient of y [rows, outputs], and the
    weights of splines [size, inputs, outputs] and of the base [inputs, outputs]."""
    inputs, outputs, rows = shape
    draw = np.random.default_rng(0)
    dy, weight, base = (
        draw.standard_normal(size, np.float32)
        for size in ((rows, outputs), (SIZE, inputs, outputs), (inputs, outputs))
    )
    return draw.uniform(-1, 1, (rows, inputs)).astype(np.float32), dy, weight, base


# --- the programs ---------------------------------------------------------------------------------


def compiled(apply: Callable[..., jax.Array], params: Any, shape: Shape) -> Program:
    args = jax.device_put((params, *arguments(shape)[:2]))

    @jax.jit
    def step(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, gradients = jax.vjp(apply, params, x)
        return y, gradients(dy)

    program = step.lower(*args).compile()
    analysis: Any = program.memory_analysis()

    def run() -> tuple[Any, Any]:
        y, (_, dx) = jax.block_until_ready(program(*args))
        return y, dx

    return Program(run, analysis.temp_size_in_bytes / 2**20)


def bestiary(name: str, shape: Shape) -> Program:
    inputs, outputs, _ = shape
    weight, base = arguments(shape)[2:]
    if name == "fourier":  # as the peer, without a base
        kan = KAN(inputs=inputs, outputs=outputs, basis=BASES[name], base=None)
        return compiled(kan.apply, kan.init(jax.random.key(0)), shape)
    kan = KAN(inputs=inputs, outputs=outputs, basis=BASES[name])
    params = kan.init(jax.random.key(0)) | {"weight": weight, "base": base}
    return compiled(kan.apply, params, shape)


def jaxkan(name: str, shape: Shape) -> Program:
    from flax import nnx
    from jaxkan.layers import get_layer  # type: ignore

    inputs, outputs, _ = shape
    weight, base = arguments(shape)[2:]
    options: dict[str, Any] = {"n_in": inputs, "n_out": outputs, "add_bias": False}
    if name in ("spline", "base"):
        layer = get_layer(name)(k=ORDER, G=INTERVALS, external_weights=False, **options)
        layer.c_basis[...] = weight.transpose(2, 1, 0).reshape(layer.c_basis.shape)
        layer.c_res[...] = base.T.reshape(layer.c_res.shape)
    elif name == "fourier":
        layer = get_layer(name)(D=SIZE // 2, **options)
    else:  # polynomials count their degree
        degree = SIZE - (name in ("chebyshev", "legendre"))
        layer = get_layer(name)(D=degree, residual=nnx.silu, **options)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return compiled(lambda params, x: nnx.merge(graph, params, rest)(x), params, shape)


def torch(name: str, shape: Shape) -> Program:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(2)
    inputs, outputs, _ = shape
    x, dy, weight, base = map(torch.tensor, arguments(shape))
    x.requires_grad_()
    if name == "pykan":
        here = os.path.dirname(__file__)  # whose kan.py would be taken for it
        sys.path[:] = [path for path in sys.path if path != here]
        from kan.KANLayer import KANLayer  # type: ignore

        layer = KANLayer(inputs, outputs, num=INTERVALS, k=ORDER)
        layer.coef.data = weight.permute(1, 2, 0).contiguous()
        layer.scale_base.data, layer.scale_sp.data = base, torch.ones_like(base)
        leaves = [layer.coef, layer.scale_base, layer.scale_sp]

        def forward() -> torch.Tensor:
            return layer(x)[0]
    else:  # efficient-kan is in no package index: its formula
        step = 2 / INTERVALS
        knots = (torch.arange(-ORDER, INTERVALS + ORDER + 1) * step - 1).expand(inputs, -1)
        leaves = [weight.permute(2, 1, 0).flatten(1), base.T.contiguous()]
        leaves = [leaf.contiguous().requires_grad_() for leaf in leaves]

        def forward() -> torch.Tensor:
            z = x[..., None]
            basis = ((z >= knots[:, :-1]) & (z < knots[:, 1:])).to(z.dtype)
            for p in range(1, ORDER + 1):
                rise = (z - knots[:, : -p - 1]) / (knots[:, p:-1] - knots[:, : -p - 1])
                fall = (knots[:, p + 1 :] - z) / (knots[:, p + 1 :] - knots[:, 1:-p])
                basis = rise * basis[..., :-1] + fall * basis[..., 1:]
            return F.linear(F.silu(x), leaves[1]) + F.linear(basis.flatten(1), leaves[0])

    def run() -> tuple[Any, Any]:
        y = forward()
        return y.detach(), torch.autograd.grad(y, [x, *leaves], dy)[0]

    return Program(run)


BUILD = {"bestiary": bestiary, "jaxkan": jaxkan, "torch": torch}


# --- in turns -------------------------------------------------------------------------------------


def worker(pipe: Connection, package: str) -> None:
    """Answers (name, shape, steps) until it gets None."""
    keep_freed_memory()
    build = cache(BUILD[package])
    while request := pipe.recv():
        name, shape, steps = request
        program = build(name, shape)
        outputs = tuple(np.array(a) for a in program.run())  # warms up, too
        start = time.perf_counter()
        for _ in range(steps):
            program.run()
        ms = 1e3 * (time.perf_counter() - start) / max(steps, 1)
        pipe.send(Reply(ms, program.memory, outputs))


def layers(shapes: Sequence[Shape], rounds: int) -> None:
    """Prints, for each shape, ms and temporary MiB of every layer, and the ratios to ours."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}  # pykan imports matplotlib
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for package in BUILD:
        pipes[package], theirs = context.Pipe()
        context.Process(target=worker, args=(theirs, package), daemon=True).start()
        theirs.close()

    def ask(key: Key, shape: Shape, steps: int) -> Reply:
        package, name = key
        pipes[package].send((name, shape, steps))
        return pipes[package].recv()

    keys = [("bestiary", name) for name in BASES]
    keys += [(package, name) for package, names in PEERS.items() for name in names]
    for shape in shapes:
        first = {key: ask(key, shape, 0) for key in keys}
        once = {key: ask(key, shape, 1).ms / 1e3 for key in keys}
        times: dict[Key, list[float]] = {key: [] for key in keys}
        for turn in range(rounds):
            for key in keys:
                if once[key] < SLOW or turn == 0:
                    steps = max(1, round(TURN / once[key]))
                    times[key].append(ask(key, shape, steps).ms)
        report(shape, {key: median(values) for key, values in times.items()}, first)
    for pipe in pipes.values():
        pipe.send(None)


def report(shape: Shape, ms: dict[Key, float], first: dict[Key, Reply]) -> None:
    """Ratios are to our layer of the same basis; differences from our spline are relative."""
    inputs, outputs, rows = shape
    print(f"\n{inputs} x {outputs}, {rows} rows, {SIZE} functions of each input\n")
    print("| layer | ms | times ours | temporary MiB | times ours | difference |")
    print("|---|---:|---:|---:|---:|---:|")
    truth = first["bestiary", "spline"].outputs
    for key, reply in first.items():
        basis = key[1] if key[1] in BASES else "spline"
        ours = "bestiary", basis
        cells = [f"{ms[key]:.2f}", f"{ms[key] / ms[ours]:.2f}", "", "", ""]
        if reply.memory is not None:
            cells[2:4] = f"{reply.memory:.2f}", f"{reply.memory / first[ours].memory:.2f}"
        if basis in ("spline", "moved knots"):
            pairs = zip(truth, reply.outputs, strict=True)
            error = max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in pairs)
            cells[4] = f"{error:.0e}"
        print(f"| {' '.join(key)} | {' | '.join(cells)} |", flush=True)
