"""Fitting a function to samples: by a KAN over a schedule of grids, or by a perceptron."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.activations import Silu
from bestiary.layers.base import Array, Layer, Tree, params_of
from bestiary.layers.kan_bases import RBF, RSWAF, Fourier, Rational, ReLUBasis, Sine
from bestiary.layers.kan_basis import Basis
from bestiary.layers.kan_net import KANNet, update_grids
from bestiary.layers.kan_polynomials import Chebyshev, Gram, Jacobi, Legendre
from bestiary.layers.kan_spline import BSpline
from bestiary.layers.kan_wavelets import Wavelet
from bestiary.layers.perceptron import Perceptron, perceptron
from bestiary.train.minimise import Method, minimise
from bestiary.train.samples import Samples

BasisName = Literal[
    "spline",
    "rbf",
    "rswaf",
    "chebyshev",
    "legendre",
    "jacobi",
    "gram",
    "fourier",
    "sine",
    "relu",
    "rational",
    "mexican_hat",
    "morlet",
    "dog",
    "meyer",
    "shannon",
]
GRID_UPDATES = 10  # at the first steps of a stage, 5 steps apart (pykan's schedule)

Network = KANNet | Perceptron
Widths = tuple[int | tuple[int, int], ...]
Penalty = Callable[[KANNet, Tree, Array], Array]


def basis(name: BasisName, num_intervals: int) -> Basis:
    """With as many functions as cubic splines on so many intervals have; a wavelet or a rational
    function is one."""
    size = num_intervals + 3
    match name:
        case "spline":
            return BSpline(num_intervals=num_intervals, adaptive=True, noise=0.3)
        case "rbf":
            return RBF(num_centres=size, norm=False)
        case "rswaf":
            return RSWAF(num_centres=size, norm=False)
        case "chebyshev":
            return Chebyshev(degree=size - 1)
        case "legendre":
            return Legendre(degree=size - 1)
        case "jacobi":
            return Jacobi(degree=size - 1)
        case "gram":
            return Gram(degree=size - 1)
        case "fourier":
            return Fourier(frequencies=max(size // 2, 1))
        case "sine":
            return Sine(num=size)
        case "relu":
            return ReLUBasis(num_intervals=num_intervals, outside="normalise")
        case "rational":
            return Rational()
        case _:
            return Wavelet(kind=name)


def kan(widths: Widths, name: BasisName, num_intervals: int) -> KANNet:
    base = None if name == "rational" else Silu()  # which has an activation within
    kind = basis(name, num_intervals)
    return KANNet(dims=widths, basis=kind, base=base, mask=True, bias=True)


def mlp(widths: Widths, activation: Layer) -> Perceptron:
    """Raises ValueError for multiplying nodes."""
    if not all(isinstance(width, int) for width in widths):
        raise ValueError("layers: multiplying nodes; need --network kan for them")
    return perceptron(widths, lambda width: activation)  # type: ignore[arg-type]


def num_trained(net: Layer) -> int:
    return sum(p.size for p in params_of(net.declare()) if p.trainable)


class Scaling(NamedTuple):
    """Inputs to [-1, 1] and the target to mean 0 and standard deviation 1, by the training rows.

    `of` raises ValueError for a column that is the same in all of these.
    """

    middle: np.ndarray
    radius: np.ndarray
    mean: float
    std: float

    @staticmethod
    def of(samples: Samples) -> "Scaling":
        x, y = samples.x, samples.y
        radius = np.ptp(x, 0) / 2
        columns = dict(zip(samples.names, radius, strict=True)) | {samples.target: np.ptp(y)}
        for name, width in columns.items():
            if width == 0:
                what = f"column {name} is the same in the {len(y)} rows to train on"
                raise ValueError(f"test-fraction: {what}; need a smaller one, or other rows")
        return Scaling(x.min(0) + radius, radius, float(y.mean()), float(y.std()))

    def apply(self, samples: Samples) -> tuple[Array, Array]:
        x = (samples.x - self.middle) / self.radius
        y = (samples.y - self.mean) / self.std
        return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def divide(samples: Samples, test_fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Rows to train on and rows to test on, at random but by the seed.

    Raises ValueError where fewer than 2 are left to train on.
    """
    order = np.random.default_rng(seed).permutation(len(samples.y))
    n = round(test_fraction * len(order))
    if len(order) - n < 2:
        left = f"leaves {len(order) - n} rows to train on"
        raise ValueError(f"test-fraction: {test_fraction}; {left}; need at least 2")
    parts = (order[n:], order[:n])
    train, test = (samples._replace(x=samples.x[at], y=samples.y[at]) for at in parts)
    return train, test


def mean_square(net: Network, params: Tree, data: tuple[Array, Array]) -> Array:
    """Of the errors at x [n, inputs], y [n]."""
    x, y = data
    return jnp.mean(jnp.square(net.apply(params, x)[..., 0] - y))


@partial(jax.jit, static_argnums=0)
def rmse(net: Network, params: Tree, data: tuple[Array, Array]) -> Array:
    return jnp.sqrt(mean_square(net, params, data))


def regridding(net: Network, x: Array) -> Callable[[Tree], Tree] | None:
    """Moves the knots of parameters to where their inputs are; None for a network without."""
    if isinstance(net, KANNet) and isinstance(net.basis, BSpline) and net.basis.adaptive:
        kan = net
        return jax.jit(lambda params: update_grids(kan, params, x))
    return None


def stage(
    net: Network,
    params: Tree,
    train: tuple[Array, Array],
    *,
    steps: int,
    method: Method,
    learning_rate: float,
    watch: Callable[[int, Tree], None],
    penalty: Penalty | None = None,
    factor: float = 0.0,
) -> Tree:
    """The parameters after `steps` on the mean squared error at `train` (x [n, inputs], y [n]),
    plus `factor` times the penalty; the knots of splines follow their inputs meanwhile.

    `watch(step, parameters)` is called about 40 times.
    """

    def loss(params: Tree, data: Any) -> Array:
        error = mean_square(net, params, data)
        if penalty is None or not isinstance(net, KANNet):
            return error
        return error + factor * penalty(net, params, data[0])

    chunk, now = max(5, steps // 40), params
    for step, now, _ in minimise(
        loss,
        net.declare(),
        params,
        train,
        steps=steps,
        method=method,
        learning_rate=learning_rate,
        chunk=chunk,
        between=regridding(net, train[0]),
        times=min(GRID_UPDATES, steps // (2 * chunk)),
    ):
        watch(step, now)
    return now
