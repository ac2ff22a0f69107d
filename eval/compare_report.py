"""What a comparison found, as JSON, Markdown tables and a picture."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bestiary.eval.compare_statistics import Found
from bestiary.train.files import put, put_figure, put_json
from bestiary.train.log import read_metrics


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
        ("member", "width", "off", "loss", "- dense", "accuracy", "- dense", "rows", "seeds"),
        [
            [
                member["name"],
                str(member["width"]),
                f"{member['off']:+.2%}",
                averaged(member.get("validation_loss"), ".4f"),
                _paired(member.get("loss_difference"), "+.4f"),
                averaged(member.get("accuracy"), ".2%"),
                _paired(member.get("accuracy_difference"), "+.2f", 100),
                averaged(member.get("exact_rows"), ".1%"),
                str(len(member.get("validation_loss", {}).get("values", []))),
            ]
            for member in members
        ],
    )
    topology = comparison.get("topology")
    cost = Table(
        "Cost",
        (
            *("member", "active", "total", "FLOPs", "bytes", "non-zero"),
            *("tokens/s", "seconds", "MiB"),
            *((f"ms on {topology}",) if topology else ()),
        ),
        [
            [
                member["name"],
                _short(member["active_params"]),
                _short(member["total_params"]),
                _short(member["train_flops_per_token"]),
                _short(member["decode_bytes_per_token"]),
                averaged(member.get("nonzero"), ".1%"),
                averaged(member.get("tokens_per_second"), ",.0f"),
                averaged(member.get("seconds"), ",.1f"),
                mebibytes(member),
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


def _short(count: float) -> str:
    for unit in ("", "k", "M"):
        if count < 999.5:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:,.1f}G"


def averaged(found: Found | None, style: str) -> str:
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


def mebibytes(member: Found) -> str:
    size = member["step_bytes"]
    return "-" if size is None else f"{size / 2**20:,.1f}"


def _modelled(member: Found) -> str:
    seconds = member["modelled_step_seconds"]
    return "-" if isinstance(seconds, str) else f"{1e3 * seconds:.3f}"


NOTES = """\
Quality: held-out loss in nats and accuracy, mean ± sample standard deviation over seeds. "- dense":
mean ± half of the 95 % confidence interval of the paired difference, seed by seed (Student's t), of
accuracy in points; the members of one seed see the same rows in the same order. "rows": share of
the rows that are predicted right throughout. "off": how far a member is from the dense one's
budget.

Cost: active parameters (with the declared sparsity) and all; FLOPs of training per token; bytes per
decoded token; non-zero activations, measured on the held-out rows in the feed-forwards that report
them (experts and memories do not); tokens/s of training here, the median of the log; seconds of a
run here, compilation and evaluation included; MiB that the compiled training step takes on a
device, arguments and temporaries; where a TPU is named, modelled milliseconds of a training step,
in bfloat16.

Routing: share of the choices that were dropped, largest over mean load, in the mean over layers and
in the worst one, and entropy of the load as a share of that of equal loads; of training batches.
"""


def write(out: Path, comparison: Found) -> None:
    """Writes comparison.json, comparison.md and comparison.png into `out`, each of which appears
    whole."""
    put_json(out / "comparison.json", comparison)
    put(out / "comparison.md", markdown(comparison["command"], tables(comparison), NOTES))
    draw(out, comparison)


def markdown(command: str, found: list[Table], notes: str) -> str:
    parts = [f"# Comparison\n\n    {command}\n"]
    for table in found:
        lines = [list(table.columns), ["---"] * len(table.columns), *table.rows]
        text = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{text}\n")
    return "\n".join([*parts, notes])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


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
    put_figure(out / "comparison.png", figure)


def _curves(runs: list[Path]) -> tuple[list[int], np.ndarray]:
    """Logged steps, and training losses [runs, steps], means over a twentieth of the run."""
    logged = [read_metrics(run) for run in runs]
    losses = np.array([[line["loss"] for line in lines] for lines in logged])
    window = max(1, losses.shape[1] // 20)
    total = np.cumsum(np.pad(losses, ((0, 0), (window, 0))), 1)  # of all up to a step
    count = np.minimum(np.arange(losses.shape[1]) + 1, window)
    return [line["step"] for line in logged[0]], (total[:, window:] - total[:, :-window]) / count


def show(found: list[Table]) -> None:
    """Prints tables."""
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console()
    for table in found:
        grid = Grid(*table.columns, title=table.title)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
