"""Numbers of the operations in `kernels`: every implementation against a float64 NumPy oracle.

The oracle knows only the formulas of the forward pass; its gradients are complex-step derivatives,
exact to rounding. Kernels run in Pallas's interpret modes.
"""

import contextlib
import functools
import re
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from bestiary.kernels import dispatch
from bestiary.kernels.poly_norm import poly_norm
from bestiary.kernels.poly_norm import specs as poly_norm_specs
from bestiary.kernels.stat_topk_glu import normal_quantile, stat_topk_glu, statistical_topk
from bestiary.kernels.stat_topk_glu import specs as stat_topk_glu_specs

EPS = 1e-6
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.5e-2}  # of the largest element


@pytest.fixture(params=["reference", "tpu", "gpu"])
def impl(request, monkeypatch):
    if request.param == "tpu":
        monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    if request.param == "gpu":
        interpreter = getattr(plgpu, "InterpretGPUParams", None)
        if interpreter is None:
            pytest.skip("this JAX cannot interpret Mosaic GPU kernels")
        interpret = interpreter(detect_races=True)
        monkeypatch.setattr(plgpu, "kernel", partial(plgpu.kernel, interpret=interpret))
    return request.param


# --- oracles ---------------------------------------------------------------------------------


def poly_norm_oracle(x, weight, bias):
    y = bias
    for a, p in zip(weight, range(len(weight), 0, -1), strict=True):
        y = y + a * x**p / np.sqrt((x ** (2 * p)).mean(-1, keepdims=True) + EPS)
    return y


def stat_topk_glu_oracle(scores, values, quantile, ddof, activation):
    kept = scores
    if quantile > -np.inf:
        mean = scores.mean(-1, keepdims=True)
        variance = ((scores - mean) ** 2).sum(-1, keepdims=True) / (scores.shape[-1] - ddof)
        kept = scores - mean - np.sqrt(variance) * quantile
        kept = np.where(kept.real > 0, kept, 0)
    return ACTIVATIONS[activation](kept) * values


