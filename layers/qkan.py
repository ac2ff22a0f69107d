"""QKAN (Jiang et al. 2025, arXiv 2509.14026, and the released code): edge functions that are what a
qubit says of its input, and HQKAN, a feed-forward around them."""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Layer,
    Param,
    Tree,
    constant,
    layer,
    normal,
    ones,
    positive,
    zeros,
)
from bestiary.layers.daruan import CIRCUITS, Ansatz, Circuit, expectation
from bestiary.layers.linear import Linear
from bestiary.layers.sharding import dot

ThetaInit = Literal["xavier", "small_gaussian"]


@layer
class QKAN(Layer):
    """y_o = sum_i ((phi_io(x_i) + c_io) m_io + base_io act(x_i)): [..., inputs] -> [..., outputs].

    phi_io is the measurement of a qubit that starts at v = (1, 0, 0) and, `repetitions` times, is
    rotated by theta and by e = w x_i + b. The ansatz says how: "pz", "rpz" (without the angles that
    are redundant in pz), "mix", "px" (|e| <= 1; beyond, e counts as the nearer end) or "real".
    Angles and states are float32; backward undoes rotation by rotation instead of keeping states.

    Raises ValueError for a number below 1 and for an unknown name.
    """

    inputs: int
    outputs: int
    repetitions: int = 3
    ansatz: Ansatz = "pz"
    fast_measure: bool = True
    """|alpha| - |beta| of the two amplitudes, the released default; False: the paper's expectation
    v_z = |alpha|^2 - |beta|^2."""
    group: int | None = None
    """So many circuits in all, input i taking the one of i modulo group, whatever the output; None:
    one for every edge."""
    preact_trainable: bool = True
    """Train w and b; otherwise they are 1 and 0, but for the b of rpz."""
    base: Layer | None = Silu()
    """The activation beside the circuits; None: none."""
    theta_init: ThetaInit = "xavier"
    """Or "small_gaussian", 1 / sqrt(repetitions), for 8 repetitions and more."""
    axes: tuple[str | None, str | None] = ("embed", "mlp")

    def __post_init__(self) -> None:
        positive(inputs=self.inputs, outputs=self.outputs, repetitions=self.repetitions)
        positive(group=self.group)
        for name, kind in {"ansatz": Ansatz, "theta_init": ThetaInit}.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name}: {value!r}; need one of {', '.join(get_args(kind))}")

    @property
    def circuit(self) -> Circuit:
        return CIRCUITS[self.ansatz]

    def spec(self) -> Tree:
        edges, circuit = (self.inputs, self.outputs), self.circuit
        each, axes = edges, self.axes
        if self.group is not None:
            each, axes = (self.group,), (None,)
        steps = self.repetitions + bool(circuit.end)
        spec: Tree = {
            "theta": Param((steps, circuit.thetas, *each), (None, None, *axes), self._theta(steps)),
            # of shared circuits a matrix
            "out_weight": Param(edges, self.axes, ones, inputs=1 if self.group else None),
            "out_bias": Param(edges, self.axes, zeros),
        }
        if self.preact_trainable:
            spec["weight"] = Param((self.repetitions, *each), (None, *axes), ones)
        if self.preact_trainable or self.ansatz == "rpz":
            spec["bias"] = Param((self.repetitions, *each), (None, *axes), zeros)
        if self.base is not None:
            spec["activation"] = self.base
            spec["base"] = Param(edges, self.axes, constant(0.5), inputs=1)
        return spec

    def _theta(self, steps: int) -> Any:
        if self.theta_init == "small_gaussian":
            return normal(1 / math.sqrt(self.repetitions))
        # as torch counts them for (outputs, inputs, steps, thetas) and for (group, steps, thetas)
        thetas = self.circuit.thetas
        fans = (self.inputs + self.outputs) * steps * thetas
        if self.group is not None:
            fans = (steps + self.group) * thetas
        return normal(math.sqrt(2 / fans))

    def apply(self, params: Tree, x: Array) -> Array:
        phi, weight = self.measured(params, x), params["out_weight"].astype(jnp.float32)
        if self.group is not None:
            y = dot("...i,io->...o", phi[..., 0], params["out_weight"])
        else:
            y = (phi * weight).sum(-2)
        y = (y + (params["out_bias"] * weight).sum(0)).astype(x.dtype)
        if self.base is not None:
            act = self.base.apply(params["activation"], x)
            y += dot("...i,io->...o", act, params["base"])
        return y

    def edges(self, params: Tree, x: Array) -> Array:
        """The function of every edge, [..., outputs, inputs]: summed over inputs, the output."""
        edge = (self.measured(params, x) + params["out_bias"]) * params["out_weight"]
        if self.base is not None:
            act = self.base.apply(params["activation"], x.astype(jnp.float32))
            edge += act[..., None] * params["base"]
        return edge.swapaxes(-1, -2).astype(x.dtype)

    def measured(self, params: Tree, x: Array) -> Array:
        """phi: [..., inputs] -> float32 [..., inputs, outputs], or [..., inputs, 1] of a group."""
        theta = self._of_edges(params["theta"])
        shape = (self.repetitions, *theta.shape[2:])
        w, b = jnp.ones(shape), jnp.zeros(shape)
        w = self._of_edges(params["weight"]) if "weight" in params else w
        b = self._of_edges(params["bias"]) if "bias" in params else b
        v_z = expectation(self.circuit, x.astype(jnp.float32), theta, w, b)
        return fast_measure(v_z) if self.fast_measure else v_z

    def _of_edges(self, p: Array) -> Array:
        """Parameters of the circuits as float32 [..., inputs, outputs], or [..., inputs, 1]."""
        if self.group is not None:
            p = p[..., jnp.arange(self.inputs) % self.group, None]
        return p.astype(jnp.float32)


