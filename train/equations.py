"""Differential equations that a network solves (Raissi et al. 2019, arXiv 1711.10561).

The residual at points inside and the conditions at the edge are the loss; the exact solution is
only compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Array

Solution = Callable[[Array], Array]  # points [n, 2] -> u [n], each from its own point alone
EquationName = Literal["poisson", "burgers"]


def derivative(u: Solution, axis: int) -> Solution:
    """du / dx_axis, again a function of points; derivatives of derivatives nest."""

    def du(points: Array) -> Array:
        along = jnp.zeros_like(points).at[:, axis].set(1)
        return jax.jvp(u, (points,), (along,))[1]

    return du


class Equation:
    """The base: two variables, each between two ends."""

    names: ClassVar[tuple[str, str]]
    low: ClassVar[tuple[float, float]]
    high: ClassVar[tuple[float, float]]
    residual_weight: ClassVar[float]
    """Of the mean squared residual, beside the mean squared error of the conditions."""

    def residual(self, u: Solution, points: Array) -> Array:
        """What is 0 for a solution: [n]."""
        raise NotImplementedError

    def conditions(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n points [n, 2] where the solution is given, and its values [n]."""
        raise NotImplementedError

    def exact(self, points: np.ndarray) -> np.ndarray:
        """The solution, float64: [n, 2] -> [n]."""
        raise NotImplementedError

    def inside(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.uniform(self.low, self.high, (n, 2))


@dataclass(frozen=True)
class Poisson(Equation):
    """u_xx + u_yy = -2 pi^2 sin(pi x) sin(pi y) on [-1, 1]^2, 0 at the edge (pykan's example)."""

    names: ClassVar = ("x", "y")
    low: ClassVar = (-1.0, -1.0)
    high: ClassVar = (1.0, 1.0)
    residual_weight: ClassVar = 0.01

    def residual(self, u: Solution, points: Array) -> Array:
        curvature = sum(derivative(derivative(u, i), i)(points) for i in range(2))
        return curvature + 2 * jnp.pi**2 * jnp.sin(jnp.pi * points).prod(-1)

    def conditions(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        points = rng.uniform(-1, 1, (n, 2))
        side = rng.integers(4, size=n)
        points[np.arange(n), side % 2] = np.where(side < 2, -1.0, 1.0)
        return points, np.zeros(n)

    def exact(self, points: np.ndarray) -> np.ndarray:
        return np.sin(np.pi * points).prod(-1)


@dataclass(frozen=True)
class Burgers(Equation):
    """u_t + u u_x = v u_xx on [-1, 1], t in [0, 1]; u = -sin(pi x) at t = 0, and 0 at both ends."""

    names: ClassVar = ("x", "t")
    low: ClassVar = (-1.0, 0.0)
    high: ClassVar = (1.0, 1.0)
    residual_weight: ClassVar = 1.0
    viscosity: float = 0.01 / np.pi

    def __post_init__(self) -> None:
        if not self.viscosity > 0:
            raise ValueError(f"viscosity: {self.viscosity}; need more than 0")

    def residual(self, u: Solution, points: Array) -> Array:
        u_x, u_t = derivative(u, 0), derivative(u, 1)
        u_xx = derivative(u_x, 0)(points)
        return u_t(points) + u(points) * u_x(points) - self.viscosity * u_xx

    def conditions(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        points = self.inside(rng, n)
        first = n // 2
        points[:first, 1] = 0
        points[first:, 0] = np.where(rng.uniform(size=n - first) < 0.5, -1.0, 1.0)
        return points, np.where(points[:, 1] == 0, -np.sin(np.pi * points[:, 0]), 0.0)

    def exact(self, points: np.ndarray) -> np.ndarray:
        """By the transform of Cole and Hopf: u is the mean of -sin(pi (x - s)) over s with weights
        exp(-s^2 / 4 v t - cos(pi (x - s)) / 2 pi v), by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite.hermgauss(120)
        x, t = points[:, :1], np.maximum(points[:, 1:], 1e-12)
        at = np.pi * (x - np.sqrt(4 * self.viscosity * t) * nodes)
        exponent = -np.cos(at) / (2 * np.pi * self.viscosity)
        share = weights * np.exp(exponent - exponent.max(1, keepdims=True))
        return -(np.sin(at) * share).sum(1) / share.sum(1)


EQUATIONS: dict[EquationName, type[Equation]] = {"poisson": Poisson, "burgers": Burgers}