ACTIVATIONS = {
    "gelu": lambda z: z * (1 + scipy.special.erf(z / np.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2,
    "relu": lambda z: np.where(z.real > 0, z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


def differentiated(f, args, d_y):
    """f(*args) and the gradients of sum(f(*args) * d_y), rows being independent, in float64."""
    args, d_y = [np.asarray(a, np.float64) for a in args], np.asarray(d_y, np.float64)
    gradients, h = [], 1e-30
    for i, arg in enumerate(args):
        columns = []
        for unit in np.eye(arg.shape[-1]) if arg.ndim else np.ones(1):
            d = f(*args[:i], arg + 1j * h * unit, *args[i + 1 :]).imag / h * d_y
            columns.append(d.sum(-1) if arg.ndim == 2 else d.sum())
        gradients.append(np.stack(columns, -1).reshape(arg.shape))
    return f(*args), gradients


def normal(seed, shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def assert_close(got, want, dtype, scale=1.0):
    want = np.asarray(want, np.float64)
    atol = TOLERANCE[dtype] * max(np.abs(want).max(), 1e-6) * scale
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


# --- values and gradients --------------------------------------------------------------------


@functools.cache
def poly_norm_truth(name):
    """Arguments, cotangent, value and gradients of one case."""
    case = poly_norm_specs.TINY[name]
    x, d_y = (normal(seed, (case.rows, case.features), case.dtype) for seed in (0, 1))
    args = x, normal(2, (case.order,)), jnp.float32(0.3)
    return args, d_y, *differentiated(poly_norm_oracle, args, d_y)


@pytest.mark.parametrize("name", poly_norm_specs.TINY)
def test_poly_norm_equals_oracle(impl, name):
    dtype = poly_norm_specs.TINY[name].dtype
    args, d_y, want, d_want = poly_norm_truth(name)
    y, vjp = jax.vjp(partial(poly_norm, eps=EPS, impl=impl), *args)
    assert y.dtype == dtype
    for got, exact in zip((y, *vjp(d_y)), (want, *d_want), strict=True):
        assert_close(got, exact, dtype)


@functools.cache
def stat_topk_glu_truth(name):
    """Arguments, cotangent, value and gradients of one case."""
    case = stat_topk_glu_specs.TINY[name]
    shape = case.rows, case.features
    scores, values, d_y = (normal(seed, shape, case.dtype) for seed in (3, 4, 5))
    quantile = normal_quantile(case.k, case.features)
    oracle = partial(
        stat_topk_glu_oracle,
        quantile=float(quantile),
        ddof=case.ddof,
        activation=case.activation,
    )
    return (scores, values), quantile, d_y, *differentiated(oracle, (scores, values), d_y)


@pytest.mark.parametrize("name", stat_topk_glu_specs.TINY)
def test_stat_topk_glu_equals_oracle(impl, name):
    case = stat_topk_glu_specs.TINY[name]
    args, quantile, d_y, want, d_want = stat_topk_glu_truth(name)
    f = partial(stat_topk_glu, ddof=case.ddof, activation=case.activation, impl=impl)
    y, vjp = jax.vjp(lambda s, v, q: f(s, v, quantile=q), *args, quantile)
    *d_args, d_quantile = vjp(d_y)
    assert y.dtype == case.dtype
    assert d_quantile == 0
    for got, exact in zip((y, *d_args), (want, *d_want), strict=True):
        assert_close(got, exact, case.dtype)


def test_leading_axes_are_rows(impl):
    x, weight, bias = normal(0, (2, 3, 5, 136)), normal(1, (3,)), jnp.float32(0.2)
    y = poly_norm(x, weight, bias, impl=impl)
    flat = poly_norm(x.reshape(30, 136), weight, bias, impl="reference")
    np.testing.assert_allclose(y, flat.reshape(x.shape), rtol=0, atol=1e-6)


def test_one_row_without_leading_axes(impl):
    s, v = normal(0, (136,)), normal(1, (136,))
    y = stat_topk_glu(s, v, quantile=0.5, impl=impl)
    want = stat_topk_glu(s, v, quantile=0.5, impl="reference")
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantile", [1.4, -np.inf])
def test_constant_rows_have_finite_gradients(impl, quantile):
    scores, values = jnp.full((3, 136), 0.7), normal(0, (3, 136))
    grads = jax.grad(
        lambda *a: stat_topk_glu(*a, quantile=quantile, impl=impl).sum(), argnums=(0, 1)
    )(scores, values)
    assert all(np.isfinite(g).all() for g in grads)
    zeros = jnp.zeros((3, 136))
    grads = jax.grad(lambda *a: poly_norm(*a, impl=impl).sum(), argnums=(0, 1, 2))(
        zeros, jnp.ones(3), jnp.float32(0)
    )
    assert all(np.isfinite(g).all() for g in grads)


def test_schedule_rides_through_scan_and_remat(impl):
    """Per-layer quantiles as scanned values, rematerialised layers: equal to the plain loop."""
    if impl == "gpu":
        pytest.skip("remat refuses the callbacks of the GPU interpreter")
    layers, rows, features = 3, 5, 136
    w = normal(0, (layers, features, features)) / features**0.5
    coefficients, bias = normal(1, (layers, 3)), normal(2, (layers,))
    quantiles = jnp.stack(
        [normal_quantile(k, features) for k in (20, features, 60)]
    )  # the second layer keeps everything
    x = normal(3, (rows, features))

    def block(x, layer, impl):
        w, a, b, q = layer
        h = poly_norm(x @ w, a, b, impl=impl)
        return x + stat_topk_glu(h, x, quantile=q, ddof=1, impl=impl)

    def scanned(w, a, b):
        step = jax.checkpoint(lambda x, layer: (block(x, layer, impl), None))
        return jax.lax.scan(step, x, (w, a, b, quantiles))[0].sum()

    def looped(w, a, b):
        y = x
        for layer in zip(w, a, b, quantiles, strict=True):
            y = block(y, layer, "reference")
        return y.sum()

    got = jax.jit(jax.grad(scanned, argnums=(0, 1, 2)))(w, coefficients, bias)
    want = jax.jit(jax.grad(looped, argnums=(0, 1, 2)))(w, coefficients, bias)
    for g, r in zip(got, want, strict=True):
        assert_close(g, r, "float32", scale=5)
    for g in got[:2]:
        assert all(np.abs(layer).max() > 0 for layer in np.asarray(g))
    # the threshold moves with the scores: a bias matters only where everything is kept
    assert abs(got[2][1]) > 1
    np.testing.assert_allclose(got[2][::2], 0, atol=1e-3)


def experts(x, weight, bias, quantile, impl):
    """Both operations on stacked experts, each with its own scalars."""

    def one(x, weight, bias, quantile):
        h = poly_norm(x, weight, bias, impl=impl)
        return h + stat_topk_glu(h, x, quantile=quantile, impl=impl)

    return jax.vmap(one)(x, weight, bias, quantile).sum()


def test_vmap_equals_loop(impl):
    x, weight, bias = normal(0, (3, 5, 136)), normal(1, (3, 2)), normal(2, (3,))
    quantile = jnp.array([0.5, -jnp.inf, 1.5])
    grad = jax.value_and_grad(experts, argnums=(0, 1, 2))
    got = jax.jit(partial(grad, impl=impl))(x, weight, bias, quantile)
    each = [
        grad(*(a[i : i + 1] for a in (x, weight, bias, quantile)), "reference") for i in range(3)
    ]
    assert_close(got[0], sum(value for value, _ in each), "float32", scale=5)
    for g, *parts in zip(got[1], *(grads for _, grads in each), strict=True):
        assert_close(g, np.concatenate(parts), "float32")


@contextlib.contextmanager
def races_and_bounds_checked(capfd):
    """Two simulated cores; a race raises (newer JAX) or is printed (0.10)."""
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    ):
        yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_tpu_kernels_race_nowhere(capfd):
    """Three grid steps on two cores, the last block half empty."""
    with races_and_bounds_checked(capfd), pytest.MonkeyPatch.context() as patch:
        patch.setattr("bestiary.kernels.rowwise_tpu._MAX_BLOCK", 8)
        x, g, weight = normal(0, (21, 136)), normal(1, (21, 136)), normal(2, (3,))
        y, vjp = jax.vjp(partial(poly_norm, impl="tpu"), x, weight, jnp.float32(0.1))
        z, vjp_z = jax.vjp(partial(stat_topk_glu, quantile=1.1, impl="tpu"), x, g)
        got = (y, *vjp(g), z, *vjp_z(g))
        jax.block_until_ready(got)
    y, vjp = jax.vjp(partial(poly_norm, impl="reference"), x, weight, jnp.float32(0.1))
    z, vjp_z = jax.vjp(partial(stat_topk_glu, quantile=1.1, impl="reference"), x, g)
    for a, b in zip(got, (y, *vjp(g), z, *vjp_z(g)), strict=True):
        assert_close(a, b, "float32")


# --- properties ------------------------------------------------------------------------------


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), share=st.sampled_from([0.02, 0.08, 0.3]))
def test_kept_share_is_the_target(seed, share):
    x = np.random.default_rng(seed).normal(size=(4, 8192)).astype(np.float32)
    kept = statistical_topk(jnp.asarray(x), normal_quantile(share * 8192, 8192), ddof=seed % 2)
    assert abs((np.asarray(kept) > 0).mean() / share - 1) < 0.1


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), scale=st.floats(1, 30))
def test_poly_norm_ignores_the_scale_of_x(seed, scale):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 200)).astype(np.float32)) * 2
    weight, bias = jnp.array([0.5, -0.2, 0.4]), jnp.float32(0.1)
    y, scaled = (poly_norm(v, weight, bias, impl="reference") for v in (x, x * scale))
    np.testing.assert_allclose(scaled, y, atol=1e-4)


