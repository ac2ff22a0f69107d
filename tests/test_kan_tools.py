"""What is done with a trained KAN: attribution, penalty, pruning, named functions, formulas."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw

from bestiary.eval.kan_attribution import attribute, edge_scores, num_edges, penalty, prune
from bestiary.eval.kan_formula import Sum, formulas
from bestiary.eval.kan_picture import edge_curves, graph
from bestiary.eval.kan_symbolic import (
    FUNCTIONS,
    Edge,
    fit,
    fit_edges,
    ranked,
    suggest,
    symbolic,
    tables,
)
from bestiary.layers.kan import edges
from bestiary.layers.kan_bases import RBF
from bestiary.layers.kan_net import KANNet
from bestiary.layers.kan_spline import BSpline

NET = KANNet(dims=(2, 3, 1), basis=BSpline(), base=None, mask=True)
LINE = jnp.linspace(-1, 1, 100)
X = jnp.stack([LINE, LINE[::-1] ** 2], -1)  # no two inputs alike


def linear(net: KANNet, slopes: list[np.ndarray]) -> dict:
    """Parameters whose edges are slope * x inside of the grid: the coefficients of a spline that is
    the identity are the means of its inner knots (Greville 1967). Slopes are [inputs, outputs]."""
    basis = net.basis
    knots = np.asarray(basis.knots())
    k = basis.order
    places = np.array([knots[j + 1 : j + k + 1].mean() for j in range(basis.size)])
    params = net.init(jax.random.key(0))
    for i, slope in enumerate(slopes):
        weight = jnp.asarray(places[:, None, None] * slope, jnp.float32)
        params[str(i)] = params[str(i)] | {"weight": weight}
    return params


FIRST = np.array([[0.5, 0.2, 0.0], [0.0, 0.1, 0.4]])
SECOND = np.array([[0.5], [0.3], [0.0]])


def test_scores_of_linear_edges_are_their_slopes():
    params = linear(NET, [FIRST, SECOND])
    x = np.asarray(X)
    close(NET.apply(params, X), x @ FIRST @ SECOND)
    spread, hidden = x.std(0), x @ FIRST
    expected = FIRST.T * spread / (spread + 0.1)
    np.testing.assert_allclose(edge_scores(NET, params, X)[0], expected, atol=1e-5)

    # backwards: the output shares itself by the spread of its edges, and so do the hidden nodes
    share = np.abs(SECOND[:, 0]) * hidden.std(0) / (hidden @ SECOND).std()
    first = FIRST.T * spread * (share / (hidden.std(0) + 1e-4))[:, None]
    scores = attribute(NET, params, X)
    np.testing.assert_allclose(scores.edges[1][0], share, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(scores.nodes[1], share, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(scores.edges[0], first, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(scores.nodes[0], first.sum(0), rtol=1e-3)


def test_a_product_hands_its_score_to_both_factors():
    net = replace(NET, dims=(2, (0, 1), 1))
    params = linear(net, [np.array([[1.0, 0.5], [0.2, 1.0]]), np.array([[1.0]])])
    scores = attribute(net, params, X)
    curves = np.asarray(edges(net.layers[0], params["0"], X))
    expected = curves.std(0) / curves.sum(-1).std(0)[:, None]
    np.testing.assert_allclose(scores.edges[0], expected, rtol=1e-3)


def test_penalty_is_the_papers_and_has_gradients_at_masked_edges():
    params = linear(NET, [FIRST, SECOND])
    expected = 0.0
    for v in edge_scores(NET, params, X):
        v = np.asarray(v, np.float64)
        rows, columns = v / (v.sum(1, keepdims=True) + 1), v / (v.sum(0, keepdims=True) + 1)
        by_row = -(rows * np.log2(rows + 1e-4)).sum(1).mean()
        by_column = -(columns * np.log2(columns + 1e-4)).sum(0).mean()
        expected += v.sum() + 2 * (by_row + by_column)
    close(penalty(NET, params, X), expected)

    weight = [np.asarray(params[i]["weight"]) for i in "01"]
    l1 = sum(np.abs(w).mean(0).sum() for w in weight)
    differences = sum(np.abs(np.diff(w, axis=0)).mean(0).sum() for w in weight)
    more = penalty(NET, params, X, lambda_coefficients=3.0, lambda_differences=5.0)
    close(more, expected + 3 * l1 + 5 * differences)

    params["0"]["mask"] = params["0"]["mask"].at[0].set(0)
    grads = jax.grad(lambda p: penalty(NET, p, X))(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert (grads["0"]["weight"][:, 1, 2] != 0).any()


def test_pruned_is_the_network_without_those_edges():
    params = linear(NET, [FIRST, SECOND])
    params["1"]["weight"] = params["1"]["weight"].at[:, 2].add(1e-4)  # hardly used: node 2 goes
    pruned = prune(NET, params, X)
    np.testing.assert_array_equal(pruned["0"]["mask"], [[1, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(pruned["1"]["mask"], [[1], [1], [0]])
    assert num_edges(pruned) == 5
    zeroed = {i: params[i] | {"weight": params[i]["weight"] * pruned[i]["mask"]} for i in "01"}
    close(NET.apply(pruned, X), NET.apply(zeroed, X))
    with pytest.raises(ValueError, match="mask: False; need True"):
        prune(replace(NET, mask=False), params, X)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "0"])
def test_a_function_is_found_again(name: str):
    x = np.linspace(0.3, 1.7, 150)
    y = 1.5 * FUNCTIONS[name].of(np, 1.3 * x + 0.2) - 0.7
    found = fit(x, y, name)
    assert found.r2 > 0.999999
    np.testing.assert_allclose(found(x), y, atol=2e-3 * np.ptp(y))


@pytest.mark.parametrize(
    "name, f",
    [
        ("x", lambda x: 2 * x - 1),
        ("sin", lambda x: np.sin(np.pi * x)),
        ("x**2", lambda x: 3 * (x - 0.5) ** 2),
        ("exp", lambda x: np.exp(2 * x)),
        ("tanh", lambda x: np.tanh(4 * x)),
        ("0", lambda x: 0 * x + 3),
    ],
)
def test_the_simplest_close_function_comes_first(name: str, f):
    x = np.linspace(-1, 1, 120)
    best = suggest(x, f(x))[0]
    assert best.name == name
    np.testing.assert_allclose(best(x), f(x), atol=1e-3)


def test_ranks_between_simplicity_and_closeness():
    """No function is close to this one: the simplest is 0, the closest what explains most of it."""
    x = np.linspace(-1, 1, 120)
    y = np.sin(3 * x) + np.abs(x - 0.3)
    edge = Edge(0, 0, 0, x, y, suggest(x, y))
    (simple,), (close_by,) = ranked([edge], 1.0), ranked([edge], 0.0)
    assert simple.fits[0].name == "0"
    left = [np.square(f(x) - edge.y).mean() for f in edge.fits]
    np.testing.assert_allclose(np.square(close_by.fits[0](x) - edge.y).mean(), min(left))
    assert min(left) < 0.5 * np.square(simple.fits[0](x) - edge.y).mean()


def read(text: str, **values: np.ndarray) -> np.ndarray:
    """A formula as Python reads it."""
    names = {n: getattr(np, n) for n in ("sin", "exp", "log", "sqrt", "abs", "tanh", "arctan")}
    return eval(text, {"__builtins__": {}}, names | values)


def test_formula_of_a_network_of_named_functions():
    """Edges sin(pi x), y^2 and exp, put in by hand, and read back as one line."""
    net = KANNet(dims=(2, 1, 1), basis=BSpline(), mask=True, bias=True)
    params = net.init(jax.random.key(0))
    x = np.random.default_rng(0).uniform(-1, 1, (80, 2))
    found = fit_edges(net, params, jnp.asarray(x, jnp.float32), ("x",))
    named, coefficients = symbolic(net, params, found)
    named = named._replace(edges=(((0, 0, "sin"), (0, 1, "x**2")), ((0, 0, "exp"),)))
    coefficients[0]["edges"] = jnp.array([[-2.0, -np.pi, 2 * np.pi, 0.5], [0.5, 2.0, 0.0, -1.0]])
    coefficients[1]["edges"] = jnp.array([[3.0, 0.5, 0.25, 0.0]])
    coefficients = [c | {"bias": jnp.zeros(1)} for c in coefficients]
    inputs = [Sum(0.0, {"u": (1.0, x[:, 0])}), Sum(0.0, {"v": (1.0, x[:, 1])})]
    ((text, values),) = formulas(named, coefficients, inputs)
    assert text == "3*exp(sin(3.142*u) + v**2)"
    np.testing.assert_allclose(values, read(text, u=x[:, 0], v=x[:, 1]), rtol=1e-9)
    expected = 3 * np.exp(np.sin(np.pi * x[:, 0]) + x[:, 1] ** 2)
    np.testing.assert_allclose(values, expected, rtol=2e-3)
    close(named.apply(coefficients, jnp.asarray(x, jnp.float32), params)[:, 0], expected, 1e-5)


def test_formula_of_a_product():
    net = KANNet(dims=(2, (0, 1), 1), basis=BSpline(), mask=True)
    params = net.init(jax.random.key(0))
    x = np.random.default_rng(0).uniform(-1, 1, (80, 2))
    found = fit_edges(net, params, jnp.asarray(x, jnp.float32), ("x",))
    named, coefficients = symbolic(net, params, found)
    named = named._replace(edges=(((0, 0, "x"), (1, 1, "sin")), ((0, 0, "x"),)))
    coefficients[0]["edges"] = jnp.array([[2.0, 1.0, 0.5, 0.0], [1.0, 3.0, 0.0, 0.0]])
    coefficients[1]["edges"] = jnp.array([[1.0, 1.0, 0.0, 0.25]])
    coefficients = [c | {"bias": jnp.zeros(len(c["bias"]))} for c in coefficients]
    inputs = [Sum(0.0, {"u": (1.0, x[:, 0])}), Sum(0.0, {"v": (1.0, x[:, 1])})]
    ((text, values),) = formulas(named, coefficients, inputs)
    expected = (2 * x[:, 0] + 1) * np.sin(3 * x[:, 1]) + 0.25
    np.testing.assert_allclose(read(text, u=x[:, 0], v=x[:, 1]), expected, atol=1e-6)
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_tables_sum_to_the_network_and_pictures_have_their_edges():
    params = draw(NET)
    params["0"]["mask"] = jnp.ones((2, 3)).at[0, 1].set(0)
    params["1"]["mask"] = jnp.ones((3, 1))
    found = list(tables(NET, params, X))
    assert [(e.layer, e.output, e.input) for e in found if e.layer == 0 and e.output == 1] == [
        (0, 1, 1)
    ]
    assert len(found) == num_edges(params) == 8
    own = [e for e in found if e.layer == 0 and e.output == 0]
    at = jnp.stack([jnp.asarray(e.x, jnp.float32) for e in own], -1)
    close(sum(e.y for e in own), NET.layers[0].apply(params["0"], at)[:, 0])

    figure = graph({"before": (NET, params), "after": (NET, params)}, X, ("x", "y"), ("z",))
    assert [len(axis.patches) for axis in figure.axes] == [8, 8]
    assert {"x", "y", "z"} <= {text.get_text() for text in figure.axes[0].texts}
    panels = edge_curves(found, ("x", "y"), ("z",), 1)
    assert sum(bool(axis.lines) for axis in panels.axes) == 8

    mixing = replace(NET, basis=RBF(norm=True))
    with pytest.raises(ValueError, match="norm: True; need False"):
        list(tables(mixing, mixing.init(jax.random.key(0)), X))
