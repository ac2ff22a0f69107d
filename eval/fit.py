"""`bestiary fit`: a KAN for a table of numbers, its formula, or a differential equation."""

import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from bestiary.eval import kan_picture
from bestiary.eval.fit_equation import solve
from bestiary.eval.fit_folder import once, save_params
from bestiary.eval.fit_options import Fit, report
from bestiary.eval.kan_attribution import num_edges, penalty, prune
from bestiary.eval.kan_formula import Sum, formulas
from bestiary.eval.kan_symbolic import SIMPLICITY, Edge, fit_edges, ranked, symbolic, tables
from bestiary.layers.base import Array, Param, Tree
from bestiary.layers.kan_net import KANNet, refine_grids
from bestiary.train import fit as training
from bestiary.train.equations import EquationName
from bestiary.train.files import put_figure
from bestiary.train.fit import Network, Scaling
from bestiary.train.minimise import minimise
from bestiary.train.samples import Samples, example, read

SHOWN = 2000  # rows that edges are scored and shown on
SIMPLICITIES = (SIMPLICITY, 0.5, 0.2, 0.0)  # of formulas, until one is close enough


def run(options: Fit) -> int:
    """Fits, or says what a finished fit found. Raises ValueError for what cannot be done."""
    if options.source in get_args(EquationName):
        return solve(options)
    samples = example() if options.source == "example" else read(options.source, options.target)
    out = Path(options.out or f"runs/fit_{Path(options.source).stem}")
    widths = options.widths(len(samples.names))
    net = options.build(widths)
    data = {"rows": len(samples.y), "crc32": zlib.crc32(samples.x.tobytes() + samples.y.tobytes())}
    settings = {k: v for k, v in asdict(options).items() if k != "out"} | {"data": data}
    report(out, once(out, settings, "fit", Regression(options, out, samples, net).run))
    return 0


