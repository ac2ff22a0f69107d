"""S-KAN: its formula in float64, what selecting leaves, what trains, in decoders and images."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import close, draw, here_and_on

from bestiary.eval.hlo import jaxpr_flops
from bestiary.layers import shard
from bestiary.layers.base import flatten
from bestiary.layers.kan import KAN, edges
from bestiary.layers.kan_bases import RBF, RSWAF, Rational, ReLUBasis
from bestiary.layers.kan_conv import KANConv
from bestiary.layers.kan_polynomials import Chebyshev, Gram
from bestiary.layers.kan_spline import BSpline
from bestiary.layers.kan_wavelets import Wavelet
from bestiary.layers.skan import SKAN, SKANFFN, SConvKAN, trains
from bestiary.layers.skan_select import PrunedSKAN, select
from bestiary.zoo.llama import byte_llama

# with a norm, with knots that belong to inputs, with parameters of edges, and with none
POOL = (BSpline(adaptive=True), RBF(), Wavelet(), Gram())
SMALL = (RBF(norm=False), Chebyshev(), ReLUBasis(), Wavelet(kind="dog"))
INPUTS, OUTPUTS = 10, 6
X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (5, 3, INPUTS)), jnp.float32)
granularities = pytest.mark.parametrize("granularity", ["node", "layer", "edge"])


def skan(pool: Any = POOL, inputs: int = INPUTS, outputs: int = OUTPUTS, **options: Any) -> SKAN:
    return SKAN(inputs=inputs, outputs=outputs, pool=pool, **options)


def draw_with_knots(layer: Any) -> Any:
    """Parameters that leave no part without effect, and the knots as they start."""
    params, start = draw(layer), layer.init(jax.random.key(0))
    for path, value in flatten(start):
        if path.endswith("knots"):
            *parents, last = path.split("/")
            target = params
            for name in parents:
                target = target[name]
            target[last] = value
    return params


def choosing(layer: Any, params: Any, choice: Any, value: float = 1.0) -> Any:
    """The parameters with shares of 1 (linear: of `value`) where `choice` says, and of 0."""
    one_hot = np.eye(len(layer.pool), dtype=np.float32)[np.asarray(choice)]
    w = 1e4 * one_hot if layer.weighting == "softmax" else value * one_hot
    return params | {"selection": {"weight": jnp.asarray(w)}}


def choices(layer: SKAN) -> np.ndarray:
    """Every basis but the last, by no rule."""
    shape = layer.selection.shape
    return np.random.default_rng(3).integers(0, len(layer.pool) - 1, shape)


# --- while they select ----------------------------------------------------------------------------


@granularities
@pytest.mark.parametrize("weighting", ["softmax", "linear"])
def test_equals_the_formula(granularity: Any, weighting: Any) -> None:
    """In float64, from the curves of every edge in every basis."""
    layer = skan(SMALL, granularity=granularity, weighting=weighting, bias=True, temperature=0.7)
    params = draw(layer)
    w = np.float64(params["selection"]["weight"])
    if weighting == "linear":
        w[..., 1] *= -1
        params["selection"]["weight"] = jnp.asarray(w, jnp.float32)
        share = w / np.abs(w).sum(-1, keepdims=True)
    else:
        share = np.exp(w / 0.7) / np.exp(w / 0.7).sum(-1, keepdims=True)
    share = share.reshape(share.shape[:-1] + (1,) * (3 - share.ndim) + share.shape[-1:])
    act = np.float64(jax.nn.silu(X))
    y = act @ np.float64(params["base"]) + np.float64(params["bias"])
    for p, basis in enumerate(SMALL):
        curves = basis.edges(params[str(p)]["basis"], X, params[str(p)]["weight"])
        y += np.einsum("...oi,io->...o", curves, np.broadcast_to(share[..., p], (INPUTS, OUTPUTS)))
    close(jax.jit(layer.apply)(params, X), y, 1e-5)
    expected = -(np.abs(share) * np.log(np.abs(share))).sum()
    assert layer.selection.entropy(params["selection"]) == pytest.approx(expected, rel=1e-5)


@granularities
def test_each_branch_is_its_own_kan(granularity: Any) -> None:
    layer = skan(granularity=granularity)
    params, mixed = draw_with_knots(layer), jax.jit(layer.apply)
    for p, basis in enumerate(POOL):
        kan = KAN(inputs=INPUTS, outputs=OUTPUTS, basis=basis)
        own = params[str(p)] | {name: params[name] for name in ("activation", "base")}
        every = np.full(layer.selection.shape, p)
        close(mixed(choosing(layer, params, every), X), kan.apply(own, X), 1e-5)


@granularities
def test_gradients_reach_every_parameter(granularity: Any) -> None:
    """And are finite far outside in bfloat16, also of a layer that has made up its mind."""
    layer = skan(granularity=granularity, bias=True)
    start = layer.init(jax.random.key(0))

    @jax.jit
    @jax.grad
    def slope(params: Any, x: Any) -> Any:
        y = layer.apply(params, x).astype(jnp.float32)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

    for path, g in flatten(slope(start, X)):
        assert np.any(g) == (not path.endswith("knots")), path
    chosen = choosing(layer, start, choices(layer))
    for params in (start, chosen):
        for path, g in flatten(slope(params, 1e3 * X.astype(jnp.bfloat16))):
            assert np.isfinite(g).all(), path


# --- what is left ---------------------------------------------------------------------------------


@granularities
@pytest.mark.parametrize("weighting", ["softmax", "linear"])
def test_selected_equals_one_hot(granularity: Any, weighting: Any) -> None:
    """Values, the slope of x and those of what is left, of which nothing is without effect."""
    layer = skan(granularity=granularity, weighting=weighting, bias=True)
    params = choosing(layer, draw_with_knots(layer), choices(layer), -1.0)
    pruned, kept = select(layer, params)
    shapes = jax.tree.map(jnp.shape, kept)
    assert shapes == jax.tree.map(lambda s: s.shape, pruned.abstract())

    @partial(jax.jit, static_argnums=1)
    def run(params: Any, layer: Any) -> Any:
        y, pull = jax.vjp(layer.apply, params, X)
        return y, pull(jnp.cos(y))

    (y, (_, dx)), (left, (grads, left_dx)) = run(params, layer), run(kept, pruned)
    close(left, y, 1e-5)
    close(left_dx, dx, 1e-4)
    for path, g in flatten(grads):
        assert np.any(g) == (not path.endswith("knots")), path


def test_nodes_keep_the_largest_share_and_nothing_else() -> None:
    """At the count of a KAN whose inputs have that many functions."""
    layer = skan(SMALL, base=None)
    params, choice = draw(layer), choices(layer)
    weight = jax.random.uniform(jax.random.key(1), (INPUTS, len(SMALL)), maxval=0.5)
    weight = weight.at[np.arange(INPUTS), choice].set(0.7)
    pruned, kept = select(layer, params | {"selection": {"weight": weight}})
    assert isinstance(pruned, PrunedSKAN)
    for p, basis in enumerate(SMALL[:-1]):
        assert pruned.groups[p] == (basis, tuple(np.flatnonzero(choice == p).tolist()))
    sizes = np.array([basis.size for basis in SMALL])
    ends = 2 * SMALL[2].size * (choice == 2).sum()  # of ReLU-KAN's functions, by input
    assert pruned.count().total == sizes[choice].sum() * OUTPUTS + ends
    assert sum(p.size for p in jax.tree.leaves(kept)) == pruned.count().total
    traced = jax.make_jaxpr(pruned.apply)(pruned.abstract(), X)
    assert pruned.cost(1).flops * 15 == jaxpr_flops(traced)


def test_counts_and_costs_while_they_select() -> None:
    layer = skan(SMALL)
    size = sum(basis.size for basis in SMALL)
    own = 2 * SMALL[2].size * INPUTS + 2 * INPUTS * OUTPUTS  # ReLU-KAN's ends, and the wavelets'
    total = INPUTS * OUTPUTS * (size + 1) + INPUTS * len(SMALL) + own
    assert layer.count().total == total
    assert layer.cost(1).flops == 2 * INPUTS * OUTPUTS * (size + 1)


@granularities
@pytest.mark.parametrize("weighting", ["softmax", "linear"])
def test_shares_start_equal_and_the_entropy_falls_to_0(granularity: Any, weighting: Any) -> None:
    layer = skan(SMALL, granularity=granularity, weighting=weighting)
    params, selection = layer.init(jax.random.key(0)), layer.selection
    own = params["selection"]
    np.testing.assert_array_equal(selection.shares(own), np.full((*selection.shape, 4), 0.25))
    assert selection.undecided(own) == pytest.approx(1, rel=1e-5)
    decided = choosing(layer, params, choices(layer))["selection"]
    entropy, slope = jax.value_and_grad(selection.entropy)(decided)
    assert entropy == 0 and np.isfinite(slope["weight"]).all()


# --- phases ---------------------------------------------------------------------------------------


def test_what_trains() -> None:
    ffn = SKANFFN(up=skan(axes=("embed", "mlp")), down=skan(inputs=OUTPUTS, outputs=INPUTS))
    for path, on in flatten(trains(ffn, 1)):
        assert on == (not path.endswith("knots")), path
    chosen = {path for path, on in flatten(trains(ffn, 2)) if on}
    assert chosen == {"up/selection/weight", "down/selection/weight"}
    with pytest.raises(ValueError, match="^phase: 3; need a selected layer, and .*selection"):
        trains(ffn, 3)
    pruned, kept = select(ffn, ffn.init(jax.random.key(0)))
    assert jax.tree.structure(trains(pruned, 3)) == jax.tree.structure(kept)


def test_three_phases_find_a_basis() -> None:
    """Curves train, then nothing but the choice, then what is left, which beats a wrong basis."""
    wrong, right = Chebyshev(degree=1), RBF(norm=False, low=-1, high=1, num_centres=6)
    x = jnp.linspace(-1, 1, 64).reshape(1, 64, 1)
    target = jnp.sin(3 * np.pi * x)
    ffn = SKANFFN(up=skan((wrong, right), 1, 3), down=skan((wrong, right), 3, 1))

    def entropies(ffn: SKANFFN, params: Any) -> Any:
        pairs = [(getattr(ffn, name), params[name]) for name in ("up", "down")]
        found = [s.selection.entropy(p["selection"]) for s, p in pairs if isinstance(s, SKAN)]
        return jnp.array(found)

    @partial(jax.jit, static_argnums=0)
    def fit(ffn: SKANFFN, on: Any, rate: float, entropy: float, params: Any) -> Any:
        """Parameters after Adam on those that are on, and the last step's error."""
        tx = optax.adam(1.0)

        def loss(params: Any) -> Any:
            error = jnp.square(ffn.apply(params, x)[0] - target).mean()
            return error + entropy * entropies(ffn, params).sum(), error

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            grads, error = jax.grad(loss, has_aux=True)(params)
            grads = jax.tree.map(lambda on, g: jnp.where(on, g, 0), on, grads)
            updates, state = tx.update(grads, state)
            return (jax.tree.map(lambda p, u: p + rate * u, params, updates), state), error

        (params, _), error = jax.lax.scan(step, (params, tx.init(params)), length=300)
        return params, error[-1]

    params, _ = fit(ffn, trains(ffn, 1), 0.02, 0.0, ffn.init(jax.random.key(0)))
    chosen, _ = fit(ffn, trains(ffn, 2), 0.1, 3.0, params)
    for path, value in flatten(chosen):
        if "selection" not in path:
            np.testing.assert_array_equal(value, dict(flatten(params))[path])
    largest = np.log(2) * np.array([1, 3])
    assert (entropies(ffn, chosen) < np.minimum(entropies(ffn, params), 0.5 * largest)).all()
    pruned, kept = select(ffn, chosen)
    assert isinstance(pruned.up, PrunedSKAN) and isinstance(pruned.down, PrunedSKAN)
    _, error = fit(pruned, trains(pruned, 3), 0.02, 0.0, kept)
    alone = SKANFFN(
        up=KAN(inputs=1, outputs=3, basis=wrong),
        down=KAN(inputs=3, outputs=1, basis=wrong, axes=("mlp", "embed")),
    )
    _, worst = fit(alone, trains(alone, 1), 0.02, 0.0, alone.init(jax.random.key(0)))
    assert error < worst / 4


