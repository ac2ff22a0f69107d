"""KANs beside recursions in float64, their grids, their edges, and what is refused."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw, here_and_on
from flax import nnx

from bestiary.layers import (
    Attention,
    Context,
    Embedding,
    Repeat,
    RMSNorm,
    shard,
)
from bestiary.layers.base import flatten
from bestiary.layers.flax import NnxLayer
from bestiary.layers.kan import KAN, edges
from bestiary.layers.kan_bases import RBF, RSWAF, Fourier, Rational, ReLUBasis, Sine
from bestiary.layers.kan_basis import Basis
from bestiary.layers.kan_conv import KANConv, KANPatches
from bestiary.layers.kan_grid import refine, update_grid
from bestiary.layers.kan_net import KANFFN, KANNet, refine_grids, update_grids
from bestiary.layers.kan_polynomials import Chebyshev, Gram, Jacobi, Legendre
from bestiary.layers.kan_spline import BSpline
from bestiary.layers.kan_wavelets import Wavelet
from bestiary.zoo.decoder import Block, Decoder

BASES: dict[str, Basis] = {
    "spline": BSpline(),
    "adaptive": BSpline(adaptive=True, order=2),
    "fine": BSpline(num_intervals=40),  # more functions than are traced one by one
    "rbf": RBF(),
    "rswaf": RSWAF(norm=False),
    "relu": ReLUBasis(),
    "fourier": Fourier(norm=True),
    "sine": Sine(),
    "rational": Rational(groups=2),
    "chebyshev": Chebyshev(degree=4),
    "legendre": Legendre(degree=4),
    "jacobi": Jacobi(degree=4, a=0.5, b=-0.3),
    "gram": Gram(),
    **{kind: Wavelet(kind=kind) for kind in ("mexican_hat", "meyer", "shannon")},
}
every_basis = pytest.mark.parametrize("name", BASES)


def layer(basis: Basis, **options: Any) -> KAN:
    return KAN(inputs=4, outputs=6, basis=basis, **options)


def samples(n: int = 24, inputs: int = 4, width: float = 1.0) -> jax.Array:
    x = np.random.default_rng(0).uniform(-width, width, (n, inputs))
    return jnp.asarray(x, jnp.float32)


# --- oracles in float64 ---------------------------------------------------------------------------


def recursion(z: Any, knots: Any, order: int, j: int) -> Any:
    if order == 0:
        return np.float64((knots[j] <= z) & (z < knots[j + 1]))
    left, right = (recursion(z, knots, order - 1, i) for i in (j, j + 1))
    up, down = knots[j + order] - knots[j], knots[j + order + 1] - knots[j + 1]
    a = (z - knots[j]) / up * left if up else 0
    b = (knots[j + order + 1] - z) / down * right if down else 0
    return a + b


@pytest.mark.parametrize(
    "order, adaptive",
    [(0, False), (1, False), (2, False), (3, False), (5, False), (0, True), (3, True)],
)
def test_splines_of_every_order(order: int, adaptive: bool) -> None:
    basis = BSpline(num_intervals=4, order=order, low=-0.5, high=2.0, adaptive=adaptive)
    params, knots = {}, np.float64(basis.knots())
    if adaptive:
        rng = np.random.default_rng(order)
        knots = np.sort(knots + rng.uniform(-0.2, 0.2, knots.shape))
        knots[order + 1] = knots[order + 2]  # one interval is empty
        knots = np.float64(np.float32(knots))
        params = {"knots": jnp.asarray(knots[:, None], jnp.float32)}
    x = np.float32(np.random.default_rng(1).uniform(knots[0] - 0.3, knots[-1] + 0.3, (50, 1)))
    actual = jax.jit(basis.expand)(params, x)[..., 0]
    for j in range(basis.size):
        np.testing.assert_allclose(
            actual[:, j], recursion(np.float64(x[:, 0]), knots, order, j), atol=2e-6
        )


@pytest.mark.parametrize("name", ["chebyshev", "legendre", "jacobi"])
def test_polynomials_are_orthogonal(name: str) -> None:
    """Under their weights, by Gauss' quadrature; and T_n = cos(n arccos u)."""
    basis = dataclasses.replace(BASES[name], outside="clamp")
    a, b = {"chebyshev": (-0.5, -0.5), "legendre": (0, 0), "jacobi": (0.5, -0.3)}[name]
    u = np.cos((np.arange(4000) + 0.5) * np.pi / 4000)  # Chebyshev's points
    weight = (1 - u) ** (a + 0.5) * (1 + u) ** (b + 0.5)
    values = np.float64(jax.jit(basis.expand)({}, jnp.float32(u)[:, None]))[..., 0]
    gram = np.einsum("nj,nk,n->jk", values, values, weight)
    off = gram - np.diag(np.diag(gram))
    assert np.abs(off).max() < 1e-4 * np.diag(gram).min()
    assert np.diag(gram).min() > 0
    if name == "chebyshev":
        n = np.arange(basis.size)
        np.testing.assert_allclose(values, np.cos(n * np.arccos(u)[:, None]), atol=1e-5)