class Regression:
    """One run: the network and its parameters change from stage to stage."""

    def __init__(self, options: Fit, out: Path, samples: Samples, net: Network):
        train, test = training.divide(samples, options.test_fraction, options.seed)
        self.options, self.out, self.samples, self.net = options, out, samples, net
        self.scaling = Scaling.of(train)
        self.train = self.scaling.apply(train)
        self.test = self.scaling.apply(test) if len(test.y) else None
        self.params: Tree = None  # until it runs
        self.step = 0
        self.curve: list[tuple[int, float, float | None]] = []
        self.stages: dict[int, str] = {}  # first step -> what begins

    def run(self) -> dict[str, Any]:
        options, result = self.options, dict[str, Any]()
        net, started = self.net, time.monotonic()
        self.params = jax.jit(net.init)(jax.random.key(options.seed))
        print(
            f"{len(self.train[1])} rows to train on, {len(self.samples.y) - len(self.train[1])} to "
            f"test on; {training.num_trained(net)} parameters"
        )
        self.stage(self.name(), options.penalty_weight)
        states: dict[str, tuple[KANNet, Tree]] = {}
        if isinstance(net, KANNet):
            states["trained"] = (net, self.params)
            if options.prune:
                before = num_edges(self.params)
                self.params = prune(net, self.params, self.train[0][:SHOWN])
                left = num_edges(self.params)
                print(f"pruned: {left} of {before} edges are left")
                if left == 0:
                    raise ValueError("prune: no edge is left; need a smaller --regularize")
                result["edges"] = f"{left} of {before}"
                if left < before or options.penalty_weight:
                    self.stage(f"{self.name()}, pruned", 0.0)
            if options.basis == "spline":
                for n in options.grids[1:]:
                    self.net, self.params = refine_grids(self.net, self.params, n)  # type: ignore[arg-type]
                    self.stage(self.name(), 0.0)
        result |= {"parameters": training.num_trained(self.net), **self.errors()}
        if isinstance(self.net, KANNet):
            if options.prune:
                states["pruned"] = (self.net, self.params)
            else:
                states = {"trained": (self.net, self.params)}
            result |= self.explain(states)
        save_params(self.out, self.params)
        self.draw_curves()
        result["seconds"] = round(time.monotonic() - started)
        return result

    def name(self) -> str:
        if not isinstance(self.net, KANNet):
            return "perceptron"
        size = self.net.basis.size
        return f"{size - 3} intervals" if self.options.basis == "spline" else f"{size} functions"

    def stage(self, name: str, factor: float) -> None:
        options, first = self.options, self.step
        self.stages[first] = name
        steps = options.steps or (1000 if options.optimizer == "lbfgs" else 3000)

        def watch(step: int, params: Tree) -> None:
            self.step, self.params = first + step, params
            errors = self.errors()
            self.curve.append((self.step, errors["rmse_train"], errors.get("rmse_test")))
            if step == steps or 4 * step // steps > 4 * (step - max(5, steps // 40)) // steps:
                said = "  ".join(f"{k.replace('_', ' ')} {v:.3e}" for k, v in errors.items())
                print(f"{name:22} step {self.step:5}  {said}", flush=True)

        training.stage(
            self.net,
            self.params,
            self.train,
            steps=steps,
            method=options.optimizer,
            learning_rate=options.learning_rate,
            watch=watch,
            penalty=penalty if factor else None,
            factor=factor,
        )

    def errors(self) -> dict[str, float]:
        """In the units of the target."""
        parts = {"rmse_train": self.train, "rmse_test": self.test}
        return {
            name: self.scaling.std * float(training.rmse(self.net, self.params, data))
            for name, data in parts.items()
            if data is not None
        }

    def explain(self, states: dict[str, tuple[KANNet, Tree]]) -> dict[str, Any]:
        """Pictures of the network and its edges, and with --symbolic its formula."""
        net, params = list(states.values())[-1]
        x, names = self.train[0][:SHOWN], self.samples.names
        outputs, found = (self.samples.target,), dict[str, Any]()
        if self.options.symbolic:
            edges = fit_edges(net, params, x, (*self.options.functions.split(","), "0"))
            found, edges = self.formula(net, params, edges)
        else:
            edges = list(tables(net, params, x))
        figure = kan_picture.graph(states, x, names, outputs)
        put_figure(self.out / "graph.png", figure)
        figure = kan_picture.edge_curves(edges, names, outputs, len(net.layers) - 1)
        put_figure(self.out / "edges.png", figure)
        return found

    def formula(
        self, net: KANNet, params: Tree, edges: list[Edge]
    ) -> tuple[dict[str, Any], list[Edge]]:
        """The simplest functions that err little more than the network, else those that err least;
        and the edges, those first among their fits."""
        enough = max(2 * self.errors()["rmse_train"], 0.01 * self.scaling.std)
        choices = [ranked(edges, simplicity) for simplicity in SIMPLICITIES]
        tried = []
        # orders with the same functions in front are one formula
        for chosen in {tuple(edge.fits[0] for edge in c): c for c in choices}.values():
            tried.append((self.written(net, params, chosen), chosen))
            if tried[-1][0]["rmse_formula"] <= enough:
                break
        return min(tried, key=lambda found: np.nan_to_num(found[0]["rmse_formula"], nan=np.inf))

    def written(self, net: KANNet, params: Tree, edges: list[Edge]) -> dict[str, Any]:
        """Named functions on all edges, their coefficients trained on, and the whole as text."""
        named, coefficients = symbolic(net, params, edges)

        def loss(coefficients: Any, data: Any) -> Array:
            x, y, params = data
            return ((named.apply(coefficients, x, params)[:, 0] - y) ** 2).mean()

        before = float(loss(coefficients, (*self.train, params)))
        declared = jax.tree.map(lambda c: Param(c.shape, (None,) * c.ndim), coefficients)
        best = coefficients
        for _, tuned, value in minimise(
            loss, declared, coefficients, (*self.train, params), steps=60, chunk=20
        ):
            if np.isfinite(float(value)):
                best = tuned
        after = float(loss(best, (*self.train, params)))
        coefficients = best if after < before else coefficients
        s = self.scaling
        columns = zip(self.samples.names, self.samples.x.T, s.middle, s.radius, strict=True)
        inputs = [Sum(-m / r, {name: (1 / r, x)}) for name, x, m, r in columns]
        ((text, values),) = formulas(named, coefficients, inputs, (s.mean, s.std))
        error = float(np.sqrt(np.mean(np.square(values - self.samples.y))))
        return {"formula": f"{self.samples.target} = {text}", "rmse_formula": error}

    def draw_curves(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axis = figure.subplots()
        steps, train, test = zip(*self.curve, strict=True)
        axis.plot(steps, train, label="training rows", linewidth=1.4)
        if self.test is not None:
            axis.plot(steps, test, label="test rows", linewidth=1.4)
        for first, name in self.stages.items():
            axis.axvline(first, color="grey", linewidth=0.8, alpha=0.6)
            axis.text(first, 1.01, f" {name}", transform=axis.get_xaxis_transform(), fontsize=8)
        axis.set(yscale="log", xlabel="step", ylabel=f"RMSE of {self.samples.target}")
        axis.grid(alpha=0.3)
        axis.legend()
        put_figure(self.out / "curves.png", figure)