# --- in models ------------------------------------------------------------------------------------


def ffn_of(dim: int, hidden: int, **options: Any) -> SKANFFN:
    up = skan(SMALL, dim, hidden)
    return SKANFFN(up=up, down=skan(SMALL, hidden, dim, axes=("mlp", "embed")), **options)


def test_a_decoder_trains_with_it() -> None:
    """Both selections and all curves, with the entropy in the loss and told by layer."""
    model = byte_llama(2, 32, ffn_of(32, 24, entropy=1e-2))
    params, tokens = model.init(jax.random.key(0)), jnp.arange(20).reshape(2, 10)

    @jax.jit
    def loss(params: Any) -> Any:
        def run(params: Any) -> Any:
            logits, _, aux = model.apply(params, tokens)
            scores = jax.nn.log_softmax(logits[:, :-1])
            nll = -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()
            return nll + aux.losses["selection"], aux

        return jax.value_and_grad(run, has_aux=True)(params)

    (before, aux), grads = loss(params)
    close(aux.losses["selection"], 1e-2 * 2 * (32 + 24) * np.log(4))
    undecided = [m for path, m in flatten(aux.metrics) if path.endswith("undecided")]
    assert [m.shape for m in undecided] == [(2,), (2,)]
    for path, g in flatten(grads):
        assert np.any(g), path
    (after, _), _ = loss(jax.tree.map(lambda p, g: p - 0.05 * g, params, grads))
    assert after < before


