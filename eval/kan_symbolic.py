"""Formulas of KANs: every edge as a f(b x + c) + d, of functions f with names.

After pykan's symbolic regression (Liu et al. 2024, arXiv 2404.19756, section 2.5.1): b and c by a
search on a grid that zooms in, a and d by least squares. NumPy on samples; the network's forward
pass knows nothing of it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Array, Tree
from bestiary.layers.kan import edges
from bestiary.layers.kan_net import KANNet

SIMPLICITY = 0.8  # pykan's weight_simple
_NOISE = 1e-4  # what is missing of the variance below that tells nothing (pykan: 1e-5)
_POINTS = 200  # samples that an edge is fitted at


class Function(NamedTuple):
    """`of(numpy or jax.numpy, u)`; `complexity` is pykan's where it has one."""

    of: Callable[[Any, Any], Any]
    complexity: int


FUNCTIONS = {
    "0": Function(lambda m, u: 0 * u, 0),
    "x": Function(lambda m, u: u, 1),
    "x**2": Function(lambda m, u: u**2, 2),
    "x**3": Function(lambda m, u: u**3, 3),
    "x**4": Function(lambda m, u: u**4, 3),
    "1/x": Function(lambda m, u: 1 / u, 2),
    "1/x**2": Function(lambda m, u: 1 / u**2, 2),
    "sqrt": Function(lambda m, u: m.sqrt(u), 2),
    "exp": Function(lambda m, u: m.exp(u), 2),
    "log": Function(lambda m, u: m.log(u), 2),
    "sin": Function(lambda m, u: m.sin(u), 2),
    "abs": Function(lambda m, u: m.abs(u), 3),
    "tanh": Function(lambda m, u: m.tanh(u), 3),
    "exp(-x**2)": Function(lambda m, u: m.exp(-(u**2)), 3),
    "arctan": Function(lambda m, u: m.arctan(u), 4),
}
"""By name: what f may be. sin stands for cos too, by its phase."""


class Fit(NamedTuple):
    """a f(b x + c) + d with f of a name, and the share of the variance that it explains."""

    name: str
    a: float
    b: float
    c: float
    d: float
    r2: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.a * FUNCTIONS[self.name].of(np, self.b * x + self.c) + self.d

    def loss(self, simplicity: float = SIMPLICITY) -> float:
        """Simplicity and closeness in one number (pykan's)."""
        missing = np.log2(1 + _NOISE - min(self.r2, 1.0))
        return simplicity * FUNCTIONS[self.name].complexity + (1 - simplicity) * float(missing)


def fit(x: np.ndarray, y: np.ndarray, name: str) -> Fit:
    """The closest a f(b x + c) + d to y at x, both [n], for f of that name. r2 is -inf where f is
    nowhere defined on all of x."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if name == "0":
        return Fit(name, 0.0, 0.0, 0.0, float(y.mean()), 0.0 if np.ptp(y) > 0 else 1.0)
    middle, radius = (x.max() + x.min()) / 2, max(np.ptp(x) / 2, 1e-12)
    u = (x - middle) / radius
    if name == "x":
        b, c = 1.0, 0.0
    else:
        b, c, width = 0.0, 0.0, 10.0
        for sides in (41, *[13] * 12):  # even and odd functions alike are 0 or flat at b = 0
            near = np.linspace(-width, width, sides)
            bs, cs = (np.ravel(g) for g in np.meshgrid(b + near, c + near, indexing="ij"))
            best = int(np.argmax(_line(FUNCTIONS[name], u, y, bs, cs)[2]))
            b, c, width = bs[best], cs[best], width * (0.1 if sides == 41 else 0.35)
    a, d, r2 = (float(v[0]) for v in _line(FUNCTIONS[name], u, y, np.array([b]), np.array([c])))
    return Fit(name, a, float(b / radius), float(c - b * middle / radius), d, r2)


def _line(
    function: Function, u: np.ndarray, y: np.ndarray, b: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a and d of the least squares and r2, for every pair of b and c [pairs]."""
    with np.errstate(all="ignore"):
        f = function.of(np, b[:, None] * u + c[:, None])
        mean = f.mean(1)
        f = f - mean[:, None]
        power, target = (f**2).mean(1), y - y.mean()
        a = (f * target).mean(1) / power
        r2 = a**2 * power / (target**2).mean()
        # a pole between samples, or a sum that loses its digits, is no fit
        good = np.isfinite(r2) & (np.abs(mean) < 1e4 * np.sqrt(power)) & (np.abs(f).max(1) < 1e4)
    return a, y.mean() - a * mean, np.where(good, r2, -np.inf)