def test_sines_are_standardised() -> None:
    basis = Sine(num=3)
    params = {"omega": jnp.asarray([0.5, 1.3, 3.0]), "phase": jnp.asarray([0.2, -1.0, 0.7])}
    z, w = np.polynomial.hermite_e.hermegauss(60)
    values = np.float64(basis.expand(params, jnp.asarray(z, jnp.float32)[:, None]))[..., 0]
    w = w / w.sum()
    np.testing.assert_allclose(w @ values, 0, atol=1e-5)
    np.testing.assert_allclose(w @ values**2, 1, atol=1e-4)


# --- all bases ------------------------------------------------------------------------------------


@every_basis
def test_edges_sum_to_the_layer(name: str) -> None:
    kan = layer(BASES[name], scale="uniform", mask=True, bias=True)
    params, x = draw_with_knots(kan), samples(6)

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        many = x.reshape(2, 3, 1, 4)
        by_vmap = jax.vmap(kan.apply, (None, 0))(params, many)
        return kan.apply(params, x), edges(kan, params, x), kan.apply(params, many), by_vmap

    y, each, many, by_vmap = run(params, x)
    assert each.shape == (6, 6, 4)
    close(each.sum(-1) + params["bias"], y, 1e-5)
    close(many.reshape(y.shape), y, 1e-5)
    close(by_vmap.reshape(y.shape), y, 1e-5)


def draw_with_knots(kan: Any) -> Any:
    """Parameters that leave no part without effect, and the knots as they start."""
    params, start = draw(kan), kan.init(jax.random.key(0))
    if "knots" in start["basis"]:
        params["basis"]["knots"] = start["basis"]["knots"]
    return params