def test_a_selected_feed_forward_is_one() -> None:
    ffn = ffn_of(INPUTS, 8)
    params = ffn.init(jax.random.key(0))
    for name in ("up", "down"):
        part = getattr(ffn, name)
        params[name] = choosing(part, params[name], choices(part))
    pruned, kept = select(ffn, params)
    assert isinstance(pruned, SKANFFN) and pruned.dim == INPUTS
    (y, aux), (left, none) = ffn.apply(params, X), pruned.apply(kept, X)
    close(left, y, rtol=1e-5)
    assert aux.metrics["up"]["undecided"] == 0 and not none.metrics


@pytest.mark.parametrize("alike", [True, False])
def test_every_layer_of_a_decoder_selects_for_itself(alike: bool) -> None:
    """The model with shares of 1 and 0, still scanned where all layers chose alike."""
    model = byte_llama(2, 32, ffn_of(32, 8))
    params, tokens = model.init(jax.random.key(0)), jnp.arange(20).reshape(2, 10)
    ffn = params["blocks"]["ffn"]
    for name in ("up", "down"):
        weight = ffn[name]["selection"]["weight"]  # [layers, inputs, pool]
        choice = np.random.default_rng(4).integers(0, len(SMALL), weight.shape[:2])
        choice = choice[:1].repeat(2, 0) if alike else choice
        one_hot = 1e4 * np.eye(len(SMALL), dtype=np.float32)[choice]
        ffn[name] = ffn[name] | {"selection": {"weight": jnp.asarray(one_hot)}}
    left, kept = select(model, params)
    assert len(left.stacks) == (1 if alike else 2)  # type: ignore[attr-defined]
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(lambda s: s.shape, left.abstract())
    assert jax.tree.structure(trains(left, 3)) == jax.tree.structure(kept)
    close(left.apply(kept, tokens)[0], model.apply(params, tokens)[0], rtol=1e-4)