def fast_measure(v_z: Array) -> Array:
    """|alpha| - |beta|; near the poles, where its slope is infinite, it is cut off."""
    alpha, beta = (jnp.sqrt(jnp.maximum(1 + s * v_z, 1e-7) / 2) for s in (1, -1))
    return alpha - beta


def extend(qkan: QKAN, params: Tree, repetitions: int) -> tuple[QKAN, Tree]:
    """The same function with more repetitions, which learn from there: (layer, parameters).

    The last rotations by theta become those of the next repetition; what is new is 0, with w = 1
    and b = 0. Then only the angle around Z differs, which no measurement sees.

    Raises ValueError for fewer repetitions and for an ansatz that this would change: px, mix, real.
    """
    if qkan.ansatz not in ("pz", "rpz"):
        raise ValueError(
            f"ansatz: {qkan.ansatz!r}; only pz and rpz keep their function when longer"
        )
    more = repetitions - qkan.repetitions
    if more < 0:
        raise ValueError(f"repetitions: {repetitions}; need at least {qkan.repetitions}")

    def longer(name: str, fill: float) -> Array:
        p = params[name]
        return jnp.concatenate((p, jnp.full((more, *p.shape[1:]), fill, p.dtype)))

    fills = {"theta": 0.0, "weight": 1.0, "bias": 0.0}
    new = {name: longer(name, fill) for name, fill in fills.items() if name in params}
    return replace(qkan, repetitions=repetitions), params | new


@layer
class HQKAN(Layer):
    """y = QKAN(x W_up + b_up) W_down + b_down: [batch, seq, dim] -> the same.

    The paper takes ceil(log2(dim)) inputs and outputs of the QKAN, 1 repetition and a group of 3.
    """

    dim: int
    qkan: QKAN

    def __post_init__(self) -> None:
        positive(dim=self.dim)

    @property
    def up(self) -> Linear:
        return Linear(inputs=self.dim, outputs=self.qkan.inputs, axes=("embed", None), bias=True)

    @property
    def down(self) -> Linear:
        return Linear(inputs=self.qkan.outputs, outputs=self.dim, axes=(None, "embed"), bias=True)

    def spec(self) -> Tree:
        return {"up": self.up, "qkan": self.qkan, "down": self.down}

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        h = self.qkan.apply(params["qkan"], self.up.apply(params["up"], x))
        return self.down.apply(params["down"], h), Aux()