@every_basis
def test_gradients_at_the_edge_and_outside_in_bfloat16(name: str) -> None:
    """Forward and reverse, once and twice, while knots stay float32."""
    kan = layer(BASES[name])
    params = kan.init(jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    x = jnp.asarray([-1e3, -2.2, -1.0, 0.0, 0.5, 1.0, 2.2, 1e3], jnp.bfloat16)
    x = jnp.broadcast_to(x[:, None], (8, 4)) * jnp.asarray([1, -1, 1, -1], jnp.bfloat16)

    def loss(params: Any, x: Any) -> Any:
        return kan.apply(params, x).astype(jnp.float32).sum()

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        grads, dx = jax.grad(loss, (0, 1))(params, x)
        forward = jax.jvp(lambda x: kan.apply(params, x), (x,), (jnp.ones_like(x),))
        return grads, dx, forward

    grads, dx, forward = run(params, x)
    assert dx.dtype == forward[0].dtype == jnp.bfloat16
    for leaf in jax.tree.leaves((grads, dx, forward)):
        assert np.isfinite(np.float32(leaf)).all()
    if not isinstance(kan.basis, Rational):  # of two terms that are large at 1000
        total, tangents = np.float32(dx), np.float32(forward[1])
        assert abs(total.sum() - tangents.sum()) < 0.05 * np.abs(total).sum()


@pytest.mark.parametrize(
    "outside, adaptive",
    [("zero", False), ("clamp", True), ("extrapolate", True), ("normalise", False)],
)
def test_what_becomes_of_inputs_outside(outside: Any, adaptive: bool) -> None:
    kan = layer(BSpline(outside=outside, adaptive=adaptive), base=None)
    plain = dataclasses.replace(kan, basis=dataclasses.replace(kan.basis, outside="zero"))
    params = draw_with_knots(kan)
    x = jnp.asarray([-9.0, -1.0, 0.3, 1.0, 9.0])[:, None] * jnp.ones(4)
    np.testing.assert_array_equal(kan.outside_grid(params, x)[:, 0], [1, 0, 0, 0, 1])

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        """Values and slopes, of this layer at x, and of the plain one at x and at tanh(x)."""

        def along(kan: KAN, x: Any) -> Any:
            return jax.jvp(lambda x: kan.apply(params, x), (x,), (jnp.ones_like(x),))

        return along(kan, x), along(plain, x), along(plain, jnp.tanh(x))

    (y, slope), (values, slopes), (squashed, _) = jax.tree.map(np.asarray, run(params, x))
    far, ends = [0, 4], [1, 3]
    if outside == "normalise":
        close(y, squashed, 1e-5)
        return
    close(y[1:4], values[1:4], 1e-5)
    if outside == "zero":
        assert not y[far].any()
    if outside == "clamp":
        close(y[far], values[ends], 1e-5)
        assert not slope[far].any()
    if outside == "extrapolate":
        close(y[far], values[ends] + slopes[ends] * [[-8], [8]], 1e-4)
        close(slope[far], slopes[ends], 1e-4)


def test_layers_and_seeds_differ() -> None:
    net = KANNet(dims=(4, 4, 4), basis=BSpline(), scale="uniform")
    first, second = net.init(jax.random.key(0)), net.init(jax.random.key(1))
    for name in ("weight", "base", "scale"):
        assert (first["0"][name] != first["1"][name]).any()
        assert (first["0"][name] != second["0"][name]).any()


def test_initial_curves() -> None:
    """At the knots, noise between the bounds that pykan and efficient-kan document."""
    kan = KAN(inputs=9, outputs=50, basis=BSpline(noise=0.5), scale="constant")
    params = kan.init(jax.random.key(0))
    knots = jnp.linspace(-1, 1, 6)[:, None] * jnp.ones(9)
    curves = kan.basis.edges(params["basis"], knots, params["weight"])
    assert 0.045 < np.abs(curves).max() < 0.0501
    assert curves.std() == pytest.approx(0.05 / 3**0.5, rel=0.1)
    assert 0.3 < np.abs(params["base"]).max() <= 1 / 3
    np.testing.assert_allclose(params["scale"], 1 / 3, rtol=1e-6)


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["pykan", "efficient"])
def test_moved_grids_keep_the_function_at_the_samples(rule: Any) -> None:
    """As nearly as any curve on the new grid can: the least-squares fit in float64."""
    kan = layer(BSpline(adaptive=True), scale="uniform", mask=True)
    params, x = draw_with_knots(kan), samples(300, width=0.7)
    new = jax.jit(lambda params, x: update_grid(kan, params, x, rule=rule))(params, x)
    knots = new["basis"]["knots"]
    margin = 0.01 if rule == "efficient" else 0.0
    np.testing.assert_allclose(knots[3], x.min(0) - margin * 0.02, atol=1e-5)
    np.testing.assert_allclose(knots[8], x.max(0) + margin * 0.02, atol=1e-5)
    assert not kan.outside_grid(new, x).mean() > 1e-2
    before, after = (np.float64(kan.basis.edges(p["basis"], x, p["weight"])) for p in (params, new))
    values = np.float64(kan.basis.expand(new["basis"], x))
    for i in range(4):
        a = values[..., i]
        best = a @ np.linalg.lstsq(a, before[..., i])[0]
        np.testing.assert_allclose(after[..., i], best, atol=2e-4 * np.abs(before).max())
    close(kan.apply(new, x), kan.apply(params, x), 0.2)


@pytest.mark.parametrize("adaptive", [False, True])
def test_refined_grids_keep_the_function(adaptive: bool) -> None:
    """On the whole interval where old knots are among the new; otherwise nearly."""
    kan = layer(BSpline(adaptive=adaptive, outside="extrapolate"), scale="constant")
    params = draw_with_knots(kan)
    if adaptive:
        params = update_grid(kan, params, samples(300, width=1.3))
    low, high = kan.basis.domain(params["basis"])
    x = low + (high - low) * jnp.linspace(0, 1, 201)[:, None] * jnp.ones(4)
    expected = jax.jit(kan.apply)(params, x)
    for n, rtol in ((10, 2e-5), (35, 5e-5), (12, 0.1)):
        finer, _ = jax.eval_shape(lambda params, n=n: refine(kan, params, n), params)
        new = jax.jit(lambda params, n=n: refine(kan, params, n)[1])(params)
        assert finer.basis.num_intervals == n
        assert jax.tree.structure(new) == jax.tree.structure(finer.abstract())
        shapes = jax.tree.map(lambda p: p.shape, finer.abstract())
        assert jax.tree.map(lambda p: p.shape, new) == shapes
        close(jax.jit(finer.apply)(new, x), expected, rtol)


# --- networks -------------------------------------------------------------------------------------


