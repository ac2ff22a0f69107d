"""`bestiary fit`: tables, L-BFGS and Adam, folders, equations."""

import json
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.__main__ import main
from bestiary.eval.fit_folder import load_params
from bestiary.layers.base import Param
from bestiary.layers.kan_spline import BSpline
from bestiary.layers.kan_wavelets import Kind
from bestiary.train import fit as training
from bestiary.train.equations import Burgers, Poisson
from bestiary.train.minimise import minimise
from bestiary.train.samples import example, read


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


ROWS = "".join(f"{i / 10},{i % 3},{i * i}\n" for i in range(12))


def test_tables_are_read(tmp_path: Path):
    named = read(write(tmp_path / "a.csv", "time, kind ,dist\n" + ROWS))
    assert (named.names, named.target) == (("time", "kind"), "dist")
    np.testing.assert_allclose(named.x[:, 0], np.arange(12) / 10)
    np.testing.assert_allclose(named.y, np.arange(12) ** 2)

    other = read(write(tmp_path / "b.csv", "time,kind,dist\n" + ROWS), target="time")
    assert other.names == ("kind", "dist")
    np.testing.assert_allclose(other.y, np.arange(12) / 10)

    bare = read(write(tmp_path / "c.csv", "\n" + ROWS.replace(",", ";")), target="1")
    assert (bare.names, bare.target) == (("x2", "y"), "x1")

    np.savez(tmp_path / "d.npz", x=np.arange(12.0), y=np.arange(12.0)[:, None] ** 2)
    arrays = read(str(tmp_path / "d.npz"))
    assert arrays.x.shape == (12, 1) and arrays.y.shape == (12,)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x,y,z\n" + ROWS + "1,2\n", "line 14: 2 columns; need 3"),
        ("x,y,z\n" + ROWS + "1,abc,3\n", "line 14, column y: 'abc'; need a finite number"),
        (ROWS + "1,,3\n", "line 13, column x2: ''; need a finite number"),
        (ROWS + "1,nan,3\n", "line 13, column x2: 'nan'; need a finite number"),
        ("x,x,z\n" + ROWS, "line 1, column 2: 'x'; need a name for each column, and each once"),
        ("1\n2\n3\n", "line 1: one column; need inputs and a target"),
        ("x,y,z\n1,2,3\n", "1 rows of numbers; need at least 10"),
        ("", "0 rows of numbers; need at least 10"),
        ("x,y\n" + "1,2\n3,2\n" * 6, "column y: 2.0 in all rows"),
        ("x,y\n" + "1,2\n1,3\n" * 6, "column x: 1.0 in all rows; leave it out"),
    ],
)
def test_malformed_tables_are_refused_at_their_place(tmp_path: Path, text, message, capsys):
    file = write(tmp_path / "bad.csv", text)
    assert main(["fit", file, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "bad.csv" in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere.csv"], "no such file"),
        (["example", "--layers", "3,5,1"], "layers: 3,5,1; need 2 inputs first and 1 output last"),
        (["example", "--layers", "2,a,1"], "layers: 'a'; need whole numbers from 0"),
        (["example", "--intervals", "3,0"], "intervals: '3,0'; need whole numbers from 1"),
        (["example", "--test-fraction", "1"], "test-fraction: 1.0; need 0 or more, below 1"),
        (["example", "--network", "mlp", "--prune"], "network: mlp; need kan"),
        (["example", "--functions", "sin,cosh"], "functions: 'cosh'; need some of"),
        (["example", "--intervals", "5,3"], "intervals: '5,3'; need each larger than the one"),
        (["example", "--test-fraction", "0.9999"], "leaves 0 rows to train on; need at least 2"),
        (["example", "--learning-rate", "0"], "learning-rate: 0.0; need more than 0"),
        (["example", "--regularize", "nan"], "regularize: nan; need 0 or more"),
        (["example", "--seed", "-1"], "seed: -1; need 0 or more"),
        (["example", "--viscosity", "1"], "viscosity: 1.0; only burgers has one"),
        (["poisson", "--prune"], "prune: not for poisson"),
        (["poisson", "--test-fraction", "0.5"], "test-fraction: not for poisson"),
        (["poisson", "--viscosity", "1"], "viscosity: 1.0; only burgers has one"),
        (["burgers", "--viscosity", "0"], "viscosity: 0.0; need more than 0"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, flags, message, capsys):
    assert main(["fit", *flags, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_target_must_be_a_column(tmp_path: Path):
    file = write(tmp_path / "a.csv", "u,v\n" + "1,2\n2,3\n" * 6)
    with pytest.raises(ValueError, match="target: 'w'; need one of u, v, or 1 to 2"):
        read(file, "w")


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_minimise_finds_the_least_squares_solution(method):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 4)), rng.normal(size=30)
    declared = {"w": Param((4,), (None,)), "fixed": Param((), (), trainable=False)}
    params = {"w": jnp.zeros(4), "fixed": jnp.float32(0.5)}

    def loss(params, data):
        a, b = data
        return jnp.square(a @ params["w"] + params["fixed"] - b).mean()

    data = (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    options = {"steps": 20, "chunk": 8} if method == "lbfgs" else {"steps": 400, "chunk": 150}
    found = list(
        minimise(loss, declared, params, data, method=method, learning_rate=0.1, **options)
    )
    assert [step for step, _, _ in found] == [8, 16, 20] if method == "lbfgs" else [150, 300, 400]
    last = found[-1][1]
    expected = np.linalg.lstsq(a, b - 0.5, rcond=None)[0]
    np.testing.assert_allclose(last["w"], expected, atol=2e-3)
    assert last["fixed"] == 0.5


def test_widths_and_parameters():
    net = training.kan((2, 5, 1), "spline", 5)
    assert training.num_trained(net) == 15 * (8 + 1) + 6  # coefficients and base of edges, biases
    products = training.kan((2, (1, 2), 1), "rbf", 3)
    assert products.layers[0].outputs == 5 and products.layers[1].inputs == 3
    names = get_args(training.BasisName)
    sizes = {name: training.basis(name, 5).size for name in names}
    assert len(names) == 16 and set(sizes.values()) == {1, 8}
    assert {name for name, n in sizes.items() if n == 1} == {"rational", *get_args(Kind)}
    rolled, z = BSpline(unroll=False), np.linspace(-1.5, 1.5, 61, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(rolled.expand({}, z), BSpline().expand({}, z))
    train, test = training.divide(example(50), 0.2, seed=1)
    assert len(train.y) == 40 and len(test.y) == 10


def test_equations_are_solved_by_their_solutions():
    """Independent of the formulas in the code: the residual of the exact solution is 0 by finite
    differences, and Poisson's by derivatives too."""
    rng, h = np.random.default_rng(0), 1e-4
    burgers = Burgers(viscosity=0.1)
    at = burgers.inside(rng, 20) * 0.9 + [0, 0.05]

    def moved(axis: int, by: float) -> np.ndarray:
        return burgers.exact(at + by * np.eye(2)[axis])

    u, u_x = burgers.exact(at), (moved(0, h) - moved(0, -h)) / (2 * h)
    u_t = (moved(1, h) - moved(1, -h)) / (2 * h)
    u_xx = (moved(0, 1e-3) - 2 * u + moved(0, -1e-3)) / 1e-6
    np.testing.assert_allclose(u_t + u * u_x, 0.1 * u_xx, atol=1e-4)
    poisson = Poisson()
    for equation in (burgers, Burgers(), poisson):  # at the edge the network does not matter
        edge = equation.inside(rng, 40)
        edge[:20, 0] = np.sign(edge[:20, 0])
        edge[20:, 1] = 0 if isinstance(equation, Burgers) else np.sign(edge[20:, 1])
        u = equation.given(lambda p: jnp.cos(p).sum(-1) + 3)(jnp.asarray(edge, jnp.float32))
        np.testing.assert_allclose(u, equation.exact(edge), atol=1e-5)

    points = jnp.asarray(poisson.inside(rng, 20), jnp.float32)

    def exact(p):
        return jnp.sin(jnp.pi * p[:, 0]) * jnp.sin(jnp.pi * p[:, 1])

    np.testing.assert_allclose(poisson.residual(exact, points), 0, atol=1e-4)
    # u = t x has u_t = x, u u_x = t^2 x and no curvature
    residual = burgers.residual(lambda p: p[:, 0] * p[:, 1], points)
    x, t = np.asarray(points).T
    np.testing.assert_allclose(residual, x + t**2 * x, atol=1e-6)


def test_a_formula_is_discovered_and_the_folder_is_kept(tmp_path: Path, capsys):
    x = np.linspace(-1, 1, 100)
    table = "".join(f"{a:.6f},{np.sin(np.pi * a):.6f}\n" for a in x)
    file, out = write(tmp_path / "sine.csv", "angle,height\n" + table), tmp_path / "out"
    command = ["fit", file, "--layers", "1,1", "--intervals", "5", "--steps", "40", "--prune"]
    command += ["--symbolic", "--regularize", "0", "--out", str(out)]
    assert main(command) == 0
    found = json.loads((out / "fit.json").read_text())["result"]
    name, _, text = found["formula"].partition(" = ")
    assert name == "height" and text.count("sin") == 1
    said = eval(text, {"__builtins__": {}}, {"sin": np.sin, "angle": x})
    np.testing.assert_allclose(said, np.sin(np.pi * x), atol=5e-3)
    assert found["rmse_formula"] < 2e-3 and found["rmse_test"] < 2e-2
    names = {"fit.json", "params.npz", "curves.png", "graph.png", "edges.png"}
    assert {file.name for file in out.iterdir()} == names
    assert load_params(out)["0"]["weight"].shape == (8, 1, 1)

    capsys.readouterr()
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert main(command) == 0  # again: nothing to do
    assert "holds this fit already" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 2
    assert "holds another fit (seed differ)" in capsys.readouterr().err
    assert before == {file: file.stat().st_mtime_ns for file in out.iterdir()}


def test_poisson_is_solved(tmp_path: Path, capsys):
    out = tmp_path / "out"
    flags = ["--network", "mlp", "--layers", "2,10,1", "--steps", "5", "--out", str(out)]
    assert main(["fit", "poisson", *flags]) == 0
    assert "relative L2 error" in capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"fit.json", "params.npz", "solution.png"}