def suggest(x: np.ndarray, y: np.ndarray, names: tuple[str, ...] = tuple(FUNCTIONS)) -> list[Fit]:
    """Fits of y at x, both [n], the best compromise between closeness and simplicity first."""
    return sorted((fit(x, y, name) for name in names), key=Fit.loss)


class Edge(NamedTuple):
    """An edge that no mask hides, as a table and as the best fits of it."""

    layer: int
    output: int
    input: int
    x: np.ndarray  # [points], rising
    y: np.ndarray  # [points]
    fits: list[Fit]


def tables(net: KANNet, params: Tree, x: Array) -> Iterator[Edge]:
    """The function of every edge where the samples x [n, inputs] reach it, without fits.

    Raises ValueError when a basis mixes its inputs by a norm: its edges are no functions of one.
    """
    if net.basis.norm:
        raise ValueError("basis.norm: True; need False to look at edges one by one")
    for i, (kan, values) in enumerate(zip(net.layers, net.trace(params, x), strict=False)):
        order = jnp.sort(values, 0)[jnp.linspace(0, len(values) - 1, _POINTS).astype(int)]
        curves = np.asarray(edges(kan, params[str(i)], order), np.float64)
        mask = np.asarray(params[str(i)].get("mask", jnp.ones((kan.inputs, kan.outputs))))
        for o in range(kan.outputs):
            for j in range(kan.inputs):
                if mask[j, o]:
                    at = np.asarray(order[:, j], np.float64)
                    yield Edge(i, o, j, at, curves[:, o, j], [])


def fit_edges(
    net: KANNet, params: Tree, x: Array, names: tuple[str, ...] = tuple(FUNCTIONS)
) -> list[Edge]:
    """`tables` with fits by the functions of those names."""
    return [edge._replace(fits=suggest(edge.x, edge.y, names)) for edge in tables(net, params, x)]


def ranked(found: list[Edge], simplicity: float) -> list[Edge]:
    """The edges with their fits in the order of another `simplicity`, from 0 (closeness alone) to 1
    (simplicity alone)."""
    return [
        edge._replace(fits=sorted(edge.fits, key=lambda f: f.loss(simplicity))) for edge in found
    ]


class SymbolicNet(NamedTuple):
    """The network with a function of a name on every edge that is left. Its parameters are, for
    every layer, the coefficients [edges, 4] in the order of `edges`, and the biases [outputs]."""

    net: KANNet
    edges: tuple[tuple[tuple[int, int, str], ...], ...]
    """(output, input, name) of every layer."""

    def apply(self, params: list[Tree], x: Array, trees: Tree) -> Array:
        """x [n, inputs] -> [n, outputs]; `trees` are the parameters of the network itself."""
        for i, found in enumerate(self.edges):
            sums = [jnp.broadcast_to(b, x.shape[:-1]) for b in params[i]["bias"]]
            for k, (o, j, name) in enumerate(found):
                a, b, c, d = params[i]["edges"][k]
                sums[o] = sums[o] + a * FUNCTIONS[name].of(jnp, b * x[..., j] + c) + d
            x = self.net.connect(trees, i, jnp.stack(sums, -1))
        return x


def symbolic(net: KANNet, params: Tree, found: list[Edge]) -> tuple[SymbolicNet, list[Tree]]:
    """The best fits in the places of the edges, and their coefficients."""
    by_layer = [[edge for edge in found if edge.layer == i] for i in range(len(net.layers))]
    names = tuple(tuple((e.output, e.input, e.fits[0].name) for e in one) for one in by_layer)
    coefficients = [
        {
            "edges": jnp.array([e.fits[0][1:5] for e in one], jnp.float32).reshape(-1, 4),
            "bias": params[str(i)].get("bias", jnp.zeros(net.layers[i].outputs)),
        }
        for i, one in enumerate(by_layer)
    ]
    return SymbolicNet(net, names), coefficients