def test_multiplying_nodes() -> None:
    net = KANNet(dims=(2, (3, 2), 1), basis=BSpline(adaptive=True), arity=3, affine=True, bias=True)
    params, x = draw(net), samples(40, inputs=2)
    start = net.init(jax.random.key(0))
    for i in "01":
        params[i]["basis"] = start[i]["basis"]
    first, second = net.layers
    y = np.asarray(first.apply(params["0"], x))
    affine = jax.tree.map(np.asarray, params["affine_0"])
    y = y * affine["subnode_scale"] + affine["subnode_bias"]
    products = [y[:, 3] * y[:, 4] * y[:, 5], y[:, 6] * y[:, 7] * y[:, 8]]
    y = np.concatenate([y[:, :3], np.stack(products, 1)], 1)
    y = y * affine["node_scale"] + affine["node_bias"]
    inputs, hidden, out = net.trace(params, x)
    close(hidden, y, 1e-5)
    affine = jax.tree.map(np.asarray, params["affine_1"])
    y = np.asarray(second.apply(params["1"], jnp.asarray(y)))
    y = y * affine["subnode_scale"] + affine["subnode_bias"]
    close(out, y * affine["node_scale"] + affine["node_bias"], 1e-5)
    moved = update_grids(net, params, x)
    for i, (kan, values) in enumerate(zip(net.layers, net.trace(moved, x)[:-1], strict=True)):
        assert kan.outside_grid(moved[str(i)], values).mean() < 0.06  # ends, by rounding
    finer, new = refine_grids(net, moved, 10)
    close(finer.apply(new, x), net.apply(moved, x), 1e-3)


def test_feed_forward_reports_what_is_outside() -> None:
    ffn = KANFFN(dim=4, hidden=6, basis=BSpline(), bias=True)
    params, x = ffn.init(jax.random.key(0)), 1.5 * samples(6).reshape(2, 3, 4)
    ctx = Context(segment_ids=jnp.asarray([[1, 1, 0], [1, 2, 0]]))
    y, aux = ffn.apply(params, x, ctx)
    h = ffn.up.apply(params["up"], x)
    close(y, ffn.down.apply(params["down"], h), 1e-6)
    for name, values in (("up", x), ("down", h)):
        share = (np.abs(values[:, :2]) > 1).mean()
        assert aux.metrics[name]["outside"] == pytest.approx(share)


def test_a_decoder_takes_a_kan() -> None:
    """Through scan, with a gradient for every parameter and the metric by layer."""
    block = Block(
        mixer=Attention(dim=8, num_heads=2, num_kv_heads=1, head_dim=4),
        ffn=KANFFN(dim=8, hidden=6, basis=BSpline(adaptive=True)),
        norm=RMSNorm(dim=8),
    )
    blocks = Repeat(block=block, n=2)
    decoder = Decoder(
        embedding=Embedding(vocab_size=9, dim=8, std=1.0), blocks=blocks, norm=RMSNorm(dim=8)
    )
    params, tokens = decoder.init(jax.random.key(0)), jnp.arange(10).reshape(2, 5) % 9

    def loss(params: Any) -> Any:
        x, _, aux = decoder.hidden(params, tokens)
        return (x * jnp.cos(x)).sum(), aux

    grads, aux = jax.jit(jax.grad(loss, has_aux=True))(params)
    shares = [m for path, m in flatten(aux.metrics) if path.endswith("up/outside")]
    assert len(shares) == 1 and shares[0].shape == (2,) and (shares[0] > 0).all()
    trained = {path: p.trainable for path, p in flatten(decoder.declare())}
    for path, g in flatten(grads):
        assert np.any(g) == trained[path], path


def test_cost_is_that_of_the_expanded_product() -> None:
    kan = KAN(inputs=12, outputs=20, basis=BSpline(), scale="uniform", mask=True, bias=True)
    assert kan.cost(1).flops == 2 * 12 * 20 * (8 + 1)
    conv = KANConv(inputs=3, outputs=5, basis=RBF(), kernel=2)
    assert conv.cost(1).flops == 2 * 3 * 5 * 4 * (8 + 1)


