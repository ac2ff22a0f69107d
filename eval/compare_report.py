"""What a comparison found: statistics over seeds, as JSON, Markdown tables and a picture."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

    names = ("validation_loss", "accuracy", "nonzero", "tokens_per_second", "seconds")
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


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def tables(comparison: Found) -> list[Table]:
    """The comparison for people."""
    members = comparison["members"]
    quality = Table(
        f"Quality at equal {comparison['match']}, after {comparison['steps']} steps of "
        f"{comparison['tokens_per_step']} tokens",
        ("member", "width", "off", "loss", "- dense", "accuracy", "- dense", "seeds"),
        [
            [
                member["name"],
                str(member["width"]),
                f"{member['off']:+.2%}",
                _spread(member.get("validation_loss"), ".4f"),
                _paired(member.get("loss_difference"), "+.4f"),
                _spread(member.get("accuracy"), ".2%"),
                _paired(member.get("accuracy_difference"), "+.2f", 100),
                str(len(member.get("validation_loss", {}).get("values", []))),
            ]
            for member in members
        ],
    )
    topology = comparison.get("topology")
    cost = Table(
        "Cost",
        (
            *("member", "active", "total", "FLOPs", "bytes", "non-zero", "tokens/s", "seconds"),
            *((f"ms on {topology}",) if topology else ()),
        ),
        [
            [
                member["name"],
                f"{member['active_params']:,}",
                f"{member['total_params']:,}",
                f"{member['train_flops_per_token']:,.0f}",
                f"{member['decode_bytes_per_token']:,.0f}",
                _spread(member.get("nonzero"), ".1%"),
                _spread(member.get("tokens_per_second"), ",.0f"),
                _spread(member.get("seconds"), ",.1f"),
                *((_modelled(member),) if topology else ()),
            ]
            for member in members
        ],
    )
    found = [quality, cost]
    if any("routing" in member for member in members):
        found.append(
            Table(
                f"Routing ({comparison['routing']}), last quarter of training",
                ("member", "dropped", "max/mean load", "worst layer", "entropy"),
                [
                    [
                        member["name"],
                        f"{member['routing']['dropped']:.2%}",
                        f"{member['routing']['load_max']:.2f}",
                        f"{max(member['routing']['layers']['load_max']):.2f}",
                        f"{member['routing']['load_entropy']:.3f}",
                    ]
                    for member in members
                    if "routing" in member
                ],
            )
        )
    failures = [[m["name"], f"seed {n}", said] for m in members for n, said in m["failed"].items()]
    for member in members:
        if isinstance(said := member.get("modelled_step_seconds"), str):
            failures.append([member["name"], str(topology), said])
    return [*found, Table("Failed", ("member", "run", "error"), failures)] if failures else found


def _spread(found: Found | None, style: str) -> str:
    if found is None:
        return "-"
    spread = "" if found["std"] is None else f" ± {found['std']:{style}}"
    return f"{found['mean']:{style}}{spread}"


def _paired(found: Found | None, style: str, scale: float = 1) -> str:
    if found is None:
        return "-"
    half = found["half"]
    interval = "" if half is None else f" ± {scale * half:{style.strip('+')}}"
    return f"{scale * found['mean']:{style}}{interval}"


def _modelled(member: Found) -> str:
    seconds = member["modelled_step_seconds"]
    return "-" if isinstance(seconds, str) else f"{1e3 * seconds:.3f}"


NOTES = """\
Quality: held-out loss in nats and accuracy, mean ± sample standard deviation over seeds. "- dense":
mean ± half of the 95 % confidence interval of the paired difference, seed by seed (Student's t), of
accuracy in points; the members of one seed see the same rows in the same order. "off": how far a
member is from the dense one's budget.

Cost: active parameters (with the declared sparsity) and all; FLOPs of training per token; bytes per
decoded token; non-zero activations, measured on the held-out rows; tokens/s of training here;
seconds of a run here, compilation and evaluation included; where a TPU is named, modelled
milliseconds of a training step, in bfloat16.

Routing: share of the choices that were dropped, largest over mean load, in the mean over layers and
in the worst one, and entropy of the load as a share of that of equal loads; of training batches.
"""


def write(out: Path, comparison: Found) -> None:
    """Writes comparison.json, comparison.md and comparison.png into `out`, each of which appears
    whole."""
    _replace(out / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    parts = [f"# Comparison\n\n    {comparison['command']}\n"]
    for table in tables(comparison):
        lines = [list(table.columns), ["---"] * len(table.columns), *table.rows]
        text = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{text}\n")
    _replace(out / "comparison.md", "\n".join([*parts, NOTES]))
    draw(out, comparison)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)


def draw(out: Path, comparison: Found) -> None:
    """Draws comparison.png: losses while training (mean and range over seeds), and every seed's
    final loss and accuracy."""
    from matplotlib.figure import Figure

    members = [member for member in comparison["members"] if "validation_loss" in member]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    curves, *finals = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for i, member in enumerate(members):
        color = f"C{i % 10}"
        steps, losses = _curves([out / path for path in member["runs"]])
        style = "-" if i < 10 else "--"
        curves.plot(steps, losses.mean(0), style, color=color, label=member["name"], linewidth=1.2)
        curves.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.15)
        for axis, name in zip(finals, ("validation_loss", "accuracy"), strict=True):
            values = member[name]["values"]
            axis.plot(values, [i] * len(values), "o", color=color, markersize=4, alpha=0.6)
            axis.plot([member[name]["mean"]], [i], "|", color=color, markersize=16)
    curves.set(xlabel="step", ylabel="training loss (nats), smoothed")
    if members:
        curves.legend()
    for axis, name in zip(finals, ("validation loss (nats)", "accuracy"), strict=True):
        axis.set_yticks(range(len(members)), [member["name"] for member in members])
        axis.invert_yaxis()
        axis.set_xlabel(name)
    for axis in (curves, *finals):
        axis.grid(alpha=0.3)
    beside = out / "comparison.tmp.png"
    figure.savefig(beside, dpi=120)
    beside.replace(out / "comparison.png")


def _curves(runs: list[Path]) -> tuple[list[int], np.ndarray]:
    """Logged steps, and training losses [runs, steps], means over a twentieth of the run."""
    logged = [read_metrics(run) for run in runs]
    losses = np.array([[line["loss"] for line in lines] for lines in logged])
    window = max(1, losses.shape[1] // 20)
    total = np.cumsum(np.pad(losses, ((0, 0), (window, 0))), 1)  # of all up to a step
    count = np.minimum(np.arange(losses.shape[1]) + 1, window)
    return [line["step"] for line in logged[0]], (total[:, window:] - total[:, :-window]) / count


def show(comparison: Found) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console()
    for table in tables(comparison):
        grid = Grid(*table.columns, title=table.title)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
