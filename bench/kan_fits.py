"""What Kolmogorov-Arnold networks reach beside perceptrons of equal size: see bench/kan.py."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from faults import Rows, digits, trained

from bestiary.layers import (
    AFKAN,
    KAN,
    QKAN,
    RBF,
    RSWAF,
    Basis,
    BSpline,
    Chebyshev,
    Fourier,
    Gram,
    Jacobi,
    KANNet,
    Layer,
    LayerNorm,
    Legendre,
    Linear,
    Rational,
    ReLUBasis,
    Silu,
    Sine,
    Wavelet,
)
from bestiary.layers.base import Array, Tree, layer
from bestiary.layers.perceptron import Perceptron, perceptron
from bestiary.layers.rational import GroupRational
from bestiary.train.minimise import Method, minimise

# --- regression -----------------------------------------------------------------------------------


def mlp(*widths: int) -> Perceptron:
    return perceptron(widths, lambda width: Silu())


REGRESSORS: dict[str, Layer] = {
    "spline KAN 2-5-1": KANNet(dims=(2, 5, 1), basis=BSpline()),
    "RBF KAN 2-5-1": KANNet(dims=(2, 5, 1), basis=RBF(norm=False), bias=True),
    "MLP 2-35-1": mlp(2, 35, 1),
    "MLP 2-10-10-1": mlp(2, 10, 10, 1),
}


def samples(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x [2000, 2] and exp(sin(pi x) + y^2) [2000, 1]; the latter half is for testing."""
    x = np.random.default_rng(seed).uniform(-1, 1, (2000, 2)).astype(np.float32)
    return x, np.exp(np.sin(np.pi * x[:, :1]) + x[:, 1:] ** 2)


def regression(method: Method, steps: int, seeds: int) -> None:
    """Prints the root mean squared error on new points, by seed."""
    found = {}
    for name, net in REGRESSORS.items():

        def loss(params: Tree, data: Any, net: Layer = net) -> Array:
            return jnp.square(net.apply(params, data[0]) - data[1]).mean()

        errors = []
        for seed in range(seeds):
            x, y = samples(seed)
            params = net.init(jax.random.key(seed))
            train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
            ((_, params, _),) = minimise(
                loss, net.declare(), params, train, steps=steps, method=method, chunk=steps
            )
            errors.append(float(jnp.sqrt(loss(params, test))))
        found[name] = np.array(errors)
        print(f"{name}: {errors}", flush=True)
    first = found["spline KAN 2-5-1"]
    print(f"\n{method}, {steps} steps\n")
    print("| network | parameters | test RMSE by seed | mean | times the spline KAN's |")
    print("|---|---:|---|---:|---:|")
    for name, errors in found.items():
        cells = " ".join(f"{error:.4f}" for error in errors)
        ratios = f"{errors.mean() / first.mean():.2f}"
        size = REGRESSORS[name].count().total
        print(f"| {name} | {size} | {cells} | {errors.mean():.4f} | {ratios} |")


# --- digits ---------------------------------------------------------------------------------------


@layer
class Series(Layer):
    """One layer after the other."""

    layers: tuple[Layer, ...]

    def spec(self) -> Tree:
        return {str(i): member for i, member in enumerate(self.layers)}

    def apply(self, params: Tree, x: Array) -> Array:
        for i, member in enumerate(self.layers):
            x = member.apply(params[str(i)], x)
        return x


BASES: dict[str, Basis] = {
    "spline": BSpline(),
    "RBF": RBF(),
    "RSWAF": RSWAF(),
    "Chebyshev": Chebyshev(),
    "Legendre": Legendre(),
    "Jacobi": Jacobi(),
    "Gram": Gram(),
    "Fourier": Fourier(),
    "mexican hat": Wavelet(kind="mexican_hat"),
    "Morlet": Wavelet(kind="morlet"),
    "DoG": Wavelet(kind="dog"),
    "Meyer": Wavelet(kind="meyer"),
    "Shannon": Wavelet(kind="shannon"),
    "ReLU-KAN": ReLUBasis(outside="normalise"),
    "sine": Sine(),
    "rational": Rational(),
}


def in_pairs(make: Callable[[int, int], tuple[Layer, ...]]) -> Callable[[int], Layer]:
    """Networks 64-h-10, of what `make` gives for a number of inputs and of outputs."""
    return lambda hidden: Series(layers=make(64, hidden) + make(hidden, 10))


def kan_network(basis: Basis) -> Callable[[int], Layer]:
    base = None if isinstance(basis, Rational) else Silu()
    return in_pairs(lambda i, o: (KAN(inputs=i, outputs=o, basis=basis, base=base, bias=True),))


def gr_kan(inputs: int, outputs: int) -> tuple[Layer, ...]:
    start = "identity" if inputs == 64 else "swish"
    return GroupRational(start=start), Linear(inputs=inputs, outputs=outputs, bias=True)


def af_kan(inputs: int, outputs: int) -> tuple[Layer, ...]:
    return (AFKAN(inputs=inputs, outputs=outputs, norm=LayerNorm(dim=inputs)),)


CLASSIFIERS: dict[str, Callable[[int], Layer]] = {
    "MLP (SiLU)": lambda hidden: mlp(64, hidden, 10),
    **{name: kan_network(basis) for name, basis in BASES.items()},
    "GR-KAN": in_pairs(gr_kan),
    "AF-KAN": in_pairs(af_kan),
    "QKAN": in_pairs(lambda i, o: (QKAN(inputs=i, outputs=o),)),
}


def of_size(make: Callable[[int], Layer], parameters: int, step: int) -> tuple[int, Layer]:
    """The width, a multiple of `step`, whose network has nearly so many parameters."""
    sizes = {width: make(width).count().total for width in range(step, 2048, step)}
    width = min(sizes, key=lambda width: abs(sizes[width] - parameters))
    return width, make(width)


def score(net: Layer, key: Array, rate: Array, parts: tuple[Rows, ...], epochs: int) -> Array:
    """Accuracy on the parts that follow the first, after AdamW on that, in batches of 60."""
    first, *others = parts
    order = jax.random.fold_in(key, 1)
    params = trained(net, net.init(key), first, order, rate=rate, epochs=epochs, size=60)
    return jnp.stack([(net.apply(params, x).argmax(-1) == y).mean() for x, y in others])


def classification(parameters: int, seeds: int, epochs: int, rates: tuple[float, ...]) -> None:
    """Prints accuracies on test digits; of the rates, that of the best validation accuracy."""
    splits = [digits(seed) for seed in range(seeds)]
    parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *splits)
    parts = tuple((2 * x - 1, y) for x, y in parts)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    print("| network | widths | parameters | rate | percent of test digits right |")
    print("|---|---|---:|---:|---:|", flush=True)
    for name, make in CLASSIFIERS.items():
        width, net = of_size(make, parameters, 8 if name == "GR-KAN" else 1)

        @jax.jit
        def run(keys: Array, rates: Array, parts: Any, net: Layer = net) -> Array:
            def by_rate(rate: Array) -> Array:
                return jax.vmap(lambda k, p: score(net, k, rate, p, epochs))(keys, parts)

            return jax.vmap(by_rate)(rates)

        validation, test = 100 * np.moveaxis(np.array(run(keys, jnp.array(rates), parts)), -1, 0)
        best = validation.mean(1).argmax()
        print(
            f"| {name} | 64-{width}-10 | {net.count().total} | {rates[best]:g} | "
            f"{test[best].mean():.1f} ± {test[best].std():.1f} |",
            flush=True,
        )
