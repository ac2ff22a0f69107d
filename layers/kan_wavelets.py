"""Wavelets, each edge with a place and a width of its own: Wav-KAN (Bozorgasl & Chen 2024, arXiv
2405.12832)."""

import math
from typing import Any, Literal, get_args

import jax.numpy as jnp

from bestiary.layers.base import Array, Initializer, Param, Tree, layer, ones, uniform
from bestiary.layers.kan_basis import Basis, EdgeAxes

Kind = Literal["mexican_hat", "morlet", "dog", "meyer", "shannon"]


@layer
class Wavelet(Basis):
    """psi((z_i - t_io) / s_io), one function an edge, with trained t (at first 0) and s (1),
    [inputs, outputs].

    mexican_hat 2 / (sqrt(3) pi^(1/4)) (u^2 - 1) e^(-u^2/2), which is the textbook's negative as in
    the released program; morlet cos(5 u) e^(-u^2/2); dog -u e^(-u^2/2); meyer sin(pi |u|) a(|u|),
    where a falls from 1 at 1/2 to 0 at 1; shannon sin(u) / u.

    Since the functions differ by edge, inputs x outputs of them are computed for each token. The
    batch norm that Wav-KAN puts behind a layer is `BatchNorm`. Coefficients start uniform in +- 1 /
    sqrt(inputs).

    Raises ValueError for an unknown kind, or a window for another kind than shannon.
    """

    kind: Kind = "mexican_hat"
    window: bool = False
    """shannon: times a Hamming window over the inputs, as in the released program."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: {self.kind!r}; need one of {', '.join(get_args(Kind))}")
        if self.window and self.kind != "shannon":
            raise ValueError(f"window: True; kind {self.kind!r} takes none, only 'shannon'")

    @property
    def size(self) -> int:
        return 1

    def why_numbered(self) -> str | None:
        return "window True; need False" if self.window else None

    def initial(self, inputs: int, outputs: int) -> Initializer:
        del outputs
        return uniform(1 / math.sqrt(inputs))

    def spec(self, inputs: int = 1, outputs: int = 1, axes: EdgeAxes = (None, None)) -> Tree:
        edges = inputs, outputs
        own = {"translation": Param(edges, axes), "scale": Param(edges, axes, ones)}
        return super().spec(inputs, outputs, axes) | own

    def terms(self, params: Tree, x: Array, weight: Any) -> Array:
        """Of every edge: float32 [..., inputs, outputs]."""
        t, s = (params[name].astype(jnp.float32) for name in ("translation", "scale"))
        psi = wavelet(self.kind, (self.argument(params, x)[..., None] - t) / s)
        if self.window:
            psi *= jnp.hamming(x.shape[-1])[:, None].astype(jnp.float32)
        return psi * weight[0].astype(jnp.float32)

    def expand(self, params: Tree, x: Array) -> Array:
        raise NotImplementedError("a wavelet's functions differ by edge; use contract or edges")

    def contract(self, params: Tree, x: Array, weight: Any) -> Array:
        return self.terms(params, x, weight).sum(-2).astype(x.dtype)

    def edges(self, params: Tree, x: Array, weight: Any) -> Array:
        return self.terms(params, x, weight).swapaxes(-1, -2).astype(x.dtype)


def wavelet(kind: Kind, u: Array) -> Array:
    bell = jnp.exp(-jnp.square(u) / 2)
    match kind:
        case "mexican_hat":
            return 2 / (math.sqrt(3) * math.pi**0.25) * (jnp.square(u) - 1) * bell
        case "morlet":
            return jnp.cos(5 * u) * bell
        case "dog":
            return -u * bell
        case "meyer":
            v = jnp.abs(u)
            t = jnp.clip(2 * v - 1, 0, 1)
            fall = t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)
            return jnp.sin(math.pi * v) * jnp.cos(math.pi / 2 * fall)
        case "shannon":
            return jnp.sinc(u / math.pi)
