"""DARUAN (Jiang et al. 2025, arXiv 2509.14026, and the released code): functions of one variable by
one qubit.

It is rotated by trained angles and by its input, again and again (data re-uploading), and measured.
States are real here: the Bloch vector v, which rotations turn in space, and whose v_z is the
expectation of Z.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array

Ansatz = Literal["pz", "rpz", "mix", "px", "real"]

X, Y, Z = 0, 1, 2  # axes of rotation
E, ARCCOS, PI = "encoded", "arccos", "pi"  # angles that are no theta

Angle = int | str


class Circuit(NamedTuple):
    """Rotations (axis, angle): of every repetition, and of the end. A number k stands for theta_k,
    E for the encoded input e, ARCCOS for arccos(e), PI for a swap or a change of sign."""

    repeated: tuple[tuple[int, Angle], ...]
    end: tuple[tuple[int, Angle], ...]

    @property
    def thetas(self) -> int:
        return sum(isinstance(angle, int) for _, angle in self.repeated)


CIRCUITS: dict[Ansatz, Circuit] = {
    "pz": Circuit(((Z, 0), (Y, 1), (Z, E)), ((Z, 0), (Y, 1))),
    "rpz": Circuit(((Y, 0), (Z, E)), ((Y, 0),)),
    "mix": Circuit(((Z, 0), (X, 1), (Y, E)), ((Z, 0), (X, 1))),
    "px": Circuit(((Z, 0), (X, ARCCOS)), ((Z, 0),)),
    "real": Circuit(((X, PI), (Y, 0), (Z, PI), (Y, E)), ()),
}

Vector = tuple[Array, Array, Array]


def rotate(v: Sequence[Array], axis: int, cos: Array, sin: Array) -> Vector:
    """v turned around an axis, counter-clockwise."""
    p, q = (axis + 1) % 3, (axis + 2) % 3
    turned = {axis: v[axis], p: cos * v[p] - sin * v[q], q: sin * v[p] + cos * v[q]}
    return turned[0], turned[1], turned[2]


def cos_sin(angle: Angle, theta: Array, e: Array) -> tuple[Array, Array]:
    """Of one angle; theta [thetas, inputs, outputs]."""
    if angle == PI:
        return jnp.float32(-1), jnp.float32(0)
    if angle == ARCCOS:
        e = jnp.clip(e, -_END, _END)
        return e, jnp.sqrt(1 - e**2)
    t = theta[angle] if isinstance(angle, int) else e
    return jnp.cos(t), jnp.sin(t)


_END = 1 - 1e-6  # where the slope of arccos is 700


def expectation(circuit: Circuit, x: Array, theta: Array, w: Array, b: Array) -> Array:
    """v_z of every edge's qubit: x [..., inputs], theta [repetitions + 1, thetas, inputs, outputs]
    (without the 1 where the circuit has no end), w and b [repetitions, inputs, outputs] ->
    [..., inputs, outputs], all float32."""
    return _expectation(circuit, x, theta, w, b)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expectation(circuit: Circuit, *args: Array) -> Array:
    return _state(circuit, *args)[Z]


def _state(circuit: Circuit, x: Array, theta: Array, w: Array, b: Array) -> Vector:
    x = x[..., None]

    def repetition(v: Vector, step: Any) -> tuple[Vector, None]:
        theta, w, b = step
        for axis, angle in circuit.repeated:
            v = rotate(v, axis, *cos_sin(angle, theta, w * x + b))
        return v, None

    shape = jnp.broadcast_shapes(x.shape, w.shape[1:])
    v = jnp.ones(shape), jnp.zeros(shape), jnp.zeros(shape)
    v, _ = jax.lax.scan(repetition, v, (theta[: len(w)], w, b))
    for axis, angle in circuit.end:
        v = rotate(v, axis, *cos_sin(angle, theta[-1], jnp.zeros(())))
    return v


def _forward(circuit: Circuit, *args: Array) -> tuple[Array, Any]:
    v = _state(circuit, *args)
    return v[Z], (*args, v[X], v[Y])


def _backward(circuit: Circuit, saved: tuple[Array, ...], dv_z: Array) -> tuple[Array, ...]:
    """The gradient by an angle around n is n . L with L = v x dv, the cotangent's torque.

    L turns as v and dv do, so that it alone is taken back through the circuit.
    """
    x, theta, w, b, v_x, v_y = saved
    x = x[..., None]
    rows = tuple(range(x.ndim - 2))
    torque: Vector = (v_y * dv_z, -v_x * dv_z, jnp.zeros_like(dv_z))

    def back(gates: Any, torque: Vector, theta: Array, e: Array) -> tuple[Vector, Array, Array]:
        """(L before the gates, gradients by theta and by e)."""
        d_theta, d_e = jnp.zeros_like(theta), jnp.zeros(())
        for axis, angle in reversed(gates):
            cos, sin = cos_sin(angle, theta, e)
            if isinstance(angle, int):
                d_theta = d_theta.at[angle].set(torque[axis].sum(rows))
            elif angle == E:
                d_e = torque[axis]
            elif angle == ARCCOS:
                d_e = jnp.where(jnp.abs(e) < _END, -torque[axis] / sin, 0)
            torque = rotate(torque, axis, cos, -sin)
        return torque, d_theta, d_e

    def repetition(carry: Any, step: Any) -> Any:
        torque, dx = carry
        theta, w, b = step
        torque, d_theta, d_e = back(circuit.repeated, torque, theta, w * x + b)
        grads = d_theta, (d_e * x).sum(rows), d_e.sum(rows)
        return (torque, dx + (d_e * w).sum(-1)), grads

    last = []
    if circuit.end:
        torque, d_end, _ = back(circuit.end, torque, theta[-1], jnp.zeros(()))
        last = [d_end[None]]
    carry, steps = (torque, jnp.zeros_like(x[..., 0])), (theta[: len(w)], w, b)
    (_, dx), (d_theta, dw, db) = jax.lax.scan(repetition, carry, steps, reverse=True)
    return dx, jnp.concatenate([d_theta, *last]), dw, db


_expectation.defvjp(_forward, _backward)
