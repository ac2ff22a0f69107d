"""Timing of several programs that take turns, so that what slows the machine slows all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

K = TypeVar("K")


def in_turns(
    runs: Mapping[K, Callable[[], Any]], rounds: int, untimed: int = 1
) -> dict[K, list[float]]:
    """Milliseconds of each run by round, behind `untimed` rounds, of which the first compiles."""
    times: dict[K, list[float]] = {name: [] for name in runs}
    for turn in range(untimed + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn >= untimed:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