def test_normal_quantile():
    n = jnp.arange(1, 9)
    want = scipy.special.ndtri(1 - np.minimum(3 / np.arange(1, 9), 1))
    np.testing.assert_allclose(normal_quantile(3, n), want, rtol=1e-6)
    assert normal_quantile(5, 5) == -np.inf
    assert normal_quantile(9, 5) == -np.inf
    assert normal_quantile(1106, 13824).dtype == jnp.float32


# --- sharding --------------------------------------------------------------------------------


def both_operations(x, weight, bias, quantile, spec, impl):
    h = poly_norm(x, weight, bias, spec=spec, impl=impl)
    return ((h + stat_topk_glu(h, x, quantile=quantile, spec=spec, impl=impl)) ** 2).sum()


WHOLE_ROWS = [P("data"), P(None, "fsdp", None), P(("data", "tensor"), "fsdp")]
SPLIT_ROWS = [P("data", None, "tensor"), P(None, None, ("fsdp", "tensor")), None]


@pytest.mark.parametrize("spec", WHOLE_ROWS + SPLIT_ROWS, ids=str)
def test_sharded_equals_unsharded(mesh, spec):
    args = (normal(0, (4, 6, 160)), normal(1, (3,)), jnp.float32(0.1), jnp.float32(0.8))
    grad = jax.value_and_grad(both_operations, argnums=(0, 1, 2))
    want = grad(*args, None, "reference")
    with jax.set_mesh(mesh):
        x = jax.device_put(args[0], jax.NamedSharding(mesh, spec or P()))
        got = jax.jit(partial(grad, spec=spec, impl="auto"))(x, *args[1:])
        if spec in SPLIT_ROWS:
            with pytest.raises(NotImplementedError, match="is sharded over|no spec says"):
                both_operations(x, *args[1:], spec, "tpu")
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, w, "float32")


