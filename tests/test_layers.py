"""The contract that every layer keeps, over all layer classes that exist."""

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import bestiary.layers
import bestiary.zoo
from bestiary.eval.hlo import jaxpr_flops
from bestiary.layers import (
    AFKAN,
    AFKANFFN,
    AXES,
    DEFAULT_RULES,
    DSA,
    GLU,
    GRKAN,
    HQKAN,
    KAN,
    KANFFN,
    MLA,
    MLP,
    NSA,
    PEER,
    PKM,
    QKAN,
    RBF,
    SKAN,
    SKANFFN,
    AdaptiveFactor,
    Attention,
    Aux,
    BatchNorm,
    BlockFFN,
    BSpline,
    CausalConv,
    Chain,
    Chebyshev,
    Clipped,
    Context,
    Dice,
    Elu,
    Embedding,
    Engram,
    Fourier,
    Fusion,
    GatedDeltaNet,
    GatedLinearAttention,
    GaussianGLU,
    Gelu,
    GeluTanh,
    GroupRational,
    Interpolated,
    KANConv,
    KANNet,
    KANPatches,
    LatentExperts,
    LatentGLU,
    Layer,
    LayerNorm,
    LeakyRelu,
    LearnedMLP,
    Linear,
    LocalActivationUnit,
    Mamba,
    Mamba2,
    MemoryPlus,
    MemoryTable,
    MixtureOfDepths,
    MoBA,
    MoE,
    MoHDFFN,
    MoHDResidual,
    Parallel,
    Param,
    Perceptron,
    Performer,
    PolyNorm,
    PolyReLU,
    Precision,
    PReLU,
    PrunedSKAN,
    Relu,
    ReluSquared,
    Repeat,
    RMSNorm,
    Rope,
    Router,
    SConvKAN,
    Selu,
    SharedAttention,
    SharedKV,
    Sigmoid,
    Silu,
    Sine,
    Softplus,
    SparkAttention,
    SparkFFN,
    SubDimensions,
    SumPooling,
    Tanh,
    UltraMem,
    UltraMemV2,
    dot,
    layer,
    pspec,
    shard,
    take,
    use_rules,
    weight,
)
from bestiary.layers.base import Count, flatten, is_param, map_params, params_of
from bestiary.layers.block_choice import BlockChoice
from bestiary.layers.repeat import Remat
from bestiary.layers.router import Routing
from bestiary.layers.skan import Selectable
from bestiary.zoo import gemma2, llama, polycom, spark
from bestiary.zoo.decoder import MTP, Block, Decoder
from bestiary.zoo.din import DIN

