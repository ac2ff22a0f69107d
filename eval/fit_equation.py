"""`bestiary fit poisson` and `bestiary fit burgers`: an equation solved by a network."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.eval import kan_picture
from bestiary.eval.fit_folder import once, save_params
from bestiary.eval.fit_options import Fit, report
from bestiary.eval.kan_symbolic import tables
from bestiary.layers.activations import Tanh
from bestiary.layers.base import Array, Tree
from bestiary.layers.kan_net import KANNet
from bestiary.layers.kan_spline import BSpline
from bestiary.train import fit as training
from bestiary.train.equations import EQUATIONS, Burgers, Equation
from bestiary.train.files import put_figure
from bestiary.train.fit import Network, Widths
from bestiary.train.minimise import minimise

POINTS, CANDIDATES = 2000, 8000  # of the residual, and those that they are drawn from
ROUNDS = 10  # of training, each on new points
GRID = 101  # points along either axis of the pictures
LAYERS = {"poisson": "2,5,1", "burgers": "2,8,8,1"}
STEPS = {"lbfgs": 1500, "adam": 3000}


def solve(options: Fit) -> int:
    """Raises ValueError for options that an equation has no use for."""
    if len(options.grids) > 1 and options.intervals is not None:
        raise ValueError(f"intervals: {options.intervals!r}; need one number for an equation")
    for name in ("prune", "symbolic", "functions", "target", "regularize", "test_fraction"):
        if getattr(options, name) != getattr(Fit, name):
            shown = name.replace("_", "-")
            raise ValueError(f"{shown}: not for {options.source}; only for tables")
    equation: Equation = EQUATIONS[options.source]()  # type: ignore[index]
    if options.viscosity is not None:
        equation = Burgers(options.viscosity)
    widths = options.widths(2, LAYERS[options.source])
    if options.network == "mlp":
        net: Network = training.mlp(widths, Tanh())
    else:
        net = smooth_kan(options, widths)
    out = Path(options.out or f"runs/fit_{options.source}")
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    report(out, once(out, settings, "solution", lambda: _run(options, equation, net, out)))
    return 0


def smooth_kan(options: Fit, widths: Widths) -> KANNet:
    """Splines here take the tanh of their inputs, so that they and their derivatives reach
    everywhere and no knots need to move."""
    n = 8 if options.intervals is None else options.grids[0]
    net = training.kan(widths, options.basis, n)
    if options.basis == "spline":
        net = replace(net, basis=BSpline(num_intervals=n, outside="normalise", unroll=False))
    return net


def _run(options: Fit, equation: Equation, net: Network, out: Path) -> dict[str, Any]:
    started, rng = time.monotonic(), np.random.default_rng(options.seed)
    middle = (np.array(equation.low) + equation.high) / 2
    radius = (np.array(equation.high) - equation.low) / 2

    def solution(params: Tree) -> Any:
        return equation.given(lambda points: net.apply(params, (points - middle) / radius)[..., 0])

    def loss(params: Tree, points: Array) -> Array:
        return (equation.residual(solution(params), points) ** 2).mean()

    @jax.jit
    def misses(params: Tree, points: Array) -> Array:
        return jnp.abs(equation.residual(solution(params), points))

    def redraw(params: Tree) -> Array:
        """Points in proportion to 1 + |residual| / its mean (Wu et al. 2023, arXiv 2207.10289)."""
        points = jnp.asarray(equation.inside(rng, CANDIDATES), jnp.float32)
        miss = np.float64(misses(params, points))
        share = 1 + miss / miss.mean()
        return points[rng.choice(CANDIDATES, POINTS, replace=False, p=share / share.sum())]

    points = jnp.asarray(equation.inside(rng, POINTS), jnp.float32)
    axes = [
        np.linspace(low, high, GRID) for low, high in zip(equation.low, equation.high, strict=True)
    ]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    exact = equation.exact(grid)
    on_grid = jax.jit(lambda params: solution(params)(jnp.asarray(grid, jnp.float32)))

    def error(params: Tree) -> float:
        """Relative L2."""
        return float(np.linalg.norm(on_grid(params) - exact) / np.linalg.norm(exact))

    params = jax.jit(net.init)(jax.random.key(options.seed))
    steps = options.steps or STEPS[options.optimizer]
    print(f"{training.num_trained(net)} parameters, {POINTS} points")
    x = (points - middle) / radius
    curve, start = [], params
    for step, params, value in minimise(
        loss,
        net.declare(),
        start,
        points,
        steps=steps,
        method=options.optimizer,
        learning_rate=options.learning_rate,
        chunk=-(-steps // ROUNDS),
        redraw=redraw,
    ):
        curve.append((step, float(value), error(params)))
        print(f"step {step:5}  loss {value:.3e}  relative error {curve[-1][2]:.3e}", flush=True)
    save_params(out, params)
    found = np.asarray(on_grid(params), np.float64)
    _draw(out, equation, found, exact, curve)
    if isinstance(net, KANNet):
        figure = kan_picture.graph({"trained": (net, params)}, x, equation.names, ("u",))
        put_figure(out / "graph.png", figure)
        figure = kan_picture.edge_curves(
            list(tables(net, params, x)), equation.names, ("u",), len(net.layers) - 1
        )
        put_figure(out / "edges.png", figure)
    return {
        "parameters": training.num_trained(net),
        "loss": curve[-1][1],
        "relative_L2_error": curve[-1][2],
        "largest_error": float(np.abs(found - exact).max()),
        "seconds": round(time.monotonic() - started),
    }


def _draw(
    out: Path,
    equation: Equation,
    found: np.ndarray,
    exact: np.ndarray,
    curve: list[tuple[int, float, float]],
) -> None:
    """solution.png: the solution, its error, and how both came down."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    horizontal = 1 if equation.names[1] == "t" else 0  # time runs to the right
    ends = [(low, high) for low, high in zip(equation.low, equation.high, strict=True)]
    extent = (*ends[horizontal], *ends[1 - horizontal])
    top = float(np.abs(exact).max())
    panels = {"solution u": (found, "RdBu_r", -top, top)}
    panels["u - exact solution"] = (
        found - exact,
        "PuOr_r",
        *(lambda e: (-e, e))(np.abs(found - exact).max()),
    )
    for axis, (title, (values, colours, low, high)) in zip(axes, panels.items(), strict=False):
        square = values.reshape(GRID, GRID)
        shown = square if horizontal == 1 else square.T
        image = axis.imshow(
            shown, origin="lower", extent=extent, aspect="auto", cmap=colours, vmin=low, vmax=high
        )
        axis.set(
            title=title, xlabel=equation.names[horizontal], ylabel=equation.names[1 - horizontal]
        )
        figure.colorbar(image, ax=axis)
    steps, losses, errors = zip(*curve, strict=True)
    axes[2].plot(steps, losses, label="loss")
    axes[2].plot(steps, errors, label="relative L2 error")
    axes[2].set(yscale="log", xlabel="step", title="training")
    axes[2].grid(alpha=0.3)
    axes[2].legend()
    put_figure(out / "solution.png", figure)
