"""Orthogonal polynomials as bases of KANs, by their three-term recurrences.

By default the argument is tanh(x), in [-1, 1] (`outside` "normalise"). Recurrences have finite
gradients at both ends, where the form cos(d arccos(u)) of the released programs has none. The layer
norm and SiLU that some of them put behind a layer belong to the network.
"""

import math

import jax.numpy as jnp

from bestiary.layers.base import Array, Initializer, Param, Tree, layer, normal, uniform
from bestiary.layers.kan_basis import EdgeAxes, GridBasis, Outside


@layer
class Polynomials(GridBasis):
    """Polynomials of degree 0 to `degree` on [-1, 1]; coefficients start normal with std 1 /
    (inputs (degree + 1)). Raises ValueError for a degree below 1."""

    degree: int = 3
    outside: Outside = "normalise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree < 1:
            raise ValueError(f"degree: {self.degree}; need at least 1")

    @property
    def size(self) -> int:
        return self.degree + 1

    def initial(self, inputs: int, outputs: int) -> Initializer:
        del outputs
        return normal(1 / (inputs * self.size))

    def domain(self, params: Tree) -> tuple[float, float]:
        del params
        return -1.0, 1.0

    def first(self, u: Array) -> Array:
        """The polynomial of degree 1."""
        return u

    def next(self, params: Tree, n: int, u: Array, p: Array, before: Array) -> Array:
        """The polynomial of degree n from those of degree n - 1 and n - 2."""
        raise NotImplementedError

    def functions(self, params: Tree, z: Array) -> Array:
        values = [jnp.ones_like(z), self.first(z)]
        for n in range(2, self.size):
            values.append(self.next(params, n, z, values[-1], values[-2]))
        return jnp.stack(values, -2)


@layer
class Chebyshev(Polynomials):
    """ChebyKAN (Sidharth et al. 2024, arXiv 2405.07200): T_n = 2 u T_(n-1) - T_(n-2)."""

    def next(self, params: Tree, n: int, u: Array, p: Array, before: Array) -> Array:
        del params, n
        return 2 * u * p - before


@layer
class Legendre(Polynomials):
    """n P_n = (2 n - 1) u P_(n-1) - (n - 1) P_(n-2)."""

    def next(self, params: Tree, n: int, u: Array, p: Array, before: Array) -> Array:
        del params
        return ((2 * n - 1) * u * p - (n - 1) * before) / n


@layer
class Jacobi(Polynomials):
    """P^(a, b), orthogonal under (1 - u)^a (1 + u)^b. Raises ValueError for a or b not above -1."""

    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("a", "b"):
            if getattr(self, name) <= -1:
                raise ValueError(f"{name}: {getattr(self, name)}; need more than -1")

    def first(self, u: Array) -> Array:
        return ((self.a - self.b) + (self.a + self.b + 2) * u) / 2

    def next(self, params: Tree, n: int, u: Array, p: Array, before: Array) -> Array:
        del params
        a, b, c = self.a, self.b, 2 * n + self.a + self.b
        slope = c * (c - 1) * (c - 2) * u + (c - 1) * (a * a - b * b)
        return (slope * p - 2 * (n + a - 1) * (n + b - 1) * c * before) / (
            2 * n * (n + a + b) * (c - 2)
        )


@layer
class Gram(Polynomials):
    """p_n = u p_(n-1) - w_(n-1) B_n p_(n-2), B_n = (2 n - 1) (n - 1)^2 (4 (n - 1)^2 - 1) / n^2,
    with trained w (the Gram KAN of Drokin 2024, arXiv 2407.01092).

    The w start normal with std 1 / (inputs (degree + 1)), the coefficients Xavier-uniform.
    """

    def initial(self, inputs: int, outputs: int) -> Initializer:
        return uniform(math.sqrt(6 / (self.size * (inputs + outputs))))

    def spec(self, inputs: int = 1, outputs: int = 1, axes: EdgeAxes = (None, None)) -> Tree:
        beta = Param((self.size,), (None,), normal(1 / (inputs * self.size)))
        return super().spec(inputs, outputs, axes) | {"beta": beta}

    def next(self, params: Tree, n: int, u: Array, p: Array, before: Array) -> Array:
        factor = (2 * n - 1) * (n - 1) ** 2 * (4 * (n - 1) ** 2 - 1) / n**2
        return u * p - factor * params["beta"][n - 1].astype(jnp.float32) * before
