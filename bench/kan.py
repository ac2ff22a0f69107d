"""Kolmogorov-Arnold layers beside what they replace, in turns on the CPU.

python bench/kan.py                    # a decoder with GR-KAN feed-forwards beside GELU
python bench/kan.py --dim 384 --layers 4 --tokens 1024
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

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


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, by round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn > 1:  # the first are to warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def decoder(layers: int, dim: int, tokens: int, rounds: int) -> None:
    """GR-KAN and GELU feed-forwards of equal size in one decoder."""
    hidden = 4 * dim
    ffns = {
        "gelu": MLP(dim=dim, hidden=hidden, activation=Gelu(), bias=True),
        "grkan": GRKAN(dim=dim, hidden=hidden),
    }
    steps = {name: training_step(ffn, layers, dim, tokens) for name, ffn in ffns.items()}
    times = in_turns(steps, rounds)
    print(f"{layers} layers of width {dim}, {tokens} tokens, ms a step")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["gelu"], strict=True))
        print(
            f"{name:8s} median {statistics.median(values):8.1f}  best {min(values):8.1f}  "
            f"median of the ratios to gelu {ratio:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kolmogorov-Arnold layers beside others")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    keep_freed_memory()
    decoder(options.layers, options.dim, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
