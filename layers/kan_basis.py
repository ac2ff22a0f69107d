"""What the edges of a Kolmogorov-Arnold network are made of: functions of one variable."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Initializer, Layer, Tree, layer, normal
from bestiary.layers.norms import LayerNorm
from bestiary.layers.sharding import dot

Outside = Literal["zero", "clamp", "extrapolate", "normalise"]
EdgeAxes = tuple[str | None, str | None]  # logical names of the inputs and of the outputs

UNROLLED = 32  # more functions are traced as one array: a little more memory, far less compilation


@layer
class Basis(Layer):
    """`size` functions of each input: `expand` makes [..., size, inputs] of [..., inputs], in the
    type of x.

    A basis knows neither how many inputs there are nor how they are summed; what holds it (`KAN`)
    says so in `spec`. Functions are computed in float32 and stand before the inputs, which
    therefore fill the lanes of the machine.
    """

    norm: bool = False
    """Layer norm over the inputs, with gain and bias, comes first."""

    @property
    def size(self) -> int:
        """How many functions there are."""
        raise NotImplementedError

    def functions(self, params: Tree, z: Array) -> Array:
        """Normalised float32 [..., inputs] -> float32 [..., size, inputs]."""
        raise NotImplementedError

    def why_numbered(self) -> str | None:
        """Why the functions of an input depend on the number that it has; None: they do not."""
        return None

    def initial(self, inputs: int, outputs: int) -> Initializer:
        """Draws the coefficients [size, inputs, outputs]."""
        del outputs
        return normal(1 / math.sqrt(self.size * inputs))

    def spec(self, inputs: int = 1, outputs: int = 1, axes: EdgeAxes = (None, None)) -> Tree:
        """The parameters of the functions themselves, for as many inputs and outputs, whose logical
        names are `axes`."""
        del outputs, axes
        return {"norm": LayerNorm(dim=inputs)} if self.norm else {}

    def argument(self, params: Tree, x: Array) -> Array:
        """What the functions are taken of: [..., inputs] -> float32 [..., inputs]."""
        z = x.astype(jnp.float32)
        return LayerNorm(dim=z.shape[-1]).apply(params["norm"], z) if self.norm else z

    def outside_grid(self, params: Tree, x: Array) -> Array:
        """Which inputs lie where the functions were not made for: bool [..., inputs]."""
        del params
        return jnp.zeros(x.shape, bool)

    def values(self, params: Tree, z: Array) -> Array:
        """`functions` wherever the argument lies."""
        return self.functions(params, z)

    def expand(self, params: Tree, x: Array) -> Array:
        return self.values(params, self.argument(params, x)).astype(x.dtype)

    def contract(self, params: Tree, x: Array, weight: Any) -> Array:
        """sum_s,i weight[s, i, o] f_s(x_i): [..., inputs] -> [..., outputs], as one product."""
        return dot("...si,sio->...o", self.expand(params, x), weight)

    def edges(self, params: Tree, x: Array, weight: Any) -> Array:
        """The terms of that sum by edge: [..., inputs] -> [..., outputs, inputs]."""
        return dot("...si,sio->...oi", self.expand(params, x), weight)


@layer
class GridBasis(Basis):
    """A basis made for arguments between two ends, `domain`.

    `outside` says what becomes of others, and of the gradient there:
    - "zero": nothing; splines and bumps die out on their own (the released programs);
    - "clamp": they count as the nearer end, with gradient 0;
    - "extrapolate": every function continues along its tangent at the nearer end;
    - "normalise": z = m + r tanh((x - m) / r), m and r middle and half width of the domain, lets
      none be outside; with m = 0, r = 1 it is the tanh of the polynomial KANs.

    Raises ValueError for another policy.
    """

    outside: Outside = "zero"

    def __post_init__(self) -> None:
        if self.outside not in get_args(Outside):
            raise ValueError(
                f"outside: {self.outside!r}; need one of {', '.join(get_args(Outside))}"
            )

    def domain(self, params: Tree) -> tuple[Any, Any]:
        """Both ends, scalars or [inputs] each."""
        raise NotImplementedError

    def outside_grid(self, params: Tree, x: Array) -> Array:
        low, high = self.domain(params)
        z = self.argument(params, x)
        return (z < low) | (z > high)

    def values(self, params: Tree, z: Array) -> Array:
        low, high = self.domain(params)
        match self.outside:
            case "clamp":
                z = jnp.clip(z, low, high)
            case "normalise":
                middle, radius = (low + high) / 2, (high - low) / 2
                z = middle + radius * jnp.tanh((z - middle) / radius)
            case "extrapolate":
                inside = jnp.clip(z, low, high)

                def f(z: Array) -> Array:
                    return self.functions(params, z)

                values, slopes = jax.jvp(f, (inside,), (jnp.ones_like(z),))
                return values + slopes * (z - inside)[..., None, :]
        return self.functions(params, z)


def stack(function: Callable[[Any], Array], size: int) -> Array:
    """function(0), ..., function(size - 1), [..., inputs] each: [..., size, inputs].

    `function` must also take a traced number.
    """
    if size <= UNROLLED:
        return jnp.stack([function(j) for j in range(size)], -2)
    return jax.vmap(function, out_axes=-2)(jnp.arange(size))


def centres(low: float, high: float, size: int) -> Array:
    """`size` points from low to high, in equal steps: float32."""
    return jnp.linspace(low, high, size, dtype=jnp.float32)
