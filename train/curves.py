"""curves.png: losses, learning rate and sparsity over the steps of a run."""

from pathlib import Path

from bestiary.train.files import put_figure
from bestiary.train.log import nonzero, read_metrics


def draw(run_dir: Path, unit: str) -> Path:
    """Draws RUN/curves.png from RUN/metrics.jsonl, one panel under the other; returns its path.

    `unit` is that of the loss; what else was measured on the validation split has panels too.
    """
    from matplotlib.figure import Figure  # takes half a second

    lines = read_metrics(run_dir)
    panels = {unit: ["loss", "validation_loss"]}
    measured = {name for line in lines for name in line if name.startswith("validation_")}
    for name in sorted(measured - {"validation_loss"}):
        panels[name.removeprefix("validation_")] = [name.removeprefix("validation_"), name]
    panels["learning rate"] = ["learning_rate"]
    for line in lines:
        line["nonzero"] = nonzero(line)
    if any(line["nonzero"] is not None for line in lines):
        panels["non-zero activations"] = ["nonzero"]

    figure = Figure(figsize=(8, 2.2 + 2 * len(panels)), layout="constrained")
    heights = [2, *[1] * (len(panels) - 1)]
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if known:
                style = "o-" if name.startswith("validation_") else "-"
                axis.plot(*zip(*known, strict=True), style, label=name, markersize=3, linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for axis in axes[1:]:
        axis.set_ylim(bottom=0)
    for axis in axes:
        if len(axis.lines) > 1:
            axis.legend()
    axes[0].set_title(run_dir.name)
    axes[-1].set_xlabel("step")
    path = run_dir / "curves.png"
    put_figure(path, figure)
    return path
