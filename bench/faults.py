"""How much accuracy bit flips in the weights cost, and what clipped activations keep of it.

    python bench/faults.py --draws 60

An MLP 64-128-128-64-10 learns scikit-learn's digits; then every stored bit of its parameters and
bounds flips with a probability of 1e-6 to 1e-4, and the table gives the accuracy on the test digits
in percent, mean and standard deviation over the draws, of float32 and of fixed-point Q15.16 words:
the ReLU network, its activations clipped at their profiled maxima (a bound a layer, or one for each
neuron of the last), FT-ClipAct's searched bounds, ProAct's trained ones.
"""

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bestiary.eval.clipping import Per, accuracy, clip, faulty_accuracy, search_bounds
from bestiary.eval.faults import Format, number_format
from bestiary.eval.proact import ProAct, train_bounds
from bestiary.layers import Relu
from bestiary.layers.base import Layer, Tree
from bestiary.layers.clipped import Kind
from bestiary.layers.perceptron import Perceptron, perceptron

FORMATS = ("float32", "q15.16")
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
WIDTHS = (64, 128, 128, 64, 10)

Rows = tuple[jax.Array, jax.Array]


def digits(seed: int) -> tuple[Rows, Rows, Rows]:
    """1200 digits to train, 237 to validate and 360 to test, pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x, y = data.data[order].astype(np.float32) / 16, data.target[order].astype(np.int32)
    ends = [0, 1200, 1437, len(y)]
    parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    train, validation, test = ((jnp.asarray(x[part]), jnp.asarray(y[part])) for part in parts)
    return train, validation, test


def trained(
    model: Layer,
    params: Tree,
    rows: Rows,
    key: jax.Array,
    *,
    rate: Any = 3e-3,
    epochs: int = 100,
    size: int = 100,
) -> Tree:
    """Parameters after AdamW on the cross-entropy: weight decay 1e-3, a rate along a cosine,
    batches of `size` rows in an order that the key draws for each epoch."""
    x, labels = rows
    steps = epochs * (len(x) // size)
    tx = optax.adamw(optax.cosine_decay_schedule(1.0, steps), weight_decay=1e-3)

    def loss(params: Tree, chosen: jax.Array) -> jax.Array:
        logits = model.apply(params, x[chosen])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

    def step(carry: tuple, chosen: jax.Array) -> tuple[tuple, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, chosen), state, params)
        updates = jax.tree.map(lambda u: rate * u, updates)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, epochs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, len(x)))(keys)
    return jax.lax.scan(step, (params, tx.init(params)), orders.reshape(steps, size))[0][0]


def members(
    model: Perceptron, params: Tree, train: Rows, validation: Rows, form: Format, seed: int
) -> dict[str, tuple[Perceptron, Tree]]:
    """What the rows of the table compare; bounds are searched under faults of the format."""
    found = {"ReLU": (model, params)}
    kinds: dict[str, tuple[Kind, Per]] = {
        "saturating, per layer": ("saturate", "layer"),
        "zero, per layer": ("zero", "layer"),
        "zero, hybrid": ("zero", "hybrid"),
        "zero, per neuron": ("zero", "neuron"),
    }
    for name, (kind, per) in kinds.items():
        found[name] = clip(model, params, train[0], kind=kind, per=per)
    key = jax.random.key(seed)
    layerwise, bounded = found["zero, per layer"]
    searched = search_bounds(layerwise, bounded, *train, key, format=form)
    found["FT-ClipAct"] = layerwise, searched
    smooth, started = clip(model, params, train[0], kind="smooth", per="hybrid")
    learned = train_bounds(smooth, started, model, train, validation, key, ProAct())
    found["smooth, hybrid"] = smooth, started
    found["ProAct"] = smooth, learned
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy under bit flips in the weights.")
    parser.add_argument("--draws", type=int, default=60, help="fault patterns for each figure")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start, seed = time.perf_counter(), arguments.seed

    train, validation, test = digits(seed)
    model = perceptron(WIDTHS, lambda width: Relu())
    key = jax.random.key(seed)
    params = jax.jit(partial(trained, model))(model.init(key), train, key)
    for stored in FORMATS:
        form = number_format(stored)
        print(f"\n{stored}: percent right of {len(test[1])} test digits, {arguments.draws} draws\n")
        print("| activation | clean | " + " | ".join(f"{rate:g}" for rate in RATES) + " |")
        print("|---|---:|" + "---:|" * len(RATES))
        for name, (member, own) in members(model, params, train, validation, form, seed).items():
            cells = [f"{float(accuracy(member, own, *test)):.1f}"]
            for rate in RATES:
                key = jax.random.fold_in(jax.random.key(seed), 1)
                right = faulty_accuracy(
                    member, own, *test, key, rate, draws=arguments.draws, format=form
                )
                cells.append(f"{right.mean():.1f} ± {right.std():.1f}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