@pytest.mark.parametrize("selected", [False, True])
def test_sharded_equals_unsharded(mesh: Any, selected: bool) -> None:
    """Column and row parallel, values and gradients."""
    pool = (RBF(), *SMALL[1:])
    up = skan(pool, 8, 12)
    ffn: Any = SKANFFN(up=up, down=skan(pool, 12, 8, axes=("mlp", "embed")))
    params, x = draw(ffn), jnp.tile(X[:4, :2, :8], (1, 3, 1))
    if selected:
        ffn, params = select(ffn, params)

    def apply(params: Any, x: Any) -> Any:
        return ffn.apply(params, shard(x, "batch", "seq", "embed"))[0]

    expected, actual = here_and_on(mesh, ffn, apply, params, x)
    jax.tree.map(lambda a, e: close(a, e, 1e-4), actual, expected)


def test_convolutions_select_by_layer() -> None:
    """The sum of their shares, one of them alone, and what is selected."""
    sizes: Any = dict(inputs=3, outputs=4, kernel=2, stride=2, padding=1, bias=True)
    layer = SConvKAN(pool=SMALL[:3], **sizes)
    params = draw(layer)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6, 3)), jnp.float32)
    common = {name: params[name] for name in ("activation", "base", "bias")}
    share = np.float64(jax.nn.softmax(params["selection"]["weight"]))
    convs = [KANConv(basis=basis, **sizes) for basis in layer.pool]
    alone = [c.apply(common | params[str(p)], images) for p, c in enumerate(convs)]
    mixed = sum(s * np.float64(y) for s, y in zip(share, alone, strict=True))
    y, pull = jax.vjp(layer.apply, params, images)
    close(y, mixed, 1e-5)  # the base has shares of 1 in sum
    for path, g in flatten(pull(jnp.cos(y))[0]):
        assert np.any(g), path
    assert set(flatten_names(trains(layer, 2))) == {"selection/weight"}
    for p, conv in enumerate(convs):
        left, kept = select(layer, choosing(layer, params, p))
        assert left == conv
        close(left.apply(kept, images), alone[p], 1e-5)


