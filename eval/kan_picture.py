"""Pictures of KANs: the network as a graph with its edge curves, and every edge on its own."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from bestiary.eval.kan_attribution import attribute
from bestiary.eval.kan_symbolic import Edge, tables
from bestiary.layers.base import Array, Tree
from bestiary.layers.kan_net import KANNet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f3b57"
_BOX = 0.30  # half the width of an edge's box, of the unit between two boxes of a column
_MOST = 64  # edges that are drawn one by one


def graph(
    states: dict[str, tuple[KANNet, Tree]],
    x: Array,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> "Figure":
    """Networks under their titles, side by side: nodes, and in the middle of every edge its curve
    where the samples x [n, inputs] reach it. Masked edges are missing; the more an edge scores
    (`attribute`) the darker it is."""
    from matplotlib.figure import Figure

    tall = max(_height(net) for net, _ in states.values())
    depth = max(len(net.layers) for net, _ in states.values())
    size = (0.3 + 3.4 * depth * len(states), 1.1 + 0.62 * tall)
    figure = Figure(figsize=(min(size[0], 22), min(size[1], 22)), layout="constrained")
    axes = figure.subplots(1, len(states), squeeze=False)[0]
    for axis, (title, (net, params)) in zip(axes, states.items(), strict=True):
        _draw(axis, net, params, x, inputs, outputs, tall)
        axis.set_title(title, fontsize=11)
    return figure


def _height(net: KANNet) -> int:
    """How many boxes stand above each other where most do."""
    return max(kan.inputs * kan.outputs for kan in net.layers)


def _draw(
    axis: "Axes",
    net: KANNet,
    params: Tree,
    x: Array,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    tall: int,
) -> None:
    found, scores = list(tables(net, params, x)), attribute(net, params, x)
    unit = 3.4  # from one column of nodes to the next

    def spread(n: int) -> np.ndarray:
        """Heights of n things in a column."""
        return tall * (0.5 - (np.arange(n) + 0.5) / n)

    used = {(0, j) for j in range(sum(net.nodes[0]))}
    used |= {(len(net.layers), o) for o in range(sum(net.nodes[-1]))}
    for i in range(len(net.layers)):
        here = [edge for edge in found if edge.layer == i]
        adding, multiplying = net.nodes[i + 1]
        left, right = spread(sum(net.nodes[i])), spread(adding + multiplying)
        owner = [*range(adding), *np.repeat(np.arange(multiplying) + adding, net.arity)]
        used |= {(i, e.input) for e in here} | {(i + 1, int(owner[e.output])) for e in here}
        # boxes in the order of where their edges come from and go to: few lines cross
        here.sort(key=lambda e: (-(left[e.input] + right[int(owner[e.output])]), e.output, e.input))
        strongest = max(float(scores.edges[i].max()), 1e-9)
        for y, edge in zip(spread(len(here)), here, strict=True):
            share = float(scores.edges[i][edge.output, edge.input]) / strongest
            alpha = 0.2 + 0.8 * math.tanh(3 * share)
            middle, target = (i + 0.5) * unit, right[int(owner[edge.output])]
            line: dict[str, Any] = {"color": INK, "alpha": alpha, "linewidth": 1.1, "zorder": 1}
            axis.plot([i * unit, middle - 0.45], [left[edge.input], y], **line)
            axis.plot([middle + 0.45, (i + 1) * unit], [y, target], **line)
            _box(axis, edge, middle, float(y), alpha)
    for i in range(len(net.nodes)):
        adding, multiplying = net.nodes[i]
        for j, y in enumerate(spread(adding + multiplying)):
            if (i, j) not in used:
                continue
            times = j >= adding
            size = 15 if times else 9
            axis.plot(i * unit, y, "o", color="white", mec=INK, markersize=size, zorder=3)
            if times:
                axis.text(i * unit, y, "×", ha="center", va="center", color=INK, zorder=4)
            if i == 0:
                axis.text(-0.25, y, inputs[j], ha="right", va="center", fontsize=12)
            elif i == len(net.layers):
                axis.text(i * unit + 0.25, y, outputs[j], ha="left", va="center", fontsize=12)
    axis.set_xlim(-1.0, len(net.layers) * unit + 1.0)
    axis.set_ylim(-tall / 2 - 0.1, tall / 2 + 0.1)
    axis.axis("off")


def _box(axis: "Axes", edge: Edge, x: float, y: float, alpha: float) -> None:
    """The curve of an edge in a frame around (x, y)."""
    from matplotlib.patches import Rectangle

    frame = Rectangle((x - 0.45, y - 1.3 * _BOX), 0.9, 2.6 * _BOX, zorder=2)
    frame.set(facecolor="white", edgecolor=INK, alpha=1, linewidth=0.8)
    frame.set_edgecolor((*_rgb(INK), alpha))
    axis.add_patch(frame)
    along = (edge.x - edge.x[0]) / max(np.ptp(edge.x), 1e-12)
    up = (edge.y - edge.y.min()) / max(np.ptp(edge.y), 1e-12)
    axis.plot(
        x - 0.38 + 0.76 * along,
        y - 1.05 * _BOX + 2.1 * _BOX * up,
        color=INK,
        alpha=alpha,
        linewidth=1.6,
        zorder=3,
    )


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def edge_curves(
    found: list[Edge], inputs: tuple[str, ...], outputs: tuple[str, ...], last: int
) -> "Figure":
    """A panel for every edge (at most 64): its curve and, if it has fits, the best of them. Layer
    `last` is the one whose outputs are named."""
    from matplotlib.figure import Figure

    shown = sorted(found, key=lambda e: -float(np.std(e.y)))[:_MOST]
    shown = sorted(shown, key=lambda e: (e.layer, e.output, e.input))
    columns = min(max(len(shown), 1), 5)
    rows = math.ceil(max(len(shown), 1) / columns)
    figure = Figure(figsize=(2.9 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, edge in zip(axes, shown, strict=False):
        axis.plot(edge.x, edge.y, color=INK, linewidth=2.4, alpha=0.75)
        source = inputs[edge.input] if edge.layer == 0 else _hidden(edge.layer, edge.input)
        hidden = edge.layer < last
        target = _hidden(edge.layer + 1, edge.output) if hidden else outputs[edge.output]
        title = f"{source} → {target}"
        if edge.fits:
            best = edge.fits[0]
            axis.plot(edge.x, best(edge.x), "--", color="#d1495b", linewidth=1.3)
            title += f"   {best.name}, R² {best.r2:.5f}"
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    if len(shown) < len(found):
        figure.suptitle(f"the {len(shown)} of {len(found)} edges that vary most", fontsize=9)
    return figure


def _hidden(layer: int, node: int) -> str:
    return f"h{layer},{node + 1}"