def test_sharded_features_reduce_statistics_only(mesh):
    """No device ever sees a whole row: the partitioner sums [rows] statistics."""
    spec = P("data", "tensor")
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, spec)
        x = jax.ShapeDtypeStruct((6, 160), jnp.float32, sharding=sharding)
        f = jax.jit(
            lambda s, v: stat_topk_glu(s, v, quantile=1.2, spec=spec), out_shardings=sharding
        )
        text = f.lower(x, x).compile().as_text() or ""
    assert "all-reduce" in text
    assert "all-gather" not in text


@pytest.mark.parametrize("nested", [False, True], ids=["wrapped", "in_the_callers_shard_map"])
def test_kernel_on_shards_equals_unsharded(mesh, nested):
    x, weight, bias, spec = (
        normal(0, (8, 160)),
        normal(1, (3,)),
        jnp.float32(0.1),
        P(mesh.axis_names),
    )

    def loss(x, weight, bias, impl):
        run = partial(poly_norm, impl=impl, spec=None if nested else spec)
        if nested:
            run = jax.shard_map(run, in_specs=(spec, P(), P()), out_specs=spec)
        return (run(x, weight, bias) ** 2).sum()

    with jax.set_mesh(mesh):
        want = jax.jit(jax.grad(partial(loss, impl="reference"), argnums=(0, 1, 2)))(
            x, weight, bias
        )
        with pltpu.force_tpu_interpret_mode():
            got = jax.jit(jax.grad(partial(loss, impl="tpu"), argnums=(0, 1, 2)))(x, weight, bias)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, "float32")


# --- refusals --------------------------------------------------------------------------------

X, A, B = jnp.ones((3, 136)), jnp.ones(3), jnp.float32(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: poly_norm(jnp.ones((3, 8), int), A, B), r"x must be a float array .* int32\[3, 8"),
        (lambda: poly_norm(jnp.float32(1), A, B), r"x must be a float array"),
        (lambda: poly_norm(X, jnp.ones((3, 1)), B), r"weight must be \[order\].*\[3, 1\]"),
        (lambda: poly_norm(X, jnp.ones(0), B), r"weight must be \[order\].*\[0\]"),
        (lambda: poly_norm(X, A, jnp.ones(1)), r"bias must be a scalar.*\[1\]"),
        (lambda: poly_norm(X, A, B, eps=-1.0), r"eps must be >= 0; got -1.0"),
        (lambda: poly_norm(X, A, B, impl="cuda"), r"impl must be one of auto, .*'cuda'"),
        (lambda: stat_topk_glu(X.astype(int), X, quantile=0.0), r"scores must be a float array"),
        (lambda: stat_topk_glu(X, X[:2], quantile=0.0), r"values must be like scores.*\[2, 136\]"),
        (lambda: stat_topk_glu(X, X, quantile=jnp.ones(2)), r"quantile must be a scalar.*\[2\]"),
        (lambda: stat_topk_glu(X, X, quantile=0.0, ddof=136), r"ddof must be in \[0, 136\).*136"),
        (lambda: stat_topk_glu(X, X, quantile=0.0, ddof=-1), r"ddof must be in .*got -1"),
        (
            lambda: stat_topk_glu(X, X, quantile=0.0, activation="tanh"),  # pyright: ignore
            r"activation must be one of gelu, gelu_tanh, relu, silu; got 'tanh'",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: poly_norm(X.astype("float16"), A, B, impl="tpu"), "float32 and bfloat16; got"),
        (lambda: poly_norm(X, jnp.ones(8), B, impl="tpu"), "orders up to 7; got 8"),
        (lambda: poly_norm(X[:0], A, B, impl="tpu"), r"nothing to do .*\(0, 136\)"),
        (lambda: poly_norm(X[:, :72], A, B, impl="gpu"), "at least 128 features; got 72"),
        (
            lambda: stat_topk_glu(*[jnp.ones((2, 400_000))] * 2, quantile=0.0, impl="tpu"),
            "400000 features does not fit in 32 MiB",
        ),
    ],
)
def test_named_kernel_says_why_not(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((8, 160), P("data", None), None),
        ((8, 160), P("data"), None),
        ((7, 160), P("data"), "dimension 0 of .* does not divide into 2 shards"),
        ((8, 160), P(None, "tensor"), "dimension 1 of .* is sharded over"),
        ((8, 160), None, "no spec says"),
    ],
)
def test_why_not_sharded(mesh, shape, spec, message):
    assert dispatch.why_not_sharded(shape, spec, whole=(-1,)) is None  # no mesh is set
    with jax.set_mesh(mesh):
        reason = dispatch.why_not_sharded(shape, spec, whole=(-1,))
        with pytest.raises(ValueError, match="spec must name mesh axes .*'model'"):
            dispatch.why_not_sharded(shape, P("model"), whole=(-1,))
    assert (reason is None) if message is None else re.search(message, str(reason))