# Pairwise distinct, and even where a mesh axis of 2 divides them.
BATCH, LENGTH, DIM, HIDDEN, VOCAB = 4, 5, 12, 20, 22
HEADS = {"dim": DIM, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
ROPE = Rope(fraction=0.7)
NORM = RMSNorm(dim=DIM)
HEAD_NORM = RMSNorm(dim=6)

ATTENTION = Attention(
    **HEADS,
    query_norm=HEAD_NORM,
    key_norm=HEAD_NORM,
    softcap=4.0,
    sinks=True,
    rope=ROPE,
    window=4,
)
SPARK_ATTENTION = SparkAttention(**HEADS, predictor_dim=2, top_k=3)
SPARK_FFN = SparkFFN(dim=DIM, hidden=HIDDEN, predictor_dim=4, top_k=7)
POLY_NORM_MLP = MLP(dim=DIM, hidden=HIDDEN, activation=PolyNorm())
POLY_RELU_MLP = MLP(dim=DIM, hidden=HIDDEN, activation=PolyReLU(order=2))
SWIGLU = GLU(dim=DIM, hidden=HIDDEN, activation=Silu(), bias=True)
GAUSSIAN_GLU = GaussianGLU(dim=DIM, hidden=HIDDEN, sparsity=0.6)
SKAN_LAYER = SKAN(inputs=DIM, outputs=7, pool=(Chebyshev(), RBF()))
GATE = SubDimensions(dim=DIM, num=4, num_shared=1, top_k=2, balance=0.0)
PRODUCT_KEYS = {"dim": DIM, "num_heads": 2, "num_keys": 6, "key_dim": 8, "top_k": 3}

# Every kind of parameter there is, and a constant that differs by repeat.
CHAIN = Chain(
    layers=(
        Block(mixer=ATTENTION, ffn=POLY_NORM_MLP, norm=NORM, placement="sandwich"),
        Block(mixer=SPARK_ATTENTION, ffn=SPARK_FFN, norm=NORM),
        Block(mixer=Attention(**HEADS), ffn=POLY_RELU_MLP, norm=LayerNorm(dim=DIM)),
        Block(mixer=Attention(**HEADS), ffn=GAUSSIAN_GLU, norm=NORM, placement="post"),
    )
)
REPEAT = Repeat(block=CHAIN, n=2, constants=(("sparsity", (0.3, 0.8)),))
DECODER = Decoder(
    embedding=Embedding(vocab_size=VOCAB, dim=DIM, std=1.0),
    blocks=REPEAT,
    norm=NORM,
    head=Linear(inputs=DIM, outputs=VOCAB, axes=("embed", "vocab"), bias=True),
    softcap=20.0,
)
TIED = dataclasses.replace(DECODER, head=None)

LAYERS: dict[str, Layer] = {
    "linear": Linear(inputs=DIM, outputs=7, bias=True),
    "embedding": DECODER.embedding,
    "rms_norm": NORM,
    "rms_norm_offset": RMSNorm(dim=DIM, gain="offset"),
    "layer_norm": LayerNorm(dim=DIM),
    "layer_norm_no_bias": LayerNorm(dim=DIM, bias=False),
    "relu": Relu(),
    "relu_squared": ReluSquared(),
    "gelu": Gelu(),
    "gelu_tanh": GeluTanh(),
    "silu": Silu(),
    "tanh": Tanh(),
    "softplus": Softplus(),
    "leaky_relu": LeakyRelu(),
    "elu": Elu(),
    "selu": Selu(),
    "sigmoid": Sigmoid(),
    "poly_relu": PolyReLU(),
    "poly_norm": PolyNorm(),
    "batch_norm": BatchNorm(dim=DIM),
    "prelu": PReLU(dim=DIM),
    "dice": Dice(dim=DIM),
    "interpolated": Interpolated(first=Gelu(), second=Silu(), kind="learned"),
    "clipped": Clipped(kind="smooth", neurons=DIM),
    "perceptron": Perceptron(widths=(DIM, 8, 6), activations=(PReLU(),)),
    "mlp": POLY_NORM_MLP,
    "mlp_with_biases": MLP(dim=DIM, hidden=HIDDEN, activation=Gelu(), bias=True),
    "glu": SWIGLU,
    "group_rational": GroupRational(groups=4),
    "grkan": GRKAN(dim=DIM, hidden=HIDDEN, groups=4),
    "afkan": AFKAN(inputs=DIM, outputs=7, norm=LayerNorm(dim=DIM), methods=("multistep",)),
    "afkan_ffn": AFKANFFN(
        up=AFKAN(inputs=DIM, outputs=8, norm=LayerNorm(dim=DIM), methods=("multistep",)),
        down=AFKAN(inputs=8, outputs=DIM, norm=None, scope="sample", methods=("multistep",)),
    ),
    "qkan": QKAN(inputs=DIM, outputs=7, repetitions=2),
    "hqkan": HQKAN(dim=DIM, qkan=QKAN(inputs=4, outputs=6, repetitions=1, group=3)),
    "kan": KAN(
        inputs=DIM,
        outputs=8,
        basis=BSpline(outside="normalise"),
        scale="uniform",
        mask=True,
        bias=True,
    ),
    "kan_net": KANNet(dims=(DIM, (6, 2), 4), basis=RBF(), affine=True),
    "kan_ffn": KANFFN(dim=DIM, hidden=HIDDEN, basis=Chebyshev(), base=None),
    "kan_conv": KANConv(inputs=DIM, outputs=6, basis=Sine(), kernel=3, padding=1),
    "kan_patches": KANPatches(inputs=DIM, outputs=6, basis=Fourier(norm=True), kernel=3, padding=1),
    "skan": SKAN_LAYER,
    "skan_ffn": SKANFFN(
        up=SKAN_LAYER, down=SKAN(inputs=7, outputs=DIM, pool=SKAN_LAYER.pool, axes=("mlp", "embed"))
    ),
    "skan_conv": SConvKAN(inputs=DIM, outputs=6, pool=(Chebyshev(), RBF()), padding=1),
    "pruned_skan": PrunedSKAN(
        inputs=DIM,
        outputs=7,
        groups=((Chebyshev(), tuple(range(1, DIM))), (RBF(norm=False), (0,))),
    ),
    "spark_ffn": SPARK_FFN,
    "gaussian_glu": GAUSSIAN_GLU,
    "block_ffn": BlockFFN(
        dim=DIM,
        num_experts=6,
        expert_dim=4,
        locality=0.1,
        sparsity=AdaptiveFactor(start=0.2),
        chunk=3,
        density=0.5,
    ),
    "router": Router(dim=DIM, num_experts=6, top_k=2, balance=0.1),
    "moe": MoE(
        router=Router(dim=DIM, num_experts=6, top_k=2, score="sigmoid", bias="centered"),
        expert=GLU(dim=DIM, hidden=HIDDEN, activation=Silu()),
        shared=GLU(dim=DIM, hidden=8, activation=Silu()),
    ),
    "fusion": Fusion(width=DIM, kind="monarch"),
    "mohd_ffn": MoHDFFN(gate=GATE, hidden=HIDDEN),
    "mohd_residual": MoHDResidual(gate=GATE, inner=Attention(**HEADS)),
    "latent_glu": LatentGLU(dim=DIM, latent=DIM // 2, hidden=HIDDEN),
    "latent_experts": LatentExperts(
        router=Router(dim=DIM, num_experts=6, top_k=2), group_size=3, latent=4, hidden=HIDDEN
    ),
    "mixture_of_depths": MixtureOfDepths(
        dim=DIM,
        block=Block(mixer=Attention(**HEADS), ffn=POLY_NORM_MLP, norm=NORM),
        capacity=0.6,
    ),
    "attention": ATTENTION,
    "attention_with_biases": Attention(**HEADS, bias=True, out_bias=True),
    "spark_attention": SPARK_ATTENTION,
    "nsa": NSA(**HEADS, block_size=2, num_selected=2, local_window=3),
    "nsa_of_the_paper": NSA(
        **HEADS,
        block_size=2,
        num_selected=3,
        local_window=3,
        compression=LearnedMLP(head_dim=6, hidden=8, length=2, stride=1),
        initial_blocks=1,
        local_blocks=2,
        shared_kv=False,
        bias=True,
    ),
    "moba": MoBA(**HEADS, block_size=2, top_k=2, sinks=True),
    "mla": MLA(
        dim=DIM, num_heads=4, kv_rank=8, q_rank=14, nope_dim=6, rope_dim=2, value_dim=10, bias=True
    ),
    "shared_kv": SharedKV(
        source=Attention(**HEADS),
        norm=NORM,
        blocks=Chain(
            layers=(Block(mixer=SharedAttention(**HEADS), ffn=POLY_NORM_MLP, norm=NORM),) * 2
        ),
    ),
    "dsa": DSA(
        dim=DIM,
        num_heads=4,
        kv_rank=8,
        q_rank=14,
        nope_dim=6,
        rope_dim=2,
        value_dim=10,
        top_k=3,
        index_heads=2,
        index_dim=4,
    ),
    "causal_conv": CausalConv(dim=DIM, kernel=3),
    "mamba": Mamba(dim=DIM, inner=16, state=6, dt_rank=2, bias=True, chunk=2),
    "mamba2": Mamba2(
        dim=DIM, num_heads=4, head_dim=6, state=8, groups=2, mlp=10, bias=True, chunk=3
    ),
    "performer": Performer(dim=DIM, num_heads=4, head_dim=6, num_features=14, chunk=2),
    "gated_linear_attention": GatedLinearAttention(
        dim=DIM, num_heads=4, key_dim=6, value_dim=10, rank=3, chunk=4
    ),
    "gated_delta_net": GatedDeltaNet(
        dim=DIM, num_heads=4, num_key_heads=2, key_dim=6, value_dim=10, kernel=3, chunk=8
    ),
    "pkm": PKM(**PRODUCT_KEYS),
    "memory_plus": MemoryPlus(**PRODUCT_KEYS),
    "peer": PEER(**PRODUCT_KEYS),
    "ultramem": UltraMem(
        dim=DIM,
        key_dim=8,
        top_k=3,
        num_heads=2,
        expand=4,
        table=MemoryTable(rows=9, dim=14, slices=2, reads=6),
    ),
    "ultramem_v2": UltraMemV2(
        dim=DIM,
        key_dim=8,
        top_k=3,
        num_layers=5,
        share_ratio=0.5,
        pre_activation=Gelu(),
        table=MemoryTable(rows=45, dim=14, pre_dim=10, slices=2, reads=3),
    ),
    "parallel": Parallel(layers=(SWIGLU, PKM(**PRODUCT_KEYS))),
    "block": CHAIN.layers[0],
    "chain": Chain(layers=(CHAIN.layers[2], CHAIN.layers[0])),
    "repeat": REPEAT,
    "decoder": DECODER,
    "tied_decoder": TIED,
    "decoder_with_engram": dataclasses.replace(
        DECODER,
        blocks=Repeat(
            block=Block(
                mixer=Engram(
                    dim=DIM, mixer=Attention(**HEADS), rows=9, max_n=3, num_heads=2, head_dim=8
                ),
                ffn=SWIGLU,
                norm=NORM,
            ),
            n=1,
        ),
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def draw(declared: Any) -> Any:
    """Parameters away from their initial zeros and ones."""
    rng = np.random.default_rng(0)

    def one(p: Param) -> jax.Array:
        fan_in = p.shape[p.batch_ndim] if p.inputs else 1
        scale, mean = (0.3, 0.5) if p.inputs is None else (fan_in**-0.5, 0.0)
        return jnp.asarray(rng.normal(mean, scale, p.shape), p.dtype)

    return map_params(one, declared)


def inputs(pure: Layer) -> jax.Array:
    rng = np.random.default_rng(1)
    if isinstance(pure, Embedding | Decoder):
        return jnp.asarray(rng.integers(VOCAB, size=(BATCH, LENGTH)))
    return jnp.asarray(rng.normal(size=(BATCH, LENGTH, DIM)), jnp.float32)


def output(result: Any) -> jax.Array:
    """The array among what the roles return."""
    first = result[0] if isinstance(result, tuple) else result
    return first.weights if isinstance(first, Routing) else first


def close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    def one(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(initial=1e-30))

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(one, actual, jax.tree.map(np.asarray, expected))


@cache
def compiled(pure: Layer) -> tuple[Callable, Callable]:
    """(apply -> y, gradients of sum(y * cotangent) by parameters), compiled once for all tests."""

    def value(params: Any, x: jax.Array) -> jax.Array:
        return output(pure.apply(params, x))

    def loss(params: Any, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return (value(params, x) * cotangent).sum()

    def gradient(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        grads = jax.grad(loss, allow_int=True)(params, x, cotangent)
        is_state = jax.dtypes.float0  # of integers
        return jax.tree.map(
            lambda p, g: jnp.zeros_like(p) if g.dtype == is_state else g, params, grads
        )

    return jax.jit(value), jax.jit(gradient)


def cotangent(y: jax.Array) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=y.shape), jnp.float32)


# --- what exists ----------------------------------------------------------------------------------


def all_layer_classes() -> set[type]:
    for package in (bestiary.layers, bestiary.zoo):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)

    def below(cls: type) -> set[type]:
        return {cls}.union(*(below(c) for c in cls.__subclasses__()))

    # a class without an apply of its own holds parameters for others
    applied = {c for c in below(Layer) if c.apply is not Layer.apply}
    packages, bases = ("bestiary.layers.", "bestiary.zoo."), {BlockChoice, Selectable}
    return {c for c in applied - bases if c.__module__.startswith(packages)}


def test_the_table_covers_every_layer_class() -> None:
    # which give them more than one array
    in_models = {DIN, MTP, Engram, LocalActivationUnit, SharedAttention, SumPooling}
    missing = all_layer_classes() - {type(pure) for pure in LAYERS.values()} - in_models
    images = ("bestiary.zoo.vit", "bestiary.zoo.convnet")  # see test_vit.py
    missing = {c for c in missing if c.__module__ not in images}
    assert not missing, f"add instances to LAYERS: {sorted(c.__name__ for c in missing)}"


def test_every_public_layer_is_exported() -> None:
    own = {c.__name__ for c in all_layer_classes() if c.__module__.startswith("bestiary.layers.")}
    assert own <= set(bestiary.layers.__all__)


def test_importing_layers_imports_jax_and_numpy_only() -> None:
    code = """
import sys, time, jax, numpy
before, start = set(sys.modules), time.perf_counter()
import bestiary.layers
print(time.perf_counter() - start, *{m.split(".")[0] for m in set(sys.modules) - before})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *packages = run.stdout.split()
    assert set(packages) <= {"bestiary", "jax"}
    assert float(seconds) < 1.0, "beyond importing jax; 0.04 s on an idle core"


# --- declaration ----------------------------------------------------------------------------------


@every_layer
def test_declaration_init_and_count_agree(name: str) -> None:
    pure = LAYERS[name]
    declared = params_of(pure.declare())
    params, shapes = pure.init(jax.random.key(0)), pure.abstract()
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for p, value, shape in zip(
        declared, jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True
    ):
        assert p.shape == value.shape == shape.shape
        assert p.dtype == value.dtype == shape.dtype
        assert set(p.axes) - {None} <= set(AXES)
        assert np.isfinite(value).all()
    count = pure.count()
    assert count.total == sum(x.size for x in jax.tree.leaves(params))
    assert 0 <= count.active <= count.total
    assert hash(pure) == hash(dataclasses.replace(pure))
    assert pure == dataclasses.replace(pure)


def test_active_parameters() -> None:
    r, k = SPARK_FFN.predictor_dim, SPARK_FFN.top_k
    assert SPARK_FFN.count() == Count(2 * DIM * HIDDEN, r * HIDDEN + (DIM - r) * k + k * DIM)


def test_matrices_start_at_unit_gain_and_zero_gain_at_zero() -> None:
    matrix = weight((400, 30), ("embed", "mlp")).init(jax.random.key(0), (400, 30), jnp.float32)
    assert matrix.std() == pytest.approx(400**-0.5, rel=0.03)
    for pure in (POLY_NORM_MLP, SWIGLU, SPARK_FFN, ATTENTION):
        silent = dataclasses.replace(pure, out_gain=0.0)
        y, *_ = silent.apply(silent.init(jax.random.key(0)), inputs(pure))
        assert not y.any()


@pytest.mark.parametrize(
    "small, large",
    [
        (Attention(**HEADS), ATTENTION),
        (LAYERS["layer_norm_no_bias"], LAYERS["layer_norm"]),
        (Linear(inputs=DIM, outputs=7), LAYERS["linear"]),
        (TIED, DECODER),
    ],
)
def test_a_new_parameter_reseeds_no_other(small: Layer, large: Layer) -> None:
    few, many = (dict(flatten(pure.init(jax.random.key(5)))) for pure in (small, large))
    assert few.keys() < many.keys()
    for path, value in few.items():
        np.testing.assert_array_equal(value, many[path])


def test_no_two_parameters_are_drawn_alike() -> None:
    params = REPEAT.init(jax.random.key(0))
    gate, up = (params["3"]["ffn"][n] for n in ("gate", "up"))
    assert (gate != up).any() and (gate[0] != gate[1]).any()
    assert (params["2"]["mixer"]["query"] != params["3"]["mixer"]["query"]).any()


# --- values and gradients -------------------------------------------------------------------------


@every_layer
def test_jit_equals_eager(name: str) -> None:
    pure = LAYERS[name]
    params, x = draw(pure.declare()), inputs(pure)
    close(compiled(pure)[0](params, x), output(pure.apply(params, x)))


@every_layer
def test_gradients_equal_finite_differences(name: str) -> None:
    """Along a random direction of all trained parameters, and none is without gradient."""
    pure = LAYERS[name]
    declared = pure.declare()
    params, x = draw(declared), inputs(pure)
    apply, gradient = compiled(pure)
    ct = cotangent(apply(params, x))
    grads = gradient(params, x, ct)
    # DSA's indexer learns from a loss of its own
    trained = {path: p.trainable and "indexer/" not in path for path, p in flatten(declared)}
    for path, g in flatten(grads):
        assert np.any(g) or not trained[path], f"{path} gets no gradient"
    if not jax.tree.leaves(params):
        return
    rng, eps = np.random.default_rng(3), 1e-4  # small: thresholds must not be crossed
    direction = map_params(
        lambda p: p.trainable * rng.normal(size=p.shape).astype(np.float32), declared
    )

    def along(step: float) -> float:
        moved = jax.tree.map(lambda p, d: (p + step * d).astype(p.dtype), params, direction)
        return float(np.sum(np.asarray(apply(moved, x), np.float64) * np.asarray(ct, np.float64)))

    slope = (along(eps) - along(-eps)) / (2 * eps)
    parts = jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), grads, direction)
    scale = np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(grads)))
    assert slope == pytest.approx(sum(jax.tree.leaves(parts)), abs=1e-2 * scale)


@every_layer
def test_a_layer_keeps_the_type_of_its_input(name: str) -> None:
    pure = LAYERS[name]
    if isinstance(pure, Embedding | Decoder | Router):  # a router's weights are float32
        return
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, DIM), jnp.bfloat16)
    assert output(jax.eval_shape(pure.apply, pure.abstract(), x)).dtype == jnp.bfloat16


@pytest.mark.parametrize("model", [DECODER, TIED], ids=["untied", "tied"])
def test_bfloat16(model: Decoder) -> None:
    narrow = dataclasses.replace(model, precision=Precision(params="bfloat16", compute="bfloat16"))
    assert {p.dtype for p in params_of(narrow.declare())} == {jnp.dtype(jnp.bfloat16)}
    assert narrow.cost(LENGTH).bytes == model.cost(LENGTH).bytes / 2
    tokens = inputs(model)
    x, _, aux = jax.eval_shape(narrow.hidden, narrow.abstract(), tokens)
    assert x.dtype == jnp.bfloat16
    assert {m.dtype for m in jax.tree.leaves(aux)} == {jnp.dtype(jnp.float32)}
    params = draw(model.declare())
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x = jnp.ones((2, 3, DIM), jnp.bfloat16)
    wide, x32 = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    # products of narrow operands are summed in float32: no rounding but that of the operands
    close(jax.jit(narrow.logits)(params, x), jax.jit(model.logits)(wide, x32))


# --- depth ----------------------------------------------------------------------------------------


@cache
def by_loop() -> tuple[Any, Any, Any]:
    """(y, Aux, gradients) of REPEAT by a Python loop over its layers."""

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            y, auxes = x, []
            for i in range(REPEAT.n):
                constants = {name: jnp.float32(values[i]) for name, values in REPEAT.constants}
                mine = jax.tree.map(lambda p, i=i: p[i], params)
                y, _, aux = CHAIN.apply(mine, y, Context(layer=constants))
                auxes.append(aux)
            return (y * cotangent(y)).sum(), (y, jax.tree.map(lambda *a: jnp.stack(a), *auxes))

        grads, (y, aux) = jax.grad(loss, has_aux=True)(params)
        return y, aux, grads

    return run(draw(REPEAT.declare()), inputs(REPEAT))


@pytest.mark.parametrize(
    "options",
    [*({"remat": remat} for remat in get_args(Remat)), {"remat": "full", "unroll": 2}],
    ids=str,
)
def test_repeat_equals_a_loop(options: dict) -> None:
    repeat = dataclasses.replace(REPEAT, **options)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            y, _, aux = repeat.apply(params, x)
            return (y * cotangent(y)).sum(), (y, aux)

        grads, (y, aux) = jax.grad(loss, has_aux=True)(params)
        return y, aux, grads

    y, aux, grads = run(draw(REPEAT.declare()), inputs(REPEAT))
    close((y, aux.metrics, grads), (by_loop()[0], by_loop()[1].metrics, by_loop()[2]), 2e-5)
    for path, g in flatten(grads):
        assert isinstance(g, dict) or np.all(np.any(g, axis=tuple(range(1, g.ndim)))), path
    nonzero = aux.metrics["3"]["ffn"]["nonzero"]
    assert nonzero.shape == (2,) and nonzero[1] < nonzero[0], "sparsity rises by layer"


@layer
class Told(Layer):
    """A feed-forward that says a loss, a metric, a next state, its constants and its key."""

    def spec(self) -> Any:
        return {"gain": Param((), ()), "seen": Param((), (), trainable=False)}

    def apply(
        self, params: Any, x: jax.Array, ctx: Any = None, cache: Any = None
    ) -> tuple[jax.Array, Any, Aux]:
        noise = jax.random.normal(ctx.key) if ctx.key is not None else jnp.zeros(())
        metrics = {"noise": noise} | {k: jnp.float32(v) for k, v in ctx.layer.items()}
        aux = Aux({"balance": jnp.float32(2.0)}, metrics, {"seen": params["seen"] + 1})
        return x * (1 + params["gain"]), cache, aux


def test_aux_sums_losses_and_keeps_the_rest() -> None:
    inner = Repeat(block=Chain(layers=(Told(), Told())), n=3, constants=(("a", (1, 2, 3)),))
    outer = Repeat(block=inner, n=2, constants=(("b", (5, 7)),))
    params = outer.init(jax.random.key(0))
    _, cache, aux = jax.jit(outer.apply)(params, jnp.ones(4), Context(key=jax.random.key(1)))
    assert cache is None
    assert aux.losses == {"balance": 2.0 * 2 * 3 * 2}
    np.testing.assert_array_equal(aux.metrics["1"]["a"], [[1, 2, 3], [1, 2, 3]])
    np.testing.assert_array_equal(aux.metrics["1"]["b"], [[5, 5, 5], [7, 7, 7]])
    noise = [np.asarray(aux.metrics[i]["noise"]).ravel() for i in "01"]
    assert len(set(np.concatenate(noise).tolist())) == 12, "every layer has a key of its own"
    assert aux.state["0"]["seen"].shape == (2, 3) and (aux.state["0"]["seen"] == 1).all()


# --- sharding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decoder", "tied_decoder", "decoder_with_engram"])
def test_sharded_equals_unsharded(name: str, mesh: jax.sharding.Mesh) -> None:
    model = LAYERS[name]
    params, tokens = draw(model.declare()), inputs(model)
    apply, gradient = compiled(model)
    y = apply(params, tokens)
    ct = cotangent(y)
    grads = gradient(params, tokens, ct)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        shardings = jax.tree.map(lambda s: s.sharding, model.abstract(mesh))
        placed = jax.device_put(params, shardings)
        ids = jax.device_put(tokens, jax.NamedSharding(mesh, pspec("batch", "seq") or P()))
        close(apply(placed, ids), y)
        ours = gradient(placed, ids, ct)
        close(ours, grads, 2e-5)
    query = next(value for path, value in flatten(placed) if path.endswith("mixer/query"))
    assert query.sharding.spec == P(None, "fsdp", "tensor", None)


def test_parameters_are_born_sharded(mesh: jax.sharding.Mesh) -> None:
    with use_rules(DEFAULT_RULES):
        params, shapes = DECODER.init(jax.random.key(0), mesh), DECODER.abstract(mesh)
    for p, abstract in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert p.sharding.is_equivalent_to(abstract.sharding, p.ndim)
    up = params["blocks"]["0"]["ffn"]["up"]
    assert up.sharding.shard_shape(up.shape) == (2, DIM // 2, HIDDEN // 2)
    close(params, DECODER.init(jax.random.key(0)), 1e-6)


def test_rules_are_part_of_the_compilation(mesh: jax.sharding.Mesh) -> None:
    place = jax.jit(lambda x: shard(x, "embed", "mlp"))
    x = jnp.ones((4, 4))
    assert place(x).sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        assert place(x).sharding.is_fully_replicated
        with use_rules({"mlp": "tensor"}):
            assert place(x).sharding.spec == P(None, "tensor")
        with use_rules({"mlp": ("data", "fsdp"), "embed": "fsdp"}):
            assert place(x).sharding.spec == P("fsdp", "data"), "an axis serves one dimension"


def test_unknown_axes_are_refused(mesh: jax.sharding.Mesh) -> None:
    with pytest.raises(ValueError, match="unknown logical axis 'width'; known: batch, seq"):
        shard(jnp.ones(3), "width")
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        use_rules({"width": "tensor"})
    with pytest.raises(ValueError, match="shard: 1 axes .* for an array of shape"):
        shard(jnp.ones((3, 3)), "mlp")
    with jax.set_mesh(mesh), use_rules({"mlp": "model"}):
        with pytest.raises(ValueError, match="rule 'mlp': 'model' is not an axis of the mesh"):
            SWIGLU.abstract(mesh)
    with pytest.raises(ValueError, match="must have equal lengths"):
        Param((2, 3), ("embed",))


# --- the seams ------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """w + a b, the form of LoRA, for matrices and embedding tables."""

    w: jax.Array
    a: jax.Array
    b: jax.Array

    def dense(self) -> jax.Array:
        return self.w + (self.a @ self.b).reshape(self.w.shape)

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, self.dense())

    def take_rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
        return (self.w[ids] + self.a[ids] @ self.b).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """q scale, one scale per row."""

    q: jax.Array
    scale: jax.Array

    def dense(self) -> jax.Array:
        return self.q.astype(jnp.float32) * self.scale

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, self.dense())

    def take_rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
        return (self.q[ids].astype(jnp.float32) * self.scale[ids]).astype(dtype)


def low_rank(w: np.ndarray, p: Param) -> LowRank:
    rng, n = np.random.default_rng(w.size), p.batch_ndim
    rows, columns = w.shape[n], w[(0,) * (n + 1)].size
    a = rng.normal(size=(*w.shape[:n], rows, 2)).astype(np.float32) / 3
    return LowRank(w, a, rng.normal(size=(*w.shape[:n], 2, columns)).astype(np.float32) / 3)


def int8(w: np.ndarray, p: Param) -> Int8:
    scale = np.abs(w).max(tuple(range(p.batch_ndim + 1, w.ndim)), keepdims=True) / 127
    return Int8(np.round(w / scale).astype(np.int8), scale)


@pytest.mark.parametrize("model", [DECODER, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("convert", [low_rank, int8])
def test_leaves_that_serve_themselves(model: Decoder, convert: Callable) -> None:
    """All matrices and the table of a whole model replaced, under scan."""

    def replaced(p: Param, w: jax.Array) -> Any:
        return convert(np.asarray(w), p) if p.inputs or "vocab" in p.axes and w.ndim > 1 else w

    declared, tokens = model.declare(), inputs(model)
    leaves = jax.tree.map(replaced, declared, draw(declared), is_leaf=is_param)

    def merged(x: Any, p: Param) -> jax.Array:
        if not isinstance(x, LowRank | Int8):
            return x
        return jax.vmap(type(x).dense)(x) if p.batch_ndim else x.dense()

    own = (LowRank, Int8)
    dense = jax.tree.map(merged, leaves, declared, is_leaf=lambda x: isinstance(x, own))
    apply, _ = compiled(model)
    close(apply(leaves, tokens), apply(dense, tokens), 1e-4)


def test_the_seams_on_arrays() -> None:
    x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.full((3, 4), 1 / 3)
    assert dot("bi,io->bo", x, w).dtype == jnp.bfloat16
    assert dot("bi,io->bo", x, w, dtype=jnp.float32).dtype == jnp.float32
    rows = take(w, jnp.array([[0, 5, -1]]), jnp.bfloat16)
    assert rows.shape == (1, 3, 4) and rows.dtype == jnp.bfloat16
    assert jnp.isfinite(rows).all(), "ids outside the table take the nearest row"


# --- counts and costs -----------------------------------------------------------------------------


@every_layer
def test_flops_equal_those_of_the_program(name: str) -> None:
    """Exactly: analytic matmul FLOPs are those of the contractions that are traced."""
    pure = LAYERS[name]
    if isinstance(pure, MoE):  # sorted, what a loop computes depends on the routing
        pure = dataclasses.replace(pure, path="masked")
    platform = "tpu" if isinstance(pure, LatentExperts) else "cpu"  # likewise
    traced = jax.jit(pure.apply).trace(pure.abstract(), inputs(pure)).jaxpr
    cost = pure.cost(LENGTH)
    assert cost.flops * BATCH * LENGTH == jaxpr_flops(traced, platform)
    assert cost.active_flops <= cost.flops and cost.active_bytes <= cost.bytes


@pytest.mark.parametrize("model", [llama.llama_tiny(), spark.spark_tiny()], ids=["llama", "spark"])
def test_flops_are_close_to_the_compilers(model: Decoder) -> None:
    """XLA also counts elementwise work, at this width less than a fifth of the whole."""
    model = dataclasses.replace(model, blocks=dataclasses.replace(model.blocks, unroll=4))
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    lowered = jax.jit(lambda p, t: model.apply(p, t)[0]).lower(model.abstract(), tokens)
    counted = lowered.compile().cost_analysis()["flops"]
    assert 1.0 <= counted / (model.cost(32).flops * 64) < 1.2


PUBLISHED = {
    "llama3_8b": (
        llama.llama3_8b,
        8030261248,
        "Llama",
        {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256},
    ),
    "llama3_2_1b": (
        llama.llama3_2_1b,
        1235814400,
        "Llama",
        {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256}
        | {"tie_word_embeddings": True},
    ),
    "llama3_2_3b": (
        llama.llama3_2_3b,
        3212749824,
        "Llama",
        {"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8}
        | {"hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 128256}
        | {"tie_word_embeddings": True},
    ),
    "llama2_7b": (
        llama.llama2_7b,
        6738415616,
        "Llama",
        {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000},
    ),
    "gemma2_2b": (
        gemma2.gemma2_2b,
        2614341888,
        "Gemma2",
        {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
        | {"hidden_size": 2304, "intermediate_size": 9216, "vocab_size": 256000}
        | {"head_dim": 256},
    ),
    "gemma2_9b": (
        gemma2.gemma2_9b,
        9241705984,
        "Gemma2",
        {"num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"hidden_size": 3584, "intermediate_size": 14336, "vocab_size": 256000}
        | {"head_dim": 256},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    build, published, family, config = PUBLISHED[name]
    model = build()
    assert model.count() == Count(published, published)
    transformers, torch = (pytest.importorskip(m) for m in ("transformers", "torch"))
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(
            getattr(transformers, f"{family}Config")(**config)
        )
    assert model.count().total == sum(p.numel() for p in theirs.parameters())


def test_spark_and_polycom_have_the_size_of_what_they_replace() -> None:
    def total(model: Decoder) -> int:
        return model.count().total

    assert total(spark.spark_gemma2_2b()) == pytest.approx(total(gemma2.gemma2_2b()), rel=1e-3)
    assert total(polycom.polycom_1b_dense()) == pytest.approx(
        total(llama.llama_1b_24x2048()), rel=1e-3
    )
    for model in (spark.spark_tiny(), polycom.polycom_tiny()):
        assert total(model) == pytest.approx(total(llama.llama_tiny()), rel=0.02)
    ffn = spark.spark_gemma2_2b().blocks.block.layers[0].ffn
    assert ffn.top_k / ffn.hidden == pytest.approx(0.08, abs=1e-3)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Linear(inputs=0, outputs=3), "inputs: 0; need at least 1"),
        (lambda: Linear(inputs=3, outputs=-1), "outputs: -1; need at least 1"),
        (lambda: Embedding(vocab_size=0, dim=3), "vocab_size: 0; need at least 1"),
        (lambda: RMSNorm(dim=0), "dim: 0; need at least 1"),
        (lambda: LayerNorm(dim=-2), "dim: -2; need at least 1"),
        (lambda: PolyNorm(order=0), "order: 0; need at least 1"),
        (lambda: PolyReLU(order=-3), "order: -3; need at least 1"),
        (lambda: MLP(dim=4, hidden=0, activation=Relu()), "hidden: 0; need at least 1"),
        (lambda: GLU(dim=0, hidden=4, activation=Relu()), "dim: 0; need at least 1"),
        (lambda: dataclasses.replace(SPARK_FFN, predictor_dim=12), "predictor_dim: 12; need 1 to"),
        (lambda: dataclasses.replace(SPARK_FFN, top_k=21), "top_k: 21; need 1 to hidden 20"),
        (lambda: dataclasses.replace(GAUSSIAN_GLU, sparsity=1.0), "sparsity: 1.0; need 0 <= "),
        (lambda: Repeat(block=CHAIN, n=0), "n: 0; need at least 1"),
        (lambda: Repeat(block=CHAIN, n=2, unroll=0), "unroll: 0; need at least 1"),
        (lambda: Repeat(block=CHAIN, n=2, remat="some"), "remat: 'some'; need one of none, full"),
        (lambda: dataclasses.replace(REPEAT, n=3), r"constants\['sparsity'\]: 2 values for 3"),
        (
            lambda: gemma2.gemma2(vocab_size=9, num_layers=3, attention=ATTENTION, ffn=SWIGLU),
            "num_layers: 3; windows alternate, need an even number",
        ),
    ],
)
def test_impossible_sizes_are_refused(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
