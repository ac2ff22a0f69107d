"""S-KAN beside networks of one basis each, on six functions of one or two variables.

    python bench/skan.py

Networks [inputs, 5, 1] on 400 points of [-1, 1], tested on 400 others. All bases have 8 functions,
so that what is left of an S-KAN has the parameters of any network of one basis. An S-KAN has a
third of the steps in each phase, the others have all: Adam on all points, rates along a cosine.
Errors are root mean squares in standard deviations of the target, means over the seeds.

With the curves frozen, one basis alone is far from what all fit together: the entropy has to
outweigh that (0.003 does not), and the selection weights have to get far (at a rate of 0.1).
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from kan_fits import Series

from bestiary.layers import KAN, RBF, RSWAF, SKAN, Basis, BSpline, Chebyshev, Fourier
from bestiary.layers.base import Array, Layer, Tree
from bestiary.layers.skan import trains
from bestiary.layers.skan_select import select

POOL: dict[str, Basis] = {
    "spline": BSpline(),
    "RBF": RBF(norm=False),
    "RSWAF": RSWAF(norm=False),
    "Chebyshev": Chebyshev(degree=7),
    "Fourier": Fourier(frequencies=4),
}
TARGETS: dict[str, tuple[int, Callable[..., Array]]] = {
    "sin(2 pi x)": (1, lambda x: jnp.sin(2 * jnp.pi * x)),
    "x^3 - x y + y^2": (2, lambda x, y: x**3 - x * y + y**2),
    "abs(x - 0.2)": (1, lambda x: jnp.abs(x - 0.2)),
    "exp(-20 (x^2 + y^2))": (2, lambda x, y: jnp.exp(-20 * (x**2 + y**2))),
    "sin(6 pi x)": (1, lambda x: jnp.sin(6 * jnp.pi * x)),
    "sign(x - 0.1)": (1, lambda x: jnp.sign(x - 0.1)),
}
HIDDEN = 5
Rows = tuple[Array, Array]


def samples(inputs: int, target: Callable[..., Array], key: Array) -> tuple[Rows, Rows]:
    """x [400, inputs], the target [400, 1] in its deviations; to train and to test."""
    x = jax.random.uniform(key, (800, inputs), minval=-1, maxval=1)
    y = target(*x.T)[:, None]
    y = (y - y.mean()) / y.std()
    return (x[:400], y[:400]), (x[400:], y[400:])


def in_pairs(inputs: int, make: Callable[..., Layer]) -> Series:
    return Series(layers=(make(inputs=inputs, outputs=HIDDEN), make(inputs=HIDDEN, outputs=1)))


@partial(jax.jit, static_argnames=("net", "steps"))
def fit(
    net: Series, on: Tree, steps: int, rate: float, entropy: float, params: Tree, rows: Rows
) -> Tree:
    """Parameters [seeds, ...], each on its rows [seeds, ...], after training those that are on."""
    tx = optax.adam(optax.cosine_decay_schedule(1.0, steps))

    def one(params: Tree, rows: Rows) -> Tree:
        def loss(params: Tree) -> Array:
            value = jnp.square(net.apply(params, rows[0]) - rows[1]).mean()
            return value + entropy * entropies(net, params)[0]

        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            params, state = carry
            grads = jax.tree.map(lambda on, g: jnp.where(on, g, 0), on, jax.grad(loss)(params))
            updates, state = tx.update(grads, state)
            return (jax.tree.map(lambda p, u: p + rate * u, params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    return jax.vmap(one)(params, rows)


def entropies(net: Series, params: Tree) -> tuple[Array, float]:
    """The entropy of all that selects, and the largest there can be."""
    total, largest = jnp.zeros(()), 0.0
    for i, layer in enumerate(net.layers):
        if isinstance(layer, SKAN):
            total += layer.selection.entropy(params[str(i)]["selection"])
            largest += math.prod(layer.selection.shape) * math.log(layer.selection.size)
    return total, largest


@partial(jax.jit, static_argnames="net")
def errors(net: Series, params: Tree, rows: Rows) -> Array:
    """Root mean squares [seeds]."""
    y = jax.vmap(net.apply)(params, rows[0])
    return jnp.sqrt(jnp.square(y - rows[1]).mean((1, 2)))


def selected(
    inputs: int, steps: int, rate: float, entropy: float, keys: Array, train: Rows, test: Rows
) -> tuple[float, float, int]:
    """The error after the three phases, how undecided the second left the worst seed, and the
    number of parameters left."""
    net = in_pairs(inputs, partial(SKAN, pool=tuple(POOL.values()), bias=True))
    params = fit(net, trains(net, 1), steps, 1e-2, 0.0, jax.vmap(net.init)(keys), train)
    params = fit(net, trains(net, 2), steps, rate, entropy, params, train)
    found, undecided, size = [], [], 0
    for seed in range(len(keys)):
        own, rows, new = jax.tree.map(lambda a, s=seed: a[s], (params, train, test))
        parts = [select(layer, own[str(i)]) for i, layer in enumerate(net.layers)]
        left = Series(layers=tuple(layer for layer, _ in parts))
        kept = {str(i): params for i, (_, params) in enumerate(parts)}
        kept, rows, new = jax.tree.map(lambda a: a[None], (kept, rows, new))
        kept = fit(left, trains(left, 3), steps, 1e-2, 0.0, kept, rows)
        found.append(errors(left, kept, new))
        total, largest = entropies(net, own)
        undecided.append(float(total) / largest)
        size = left.count().total
    return float(jnp.stack(found).mean()), max(undecided), size


def main() -> None:
    parser = argparse.ArgumentParser(description="S-KAN beside networks of one basis")
    parser.add_argument("--steps", type=int, default=500, help="of each phase")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.1, help="of the selection weights")
    parser.add_argument("--entropy", type=float, default=0.3, help="in phase 2")
    o = parser.parse_args()
    print("| target | parameters | best basis | worst basis | S-KAN | undecided, at most |")
    print("|---|---:|---|---|---:|---:|", flush=True)
    starts, draws = (jax.vmap(jax.random.key)(n + jnp.arange(o.seeds)) for n in (0, 100))
    for name, (inputs, target) in TARGETS.items():
        train, test = jax.vmap(lambda key, i=inputs, f=target: samples(i, f, key))(draws)
        alone = {}
        for label, basis in POOL.items():
            net = in_pairs(inputs, partial(KAN, basis=basis, bias=True))
            params = jax.vmap(net.init)(starts)
            params = fit(net, trains(net, 1), 3 * o.steps, 1e-2, 0.0, params, train)
            alone[label] = float(errors(net, params, test).mean())
        ranked = sorted(alone, key=alone.__getitem__)
        best, worst = (f"{label} {alone[label]:.4f}" for label in (ranked[0], ranked[-1]))
        error, left, n = selected(inputs, o.steps, o.rate, o.entropy, starts, train, test)
        print(f"| {name} | {n} | {best} | {worst} | {error:.4f} | {left:.2f} |", flush=True)


if __name__ == "__main__":
    main()
