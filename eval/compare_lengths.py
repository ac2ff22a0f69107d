"""Comparisons at several lengths of rows side by side: what grows, and how fast."""

from pathlib import Path

from bestiary.eval.compare_report import Table, averaged, markdown, mebibytes
from bestiary.eval.compare_statistics import Found
from bestiary.train.files import put, put_figure, put_json

FIGURES: dict[str, tuple[str, str]] = {
    "validation_loss": ("Held-out loss (nats)", ".4f"),
    "accuracy": ("Accuracy", ".2%"),
    "exact_rows": ("Rows right throughout", ".1%"),
    "step_seconds": ("Seconds of a training step here", ".4f"),
}
MEMORY = "MiB of a training step, arguments and temporaries"
DECODING = "Bytes of the cache at the end of a row"
NOTES = """\
Members against the length of rows, of which a step has as many as make equal tokens. Mean ± sample
standard deviation over seeds. Every length has a folder of its own with all its figures.
"""


def tables(comparisons: list[Found]) -> list[Table]:
    """A table per figure, of members by lengths."""
    columns = ("member", *(str(found["length"]) for found in comparisons))
    by_member = [
        (member["name"], [found["members"][i] for found in comparisons])
        for i, member in enumerate(comparisons[0]["members"])
    ]
    found = [
        Table(
            title,
            columns,
            [[name, *(averaged(m.get(key), style) for m in row)] for name, row in by_member],
        )
        for key, (title, style) in FIGURES.items()
    ]
    memory = [[name, *map(mebibytes, row)] for name, row in by_member]
    caches = [[name, *(f"{m['cache_bytes']:,}" for m in row)] for name, row in by_member]
    return [*found, Table(MEMORY, columns, memory), Table(DECODING, columns, caches)]


def write(out: Path, command: str, comparisons: list[Found]) -> None:
    """Writes lengths.json, lengths.md and lengths.png into `out`, each of which appears whole."""
    found = {"command": command, "comparisons": comparisons}
    put_json(out / "lengths.json", found)
    put(out / "lengths.md", markdown(command, tables(comparisons), NOTES))
    draw(out, comparisons)


def draw(out: Path, comparisons: list[Found]) -> None:
    """Draws lengths.png: the figures against length, a line per member."""
    from matplotlib.figure import Figure

    def of(member: Found, key: str) -> float | None:
        if key == MEMORY:
            return None if member["step_bytes"] is None else member["step_bytes"] / 2**20
        return member[key]["mean"] if key in member else None

    panels = {key: FIGURES[key][0] for key in ("validation_loss", "accuracy", "step_seconds")}
    panels[MEMORY] = MEMORY
    figure = Figure(figsize=(18, 4.5), layout="constrained")
    lengths = [found["length"] for found in comparisons]
    for axis, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, member in enumerate(comparisons[0]["members"]):
            values = [of(found["members"][i], key) for found in comparisons]
            known = [(n, v) for n, v in zip(lengths, values, strict=True) if v is not None]
            if known:
                style = "o-" if i < 10 else "o--"
                axis.plot(*zip(*known, strict=True), style, label=member["name"], markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        if key in ("step_seconds", MEMORY):
            axis.set_yscale("log")
        axis.set(xlabel="tokens in a row", ylabel=title)
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.axes[-1].legend(handles, labels)
    put_figure(out / "lengths.png", figure)