def flatten_names(labels: Any) -> list[str]:
    return [path for path, on in flatten(labels) if on]


def test_curves_of_what_is_left_can_be_drawn() -> None:
    """A group is a KAN, so that its edges are those of one."""
    layer = skan(SMALL, base=None)
    pruned, kept = select(layer, choosing(layer, draw(layer), choices(layer)))
    assert isinstance(pruned, PrunedSKAN)
    y = jnp.zeros((*X.shape[:-1], OUTPUTS))
    for g, (basis, where) in enumerate(pruned.groups):
        y += edges(pruned.kan(basis, where), kept[str(g)], X[..., list(where)]).sum(-1)
    close(y, pruned.apply(kept, X), 1e-5)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: skan(inputs=0), "inputs: 0; need at least 1"),
        (lambda: skan((RBF(),)), "pool: 1; need at least 2 bases to select from"),
        (lambda: SConvKAN(inputs=1, outputs=1, pool=()), "pool: 0; need at least 2 bases"),
        (lambda: skan(granularity="head"), "granularity: 'head'; need one of node, layer, edge"),
        (lambda: skan(weighting="max"), "weighting: 'max'; need one of softmax, linear"),
        (lambda: skan(temperature=0.0), "temperature: 0.0; need more than 0"),
        (lambda: skan((RBF(), Rational())), "pool: Rational with groups 4; need 1 in nodes"),
        (
            lambda: skan((RBF(), Wavelet(kind="shannon", window=True))),
            "pool: Wavelet with window True; need False in nodes",
        ),
        (lambda: SKANFFN(up=skan(), down=skan()), "down: 10 to 6; need 6 to 10, back"),
        (lambda: dataclasses.replace(ffn_of(4, 6), entropy=-1.0), "entropy: -1.0; need 0 or more"),
        (lambda: trains(skan(), 4), "phase: 4; need 1, 2 or 3"),  # type: ignore[arg-type]
        (lambda: select(RBF(), {}), "layer: RBF; need SKAN or SConvKAN, or what holds one"),
        (
            lambda: PrunedSKAN(inputs=3, outputs=1, groups=((RBF(), (0, 2)), (RSWAF(), (2,)))),
            r"groups: \[0, 2, 2\]; need every input below 3 once",
        ),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_a_layer_may_select_what_nodes_may_not() -> None:
    layer = skan((RBF(), Rational()), granularity="layer")
    params = choosing(layer, draw(layer), 1)
    kan, kept = select(layer, params)
    close(kan.apply(kept, X), layer.apply(params, X), 1e-5)
