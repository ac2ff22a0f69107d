"""UltraMemV2's step grows with the rows that are read, not with those of the table.

    python bench/memory.py --layers 2 --tokens 1024

Forward and backward of a decoder of the published proportions whose table has 10^4, 10^5 and 10^6
rows, in turns, then AdamW on the table alone; prints milliseconds, and ratios to the first of them.
"fixed" leaves the gradient of the table out. "whole" has it: an array in the form of the table is
filled with zeros once, and every layer adds the rows that it read. "optimiser" is the update of the
table with moments in full, "rows" that with `table_moments="rows"`: passes over the whole table,
which grow with it. Half of the table is in sight of a layer, so that the keys that are scored grow
with the root of the rows: that share is part of "fixed".
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from turns import in_turns

from bestiary.layers.base import Tree
from bestiary.train.optimizer import Moments, Optimizer
from bestiary.train.runtime import keep_freed_memory
from bestiary.train.step import merge, split
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.ultramem import memory, olmo, with_memory

Run = Callable[[], Any]


def model(rows: int, arguments: argparse.Namespace) -> Decoder:
    """`ultramemv2_227m` with fewer layers, bytes for tokens, narrower rows and about `rows` of
    them."""
    dim, n = arguments.dim, arguments.layers
    dense = olmo(num_layers=n, dim=dim, num_heads=dim // 64, hidden=13 * dim // 4, tied=True)
    dense = replace(dense, embedding=replace(dense.embedding, vocab_size=256))
    return with_memory(
        dense,
        memory(
            num_layers=n,
            dim=dim,
            knum=round((rows / n) ** 0.5),
            key_dim=dim // 4,
            top_k=32,
            value_dim=dim // 8,
            pre_dim=dim // 24,
        ),
    )


def passes(decoder: Decoder, tokens: int) -> tuple[Run, Run]:
    """Forward and backward without and with the gradient of the table."""
    params, frozen = split(decoder.declare(), decoder.init(jax.random.key(0)))
    table = params.pop("shared")
    nothing = frozen.pop("shared")
    ids = jax.random.randint(jax.random.key(1), (tokens // 128, 128), 0, 256)

    def loss(params: Tree, table: Tree, frozen: Tree, ids: jax.Array) -> jax.Array:
        whole = merge(params | {"shared": table}, frozen | {"shared": nothing})
        logits, _, _ = decoder.apply(whole, ids)
        return jax.nn.log_softmax(logits)[..., 7].mean()

    def run(*wanted: int) -> Run:
        gradient = jax.grad(loss, wanted)

        @partial(jax.jit, donate_argnums=0, keep_unused=True)
        def program(last: Tree, params: Tree, table: Tree, frozen: Tree, ids: jax.Array) -> Tree:
            del last  # its memory is used again: new pages cost more than zeros and additions do
            return gradient(params, table, frozen, ids)

        state = jax.tree.map(jnp.zeros_like, (params, table)[: len(wanted)])

        def once() -> Any:
            nonlocal state
            state = program(state, params, table, frozen, ids)
            return state

        return once

    return run(0), run(0, 1)


def update(decoder: Decoder, moments: Moments) -> Run:
    """AdamW on the table alone."""
    assert decoder.shared is not None
    tx = Optimizer(table_moments=moments, clip=0.0).build(decoder.shared.declare())
    table = decoder.shared.init(jax.random.key(0))
    gradient, state = jax.tree.map(jnp.zeros_like, table), [table, tx.init(table)]

    def step(gradient: Tree, table: Tree, opt: Tree) -> tuple[Tree, Tree]:
        updates, opt = tx.update(gradient, opt, table)
        return optax.apply_updates(table, updates), opt

    program = jax.jit(step, donate_argnums=(1, 2))

    def run() -> Any:
        state[:] = program(gradient, *state)
        return state

    return run


def timed(runs: dict[int, Run], rounds: int) -> dict[int, float]:
    """Median milliseconds of each, in turns."""
    return {rows: statistics.median(values) for rows, values in in_turns(runs, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="tables of more and more rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=768, help="a multiple of 192")
    parser.add_argument("--tokens", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    models = {rows: model(rows, arguments) for rows in arguments.rows}
    both = {rows: passes(decoder, arguments.tokens) for rows, decoder in models.items()}
    fixed = timed({rows: runs[0] for rows, runs in both.items()}, arguments.rounds)
    whole = timed({rows: runs[1] for rows, runs in both.items()}, arguments.rounds)
    del both
    first = arguments.rows[0]
    for rows, decoder in models.items():
        full, by_row = (
            timed({rows: update(decoder, moments)}, arguments.rounds)[rows]
            for moments in ("full", "rows")
        )
        print(
            f"{rows:9,d} rows  fixed {fixed[rows]:8.1f} ms  x {fixed[rows] / fixed[first]:.2f}"
            f"  whole {whole[rows]:8.1f} ms  x {whole[rows] / whole[first]:.2f}"
            f"  optimiser {full:8.1f} ms, rows {by_row:8.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
