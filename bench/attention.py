"""Blocks of a window beside blocks of all earlier keys and the dense reference, at one length.

    python bench/attention.py --length 8192 --window 1024

Forward and backward of one operation, in turns. Prints milliseconds, the temporary memory of the
compiled program, the live blocks, and the ratios to the dense causal reference. With `--documents`
rows hold as many of equal length, packed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.kernels.attention import Mask, attention
from bestiary.kernels.attention.masks import (
    CAUSAL,
    Window,
    causal_big_bird,
    streaming,
    visible_pairs,
)
from bestiary.layers import cache as kv
from bestiary.train.runtime import keep_freed_memory


def program(mask: Mask, impl: str, arrays: list[jax.Array]) -> Any:
    def step(
        q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, segments: jax.Array | None = None
    ) -> Any:
        where = kv.where({}, jnp.arange(q.shape[1])[None], segments, mask)
        y, gradient = jax.vjp(lambda *x: attention(*x, mask=mask, impl=impl, **where), q, k, v)
        return y, gradient(dy)

    return jax.jit(step).lower(*arrays).compile()


def milliseconds(run: Callable[..., Any], arrays: list[jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="attention by live blocks, beside dense attention")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    keep_freed_memory()
    heads = (arguments.heads, *[arguments.kv_heads] * 2, arguments.heads)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(key, (arguments.batch, arguments.length, n, arguments.head_dim))
        for key, n in zip(keys, heads, strict=True)
    ]
    if arguments.documents:
        place = jnp.arange(arguments.length)[None]
        segments = place * arguments.documents // arguments.length
        arrays.append(jnp.broadcast_to(segments, arrays[0].shape[:2]))
    window: Mask = CAUSAL & Window(arguments.window)
    members: dict[str, tuple[Mask, str]] = {
        "dense causal": (CAUSAL, "reference"),
        "causal": (CAUSAL, "auto"),
        "window": (window, "auto"),
        "streaming": (streaming(arguments.window), "auto"),
        "big_bird": (causal_big_bird(), "auto"),
    }
    programs = {name: program(*member, arrays) for name, member in members.items()}
    times: dict[str, list[float]] = {name: [] for name in members}
    for turn in range(arguments.rounds + 1):
        for name, run in programs.items():
            value = milliseconds(run, arrays)
            if turn:  # the first touches its memory
                times[name].append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: p.memory_analysis().temp_size_in_bytes / 2**20 for name, p in programs.items()}

    def line(*cells: str) -> None:
        print(cells[0].ljust(14), *(cell.rjust(12) for cell in cells[1:]))

    line("", "visible", "ms", "MiB", "x faster", "x leaner")
    for name, (mask, _) in members.items():
        share = visible_pairs(mask, arguments.length) / arguments.length**2
        ratios = (medians["dense causal"] / medians[name], memory["dense causal"] / memory[name])
        figures = (f"{medians[name]:.1f}", f"{memory[name]:.1f}", *(f"{r:.1f}" for r in ratios))
        line(name, f"{share:.4f}", *figures)
    print(f"window / blocked causal: {medians['causal'] / medians['window']:.1f} x faster")


if __name__ == "__main__":
    main()
