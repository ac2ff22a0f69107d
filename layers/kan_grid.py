"""Moving and refining the grids of B-spline KANs: pure functions, between training steps.

Both fit the old curves by least squares, input by input, in float32.
"""

from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Array, Tree
from bestiary.layers.kan import KAN
from bestiary.layers.kan_spline import BSpline

Rule = Literal["pykan", "efficient"]


def update_grid(
    kan: KAN,
    params: Tree,
    x: Array,
    *,
    rule: Rule = "pykan",
    eps: float = 0.02,
    margin: float = 0.01,
    scale_twice: bool = False,
) -> Tree:
    """The parameters with knots where the samples x [..., inputs] are, and with the curves that
    they had at the samples.

    Knots are eps times those in equal steps and 1 - eps times quantiles of the samples. "pykan"
    takes equal steps between the least and the largest sample, and the mean step beyond both ends;
    "efficient" (efficient-kan) goes `margin` further on both sides, and by the equal step beyond.
    `scale_twice` reproduces the released efficient-kan, which fits the curves times their scale and
    keeps the scale, so that the layer's output moves.

    Raises ValueError when the basis has no knots of its own or shifts its inputs by them.
    """
    basis = spline(kan)
    if not basis.adaptive:
        raise ValueError("adaptive: False; need True to move knots")
    if basis.outside == "normalise":
        raise ValueError("outside: 'normalise'; nothing is outside of this grid")
    if rule not in get_args(Rule):
        raise ValueError(f"rule: {rule!r}; need one of {', '.join(get_args(Rule))}")
    z = basis.argument(params["basis"], x).reshape(-1, kan.inputs)
    ordered, steps = jnp.sort(z, 0), jnp.arange(basis.num_intervals + 1)[:, None]
    if rule == "pykan":
        at = np.int64(len(z) / basis.num_intervals * np.arange(basis.num_intervals))
        quantiles = ordered[np.append(at, -1)]
        low, step = ordered[0], (ordered[-1] - ordered[0]) / basis.num_intervals
        inner = eps * (low + step * steps) + (1 - eps) * quantiles
        beyond = (inner[-1] - inner[0]) / basis.num_intervals
    else:
        quantiles = ordered[np.int64(np.linspace(0, len(z) - 1, basis.num_intervals + 1))]
        low = ordered[0] - margin
        beyond = (ordered[-1] - ordered[0] + 2 * margin) / basis.num_intervals
        inner = eps * (low + beyond * steps) + (1 - eps) * quantiles
    weight = params["weight"]
    if scale_twice and kan.scale != "none":
        weight = weight * params["scale"]
    new = params["basis"] | {"knots": extend(inner, beyond, basis.order)}
    weight = refit(basis, params["basis"], weight, basis, new, z)
    return params | {"basis": new, "weight": weight}


def refine(kan: KAN, params: Tree, num_intervals: int) -> tuple[KAN, Tree]:
    """The layer on a grid of `num_intervals`, and its parameters, with the curves that it had from
    end to end of its grid: exactly where all old knots are among the new.

    Knots of inputs of their own stay as dense as they were (linear interpolation between them).
    Raises ValueError when the basis is no B-spline.
    """
    old = spline(kan)
    new = replace(old, num_intervals=num_intervals)
    own, k, n = params["basis"], old.order, num_intervals

    def between(places: Array) -> Array:
        """Points at `places`, counted in new intervals: [points, inputs]."""
        if not old.adaptive:
            points = old.low + (old.high - old.low) / n * places
            return jnp.broadcast_to(points[:, None], (len(places), kan.inputs))
        at = jnp.linspace(0, n, old.num_intervals + 1)
        inner = params["basis"]["knots"][k : k + old.num_intervals + 1]
        return jax.vmap(lambda t: jnp.interp(places, at, t), 1, 1)(inner)

    if old.adaptive:
        inner = between(jnp.arange(n + 1.0))
        own = own | {"knots": extend(inner, (inner[-1] - inner[0]) / n, k)}
    samples = between(jnp.linspace(0, n, n * (k + 2) + 1))
    before, after = (replace(b, outside="zero") for b in (old, new))  # the samples lie inside
    weight = refit(before, params["basis"], params["weight"], after, own, samples)
    return replace(kan, basis=new), params | {"basis": own, "weight": weight}


def spline(kan: KAN) -> BSpline:
    if not isinstance(kan.basis, BSpline):
        raise ValueError(f"basis: {type(kan.basis).__name__}; need BSpline, which has a grid")
    return kan.basis


def extend(inner: Array, step: Array, order: int) -> Array:
    """[knots, inputs] with `order` more at both ends, `step` [inputs] apart."""
    more = step * jnp.arange(1, order + 1)[:, None]
    return jnp.concatenate([(inner[0] - more)[::-1], inner, inner[-1] + more])


def refit(
    old: BSpline, old_params: Tree, weight: Array, new: BSpline, new_params: Tree, z: Array
) -> Array:
    """Coefficients [size, inputs, outputs] of `new` whose curves are those of `old` at z [points,
    inputs], by least squares; the smallest ones where samples do not decide."""
    curves = jnp.einsum("nsi,sio->ino", old.values(old_params, z), weight)
    values = new.values(new_params, z).transpose(2, 0, 1)  # [inputs, points, size]

    def fit(a: Any, b: Any) -> Any:
        return jnp.linalg.lstsq(a, b)[0]

    return jax.vmap(fit, out_axes=1)(values, curves).astype(weight.dtype)
