"""Differential equations that a network solves (Raissi et al. 2019, arXiv 1711.10561).

The mean squared residual at points inside is the loss; what is given at the edge holds by
construction (Lagaris et al. 1998, arXiv physics/9705023). The exact solution is only compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Array

Solution = Callable[[Array], Array]  # points [n, 2] -> u [n], each from its own point alone
EquationName = Literal["poisson", "burgers"]


def slopes(f: Callable[[Array], Any], axis: int) -> Callable[[Array], tuple[Any, Any]]:
    """Points -> (f, df / dx_axis); slopes of slopes give ((f, f'), (f', f''))."""

    def both(points: Array) -> tuple[Any, Any]:
        along = jnp.zeros_like(points).at[:, axis].set(1)
        return jax.jvp(f, (points,), (along,))

    return both


class Equation:
    """The base: two variables, each between two ends."""

    names: ClassVar[tuple[str, str]]
    low: ClassVar[tuple[float, float]]
    high: ClassVar[tuple[float, float]]

    def residual(self, u: Solution, points: Array) -> Array:
        """What is 0 for a solution: [n]."""
        raise NotImplementedError

    def given(self, free: Solution) -> Solution:
        """What meets the conditions at the edge, whatever `free` is."""
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

    def residual(self, u: Solution, points: Array) -> Array:
        curvature = sum(slopes(slopes(u, i), i)(points)[1][1] for i in range(2))
        return curvature + 2 * jnp.pi**2 * jnp.sin(jnp.pi * points).prod(-1)

    def given(self, free: Solution) -> Solution:
        return lambda points: (1 - points**2).prod(-1) * free(points)

    def exact(self, points: np.ndarray) -> np.ndarray:
        return np.sin(np.pi * points).prod(-1)


@dataclass(frozen=True)
class Burgers(Equation):
    """u_t + u u_x = v u_xx on [-1, 1], t in [0, 1]; u = -sin(pi x) at t = 0, and 0 at both ends.

    `given` is odd in x, as the equation and the start are. A front in the wrong place has next to
    no residual, so that nothing else would keep it at x = 0.
    """

    names: ClassVar = ("x", "t")
    low: ClassVar = (-1.0, 0.0)
    high: ClassVar = (1.0, 1.0)
    viscosity: float = 0.01 / np.pi

    def __post_init__(self) -> None:
        if not self.viscosity > 0:
            raise ValueError(f"viscosity: {self.viscosity}; need more than 0")

    def residual(self, u: Solution, points: Array) -> Array:
        (value, u_x), (_, u_xx) = slopes(slopes(u, 0), 0)(points)
        _, u_t = slopes(u, 1)(points)
        return u_t + value * u_x - self.viscosity * u_xx

    def given(self, free: Solution) -> Solution:
        def u(points: Array) -> Array:
            x, t = points[:, 0], points[:, 1]
            odd = free(points) - free(points * jnp.array([-1, 1]))
            return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * odd

        return u

    def inside(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return np.abs(super().inside(rng, n))  # the other half is the same

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
