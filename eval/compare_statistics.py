"""What the runs of a comparison say together: means, spreads, paired differences, router loads."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.train.log import read_metrics

# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
ROUTER = ("dropped", "load_max", "load_entropy")

Found = dict[str, Any]
"""Figures by name, fit for JSON: those of a run, a member or a comparison."""


def spread(values: Sequence[float]) -> Found:
    """Mean and sample standard deviation (None of one value)."""
    several = len(values) > 1
    deviation = statistics.stdev(values) if several else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def paired(values: dict[int, float], baseline: dict[int, float]) -> Found | None:
    """Mean difference from the baseline over the seeds that both have, and the half-width of its
    95 % confidence interval (paired t; None of one seed). None without a common seed."""
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        return None
    found, n = spread(differences), len(differences)
    half = None if n < 2 else t975(n - 1) * found["std"] / math.sqrt(n)
    return {"mean": found["mean"], "half": half, "seeds": n}


def t975(freedom: int) -> float:
    """97.5 % quantile of Student's t: from a table, then by Cornish-Fisher's expansion."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def routing_of(run_dir: Path) -> Found:
    """Tokens dropped, largest over mean load and the load's entropy in the last quarter of a run:
    means over the logged steps, per layer; {} without routers."""
    lines = [line["layers"] for line in read_metrics(run_dir) if "layers" in line]
    found = {}
    for kind in ROUTER:
        last = lines[-(-3 * len(lines) // 4) :] or lines[-1:]
        per_step = [
            [
                value
                for name, layers in line.items()
                if name.split("/")[-1] == kind
                for value in layers
            ]
            for line in last
        ]
        if per_step and per_step[0]:
            found[kind] = np.mean(per_step, 0).tolist()
    if "load_max" in found:
        found.setdefault("dropped", [0.0] * len(found["load_max"]))  # dropless
    return found


def summary(facts: Found, runs: dict[int, Found], baseline: dict[int, Found]) -> Found:
    """A member's row: its `facts`, and what its finished runs, by seed, say together."""
    if not runs:
        return facts

    def over(name: str) -> dict[int, float]:
        return {seed: run[name] for seed, run in runs.items() if run.get(name) is not None}

    def difference(name: str) -> Found | None:
        return paired(over(name), {seed: run[name] for seed, run in baseline.items()})

    names = (
        *("validation_loss", "accuracy", "exact_rows", "nonzero"),
        *("tokens_per_second", "step_seconds", "seconds"),
    )
    found = {name: spread(list(over(name).values())) for name in names if over(name)}
    if runs is not baseline:
        found |= {
            "loss_difference": difference("validation_loss"),
            "accuracy_difference": difference("accuracy"),
        }
    routers = [run["routing"] for run in runs.values() if run["routing"]]
    if routers:
        layers = {kind: np.mean([r[kind] for r in routers], 0).tolist() for kind in ROUTER}
        found["routing"] = {
            "dropped": statistics.fmean(layers["dropped"]),
            "load_max": statistics.fmean(layers["load_max"]),
            "load_entropy": statistics.fmean(layers["load_entropy"]),
            "layers": layers,
        }
    return facts | found
