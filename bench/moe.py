"""A mixture's step grows with active parameters, not with the number of experts.

    python bench/moe.py --tokens 4096 --dim 512 --hidden 512 --top-k 4

Forward and backward of one layer with 8, 64 and 256 experts, of which a token uses the same number,
in turns; prints milliseconds and their ratio to the first.
"""

import argparse
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
from turns import in_turns

from bestiary.layers import GLU, MoE, Router, Silu
from bestiary.train.runtime import keep_freed_memory


def step(num_experts: int, arguments: argparse.Namespace) -> Callable[[], jax.Array]:
    dim = arguments.dim
    layer = MoE(
        router=Router(dim=dim, num_experts=num_experts, top_k=arguments.top_k),
        expert=GLU(dim=dim, hidden=arguments.hidden, activation=Silu()),
    )
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (arguments.tokens // 128, 128, dim))

    @jax.jit
    def run(params: dict, x: jax.Array) -> jax.Array:
        def loss(params: dict, x: jax.Array) -> jax.Array:
            return jnp.square(layer.apply(params, x)[0]).mean()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    return lambda: run(params, x)


def main() -> None:
    parser = argparse.ArgumentParser(description="mixtures of more and more experts")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_freed_memory()
    runs = {n: step(n, arguments) for n in (8, 64, 256)}
    times = in_turns(runs, arguments.rounds)
    first = statistics.median(times[8])
    for n, values in times.items():
        median = statistics.median(values)
        print(f"{n:4d} experts {median:8.1f} ms (best {min(values):.1f})  x {median / first:.2f}")


if __name__ == "__main__":
    main()