def test_memory_of_a_step() -> None:
    """Forward and all gradients need little more than the basis itself."""
    kan = KAN(inputs=64, outputs=64, basis=BSpline())

    def step(params: Any, x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(kan.apply, params, x)
        return y, pull(dy)

    x = jnp.zeros((256, 64))
    program = jax.jit(step).lower(kan.init(jax.random.key(0)), x, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2.5 * 4 * 256 * 64 * 8


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharded_equals_unsharded(mesh: Any, adaptive: bool) -> None:
    """Column and row parallel, values and gradients."""
    ffn = KANFFN(dim=4, hidden=6, basis=BSpline(adaptive=adaptive), scale="uniform", bias=True)
    start = ffn.init(jax.random.key(0))
    params = draw(ffn)
    for name in ("up", "down"):
        params[name]["basis"] = start[name]["basis"]
    x = samples(24).reshape(4, 6, 4)

    def apply(params: Any, x: Any) -> Any:
        return ffn.apply(params, shard(x, "batch", "seq", "embed"))[0]

    expected, actual = here_and_on(mesh, ffn, apply, params, x)
    jax.tree.map(lambda a, e: close(a, e, 2e-5), actual, expected)


def test_a_kan_inside_a_flax_module() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.kan = NnxLayer(layer(BSpline(adaptive=True)), rngs=rngs)
            self.out = nnx.Linear(6, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(self.kan(x))

    model, x = Model(nnx.Rngs(0)), samples()
    knots = model.kan.weights["basis"]["knots"]
    assert not isinstance(knots, nnx.Param)
    pure = nnx.as_pure(model.kan.weights)
    close(model.kan(x), model.kan.layer.apply(pure, x), 1e-6)
    grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
    flat = {"/".join(path): g for path, g in nnx.to_flat_state(grads)}
    assert np.any(flat["kan/weights/weight"][...])
    assert "kan/weights/basis/knots" not in flat


@pytest.mark.parametrize("basis", [BSpline(), Chebyshev(outside="clamp"), ReLUBasis()])
def test_functions_of_the_image_are_functions_of_patches(basis: Basis) -> None:
    """With leading axes, strides and padding."""
    sizes = dict(inputs=3, outputs=5, basis=basis, kernel=2, stride=2, padding=1, bias=True)
    conv, patches = KANConv(**sizes), KANPatches(**sizes)
    params = draw(conv)
    flat = {"basis": {name: np.repeat(p, 4, 1) for name, p in params["basis"].items()}}
    for name, axes in (("weight", (2, 3, 0, 1, 4)), ("base", (2, 0, 1, 3))):
        w = params[name].transpose(axes)
        flat[name] = w.reshape(*w.shape[:-4], -1, 5)
    flat |= {"activation": {}, "bias": params["bias"]}
    x = samples(2 * 3 * 6 * 7, inputs=3).reshape(2, 3, 6, 7, 3)
    y = conv.apply(params, x)
    assert y.shape == (2, 3, 4, 4, 5)
    close(patches.apply(flat, x), y, 1e-5)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: layer(BSpline(num_intervals=0)), "num_intervals: 0; need at least 1"),
        (lambda: layer(BSpline(order=-1)), "order: -1; need at least 0"),
        (lambda: layer(BSpline(low=1, high=1)), "low: 1; need less than high, 1"),
        (
            lambda: layer(RBF(outside="wrap")),
            "outside: 'wrap'; need one of zero, clamp, extrapolate, normalise",
        ),
        (lambda: layer(RBF(num_centres=1)), "num_centres: 1; need at least 2"),
        (lambda: layer(Chebyshev(degree=0)), "degree: 0; need at least 1"),
        (lambda: layer(Jacobi(a=-1)), "a: -1; need more than -1"),
        (
            lambda: layer(Wavelet(kind="haar")),
            "kind: 'haar'; need one of mexican_hat, morlet, dog, meyer, shannon",
        ),
        (lambda: layer(BSpline(), scale="x"), "scale: 'x'; need one of none, constant, uniform"),
        (lambda: update(layer(BSpline())), "adaptive: False; need True to move knots"),
        (lambda: update(layer(RBF())), "basis: RBF; need BSpline, which has a grid"),
        (
            lambda: update(layer(BSpline(adaptive=True, outside="normalise"))),
            "outside: 'normalise'; nothing is outside of this grid",
        ),
        (
            lambda: KANNet(dims=(2,), basis=BSpline()),
            "dims: (2,); need inputs and outputs at least",
        ),
        (
            lambda: KANNet(dims=(2, (0, 0), 1), basis=BSpline()),
            "dims: (2, (0, 0), 1); need at least one node each, and none below 0",
        ),
        (
            lambda: KANConv(inputs=1, outputs=1, basis=RBF(), padding=-1),
            "padding: -1; need at least 0",
        ),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


def update(kan: KAN) -> Any:
    return update_grid(kan, kan.init(jax.random.key(0)), samples())
