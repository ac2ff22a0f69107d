"""Kolmogorov-Arnold layers beside what they replace, on the CPU.

    python bench/kan.py layers      # one layer: beside jaxkan, pykan and efficient-kan
    python bench/kan.py regression  # [2, 5, 1] beside an MLP of its size, on exp(sin(pi x) + y^2)
    python bench/kan.py digits      # every basis beside an MLP of equal size
    python bench/kan.py decoder     # a decoder with GR-KAN feed-forwards beside GELU

`layers` needs pip install jaxkan, torch, and pykan with its scikit-learn, matplotlib, pandas, tqdm
and pyyaml; `digits` scikit-learn.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kan_fits
import kan_peers
import optax
from turns import in_turns

from bestiary.layers import GRKAN, MLP, Gelu, Layer
from bestiary.train.runtime import keep_freed_memory
from bestiary.zoo.llama import byte_llama


def training_step(ffn: Layer, layers: int, dim: int, tokens: int) -> Callable[[], Any]:
    """One step of AdamW on a decoder of the zoo, in rows of 256 bytes."""
    model = byte_llama(layers, dim, ffn).unrolled()
    params, optimizer = model.init(jax.random.key(0)), optax.adamw(1e-3)
    state = params, optimizer.init(params)
    ids = jax.random.randint(jax.random.key(1), (tokens // 256, 257), 0, 256)

    def run(state: Any) -> Any:
        params, moments = state

        def loss(params: Any) -> jax.Array:
            logits, _, _ = model.apply(params, ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return jax.tree.map(jnp.add, params, updates), moments

    compiled = jax.jit(run, donate_argnums=0).lower(state).compile()

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state))

    return step


def decoder(layers: int, dim: int, tokens: int, rounds: int) -> None:
    """GR-KAN and GELU feed-forwards of equal size in one decoder."""
    hidden = 4 * dim
    ffns = {
        "gelu": MLP(dim=dim, hidden=hidden, activation=Gelu(), bias=True),
        "grkan": GRKAN(dim=dim, hidden=hidden),
    }
    steps = {name: training_step(ffn, layers, dim, tokens) for name, ffn in ffns.items()}
    times = in_turns(steps, rounds, untimed=2)
    print(f"{layers} layers of width {dim}, {tokens} tokens, ms a step")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["gelu"], strict=True))
        print(
            f"{name:8s} median {statistics.median(values):8.1f}  best {min(values):8.1f}  "
            f"median of the ratios to gelu {ratio:.3f}"
        )


def shape(text: str) -> kan_peers.Shape:
    inputs, outputs, rows = map(int, text.split("x"))
    return inputs, outputs, rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Kolmogorov-Arnold layers beside others")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("layers", help="ms and temporary memory of one layer")
    part.add_argument("--shapes", type=shape, nargs="+", default=kan_peers.SHAPES, metavar="IxOxN")
    part.add_argument("--rounds", type=int, default=5)
    part = parts.add_parser("regression", help="test RMSE of a KAN and of MLPs")
    part.add_argument("--method", choices=("adam", "lbfgs"), default="adam")
    part.add_argument("--steps", type=int, default=3000)
    part.add_argument("--seeds", type=int, default=3)
    part = parts.add_parser("digits", help="accuracy of every basis and of an MLP")
    part.add_argument("--parameters", type=int, default=6000)
    part.add_argument("--seeds", type=int, default=5)
    part.add_argument("--epochs", type=int, default=40)
    part.add_argument("--rates", type=float, nargs="+", default=(3e-3, 1e-2))
    part = parts.add_parser("decoder", help="ms of a training step, GR-KAN and GELU")
    part.add_argument("--layers", type=int, default=4)
    part.add_argument("--dim", type=int, default=128)
    part.add_argument("--tokens", type=int, default=1024)
    part.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    keep_freed_memory()
    match options.part:
        case "layers":
            kan_peers.layers(options.shapes, options.rounds)
        case "regression":
            kan_fits.regression(options.method, options.steps, options.seeds)
        case "digits":
            kan_fits.classification(
                options.parameters, options.seeds, options.epochs, tuple(options.rates)
            )
        case "decoder":
            decoder(options.layers, options.dim, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
