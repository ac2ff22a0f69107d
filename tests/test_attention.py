"""Attention: a float64 oracle, decoding equal to the full forward, windows, packing, causality."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close

from bestiary.layers import Attention, Context, Layer, Param, RMSNorm, Rope, SparkAttention
from bestiary.layers import rope as scalings
from bestiary.layers.base import map_params
from bestiary.zoo import gemma2, llama, spark
from bestiary.zoo.decoder import Decoder

BATCH, LENGTH, PROMPT = 3, 12, 7
BASE = {"dim": 20, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
NORM = RMSNorm(dim=8)
YARN = scalings.Yarn(factor=4.0, original_length=32)
LLAMA3 = scalings.Llama3(factor=8.0, original_length=64)
SPARK = {"predictor_dim": 4, "top_k": 3}


def make(**options: Any) -> Attention:
    cls = SparkAttention if "top_k" in options else Attention
    return cls(**(BASE | options))


OPTIONS = {
    "multi_head": make(num_kv_heads=4),
    "grouped": make(),
    "multi_query": make(num_kv_heads=1),
    "qk_norm": make(query_norm=NORM, key_norm=NORM),
    "softcap": make(softcap=1.5),
    "scale": make(scale=0.9),
    "window_1": make(window=1),
    "window_below_prompt": make(window=4),
    "window_above_prompt": make(window=9),
    "window_above_length": make(window=40),
    "sinks": make(sinks=True),
    "biases": make(bias=True, out_bias=True),
    "no_rope": make(rope=None),
    "interleaved": make(rope=Rope(interleaved=True)),
    "partial": make(rope=Rope(fraction=0.5)),
    "linear": make(rope=Rope(scaling=scalings.Linear(factor=4.0))),
    "yarn": make(rope=Rope(theta=500.0, scaling=YARN)),
    "llama3": make(rope=Rope(theta=500.0, scaling=LLAMA3)),
    "all": make(
        query_norm=NORM,
        key_norm=NORM,
        softcap=3.0,
        scale=0.9,
        window=5,
        sinks=True,
        rope=Rope(fraction=0.5, interleaved=True, scaling=YARN),
    ),
    "spark": make(**SPARK),
    "spark_multi_query": make(num_kv_heads=1, **SPARK),
    "spark_window": make(window=5, **SPARK),
    "spark_population": make(ddof=0, predictor_scale=0.9, value_scale=0.7, **SPARK),
    "spark_partial": make(rope=Rope(fraction=0.5, interleaved=True), **SPARK),
    "spark_qk_norm": make(query_norm=NORM, key_norm=NORM, **SPARK),
}
every_option = pytest.mark.parametrize("name", OPTIONS)


def draw(layer: Layer) -> Any:
    """Parameters away from their initial zeros and ones."""
    rng = np.random.default_rng(0)

    def one(p: Param) -> jax.Array:
        scale, mean = (0.3, 1.0) if p.inputs is None else (p.shape[0] ** -0.5, 0.0)
        return jnp.asarray(rng.normal(mean, scale, p.shape), jnp.float32)

    return map_params(one, layer.declare())


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(BATCH, LENGTH, BASE["dim"])).astype(np.float32)


@cache
def forward(name: str) -> Callable:
    """The full forward of an option, compiled once for all tests: (params, x) -> y."""
    return jax.jit(lambda params, x: OPTIONS[name].apply(params, x)[0])


# --- an oracle in float64 -------------------------------------------------------------------------


def oracle(layer: Attention, params: Any, x: np.ndarray) -> np.ndarray:
    """Attention query by query, in the order of the formulas."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = np.asarray(x, np.float64)
    q, k, v = (np.einsum("bsd,dnh->bnsh", x, params[n]) for n in ("query", "key", "value"))
    if layer.bias:
        biases = (params[f"{n}_bias"][:, None] for n in ("query", "key", "value"))
        q, k, v = (a + b for a, b in zip((q, k, v), biases, strict=True))
    if layer.query_norm:
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * params["query_norm"]["weight"]
        k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * params["key_norm"]["weight"]
    k, v = (np.repeat(a, layer.num_heads // layer.num_kv_heads, 1) for a in (k, v))
    y = np.zeros_like(q)
    for b, h, t in np.ndindex(q.shape[:3]):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        keys = np.arange(first, t + 1)
        weights = spark_weights if isinstance(layer, SparkAttention) else softmax
        y[b, h, t] = weights(layer, params, h, q[b, h], k[b, h], t, keys) @ v[b, h, keys]
    return np.einsum("bnsh,nhd->bsd", y, params["out"]) + params.get("out_bias", 0)


def turn(rope: Rope | None, x: np.ndarray, position: int | np.ndarray) -> np.ndarray:
    """Rotation as a product of complex numbers: [..., head] at `position` [...]."""
    if rope is None:
        return x
    frequencies = rope.frequencies(x.shape[-1])
    half, n = len(frequencies), 2 * len(frequencies)
    real = np.s_[..., 0:n:2] if rope.interleaved else np.s_[..., :half]
    imaginary = np.s_[..., 1:n:2] if rope.interleaved else np.s_[..., half:n]
    factor = rope.scaling.attention_factor if rope.scaling else 1.0
    z = (x[real] + 1j * x[imaginary]) * factor
    z = z * np.exp(1j * np.multiply.outer(position, frequencies))
    y = x.copy()
    y[real], y[imaginary] = z.real, z.imag
    return y


def softmax(layer: Attention, params: Any, h: int, q: Any, k: Any, t: int, keys: Any) -> Any:
    s = turn(layer.rope, k[keys], keys) @ turn(layer.rope, q[t], t)
    s = s * (layer.head_dim**-0.5 if layer.scale is None else layer.scale)
    s = s if layer.softcap is None else layer.softcap * np.tanh(s / layer.softcap)
    sink = np.exp(params["sinks"][h]) if layer.sinks else 0.0
    return np.exp(s) / (np.exp(s).sum() + sink)


def spark_scores(layer: SparkAttention, q: Any, k: Any, t: int, keys: Any, part: slice) -> Any:
    return turn(layer.rope, k[keys, part], keys) @ turn(layer.rope, q[t, part], t)


def spark_weights(
    layer: SparkAttention, params: Any, h: int, q: Any, k: Any, t: int, keys: Any
) -> Any:
    r, n = layer.predictor_dim, len(keys)
    s1 = spark_scores(layer, q, k, t, keys, slice(r)) * (layer.predictor_scale or r**-0.5)
    rest = layer.head_dim - r
    s2 = spark_scores(layer, q, k, t, keys, slice(r, None)) * (layer.value_scale or rest**-0.5)
    kept = np.ones(n, bool)
    if n > layer.top_k:
        theta = s1.mean() + s1.std(ddof=layer.ddof) * NormalDist().inv_cdf(1 - layer.top_k / n)
        kept = (s1 >= theta) | (s1 == s1.max())
    e = np.where(kept, np.exp(s1 - s1.max()), 0)
    return e / e.sum() * np.log1p(np.exp(s2))


@every_option
def test_equals_the_oracle(name: str) -> None:
    layer = OPTIONS[name]
    params, x = draw(layer), inputs()
    close(forward(name)(params, x), oracle(layer, params, x))


# --- rotary positions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (None, {"rope_type": "default"}),
        (scalings.Linear(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            scalings.Yarn(factor=8.0, original_length=512),
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
        ),
        (
            scalings.Yarn(
                factor=4.0, original_length=256, beta_fast=20.0, beta_slow=2.0, mscale=1.1
            ),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 20.0,
                "beta_slow": 2.0,
                "attention_factor": 1.1,
            },
        ),
        (
            scalings.Llama3(factor=32.0, original_length=8192),
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
@pytest.mark.parametrize("theta, head_dim", [(10000.0, 64), (500000.0, 128)])
@pytest.mark.filterwarnings("ignore")
def test_frequencies_equal_those_of_transformers(
    ours: Any, theirs: dict, theta: float, head_dim: int
) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=int(theirs.get("original_max_position_embeddings", 2048) * 8),
        rope_parameters=theirs | {"rope_theta": theta},
    )
    if ours is None:
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = utils.ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu")
    np.testing.assert_allclose(
        Rope(theta=theta, scaling=ours).frequencies(head_dim), expected.numpy(), rtol=2e-6
    )
    assert (ours.attention_factor if ours else 1.0) == pytest.approx(factor)


@pytest.mark.parametrize("interleaved", [False, True])
def test_only_distances_matter(interleaved: bool) -> None:
    rope = Rope(interleaved=interleaved, scaling=YARN)
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 5, 3, 8)), jnp.float32)
    positions = jnp.arange(5)[None]

    def scores(offset: int) -> jax.Array:
        turned = rope.apply(q, positions + offset), rope.apply(k, positions + offset)
        return jnp.einsum("bsnh,btnh->bnst", *turned)

    close(scores(300), scores(0), 1e-4)


# --- decoding -------------------------------------------------------------------------------------


def stepwise(
    step: Callable, cache: Any, inputs: Any, chunks: Sequence[int], singles: int
) -> jax.Array:
    """Outputs of successive calls on one cache, side by side: `chunks`, then `singles` scanned.

    step(cache, inputs) -> (output, cache); the inputs' leaves are [batch, length, ...].
    """
    outputs, start = [], 0
    for size in chunks:
        y, cache = step(cache, jax.tree.map(lambda a, i=start, n=size: a[:, i : i + n], inputs))
        outputs.append(y)
        start += size
    rest = jax.tree.map(lambda a: a[:, start : start + singles].swapaxes(0, 1)[:, :, None], inputs)

    def one(cache: Any, inputs: Any) -> tuple[Any, jax.Array]:
        y, cache = step(cache, inputs)
        return cache, y[:, 0]

    _, ys = jax.lax.scan(one, cache, rest)
    return jnp.concatenate([*outputs, ys.swapaxes(0, 1)], 1)


# Where the tokens of four rows stand: whole and packed ones, padded on the left and on the right.
POSITIONS = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [-1, -1, -1, -1, -1, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, -1, -1, 3, 4, -1, 5, 6, 7, 8],
    ]
)
SEGMENTS = np.where(np.arange(4)[:, None] == 1, POSITIONS // 5, 0)


@every_option
def test_decoding_equals_the_full_forward(name: str) -> None:
    layer = OPTIONS[name]
    params = draw(layer)
    rows = np.random.default_rng(2).normal(size=(*POSITIONS.shape, layer.dim)).astype(np.float32)
    padded = np.take_along_axis(rows, np.maximum(POSITIONS, 0)[..., None], 1)
    whole = Context(segment_ids=jnp.asarray(np.where(np.arange(4)[:, None] == 1, SEGMENTS[1], 0)))

    def step(cache: Any, inputs: tuple) -> tuple[jax.Array, Any]:
        x, positions, segments = inputs
        ctx = Context(positions=positions, segment_ids=segments)
        y, cache, _ = layer.apply(params, x, ctx, cache)
        return y, cache

    @jax.jit
    def run() -> tuple[jax.Array, jax.Array]:
        fed = jax.tree.map(jnp.asarray, (padded, POSITIONS, SEGMENTS))
        steps = stepwise(step, layer.init_cache(4, LENGTH), fed, chunks=(5, 3), singles=4)
        return layer.apply(params, rows, whole)[0], steps

    full, steps = run()
    assert np.isfinite(steps).all()
    for row, positions in enumerate(POSITIONS):
        real = positions >= 0
        close(steps[row, real], full[row, positions[real]])


def test_a_windowed_cache_holds_no_more_than_the_window() -> None:
    shape = make(window=4).init_cache(BATCH, 100)["k"].shape
    assert shape == (BATCH, 4, BASE["num_kv_heads"], BASE["head_dim"])


DECODERS = {
    "llama": llama.llama(
        vocab_size=31, num_layers=3, attention=make(), ffn=llama.swiglu(20, 28), tied=True
    ),
    "gemma2": gemma2.gemma2(
        vocab_size=31,
        num_layers=4,
        attention=make(softcap=5.0),
        ffn=gemma2.geglu(20, 28),
        window=4,
    ),
    "spark": gemma2.gemma2(
        vocab_size=31,
        num_layers=4,
        attention=make(**SPARK),
        ffn=spark.SparkFFN(dim=20, hidden=28, predictor_dim=9, top_k=5),
        window=5,
    ),
}
every_decoder = pytest.mark.parametrize("model", DECODERS.values(), ids=DECODERS)


@every_decoder
def test_a_decoder_counts_its_own_positions(model: Decoder) -> None:
    params = draw(model)
    tokens = jnp.asarray(np.random.default_rng(3).integers(31, size=(BATCH, LENGTH)))

    def step(cache: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
        z, cache, _ = model.apply(params, inputs, cache=cache)
        return z, cache

    @jax.jit
    def run() -> tuple[jax.Array, jax.Array]:
        cache = model.init_cache(BATCH, LENGTH)
        steps = stepwise(step, cache, tokens, chunks=(PROMPT, 2), singles=3)
        return model.apply(params, tokens)[0], steps

    full, steps = run()
    close(steps, full, 1e-4)


# --- who sees whom --------------------------------------------------------------------------------


def influence(layer: Attention, ctx: Context) -> np.ndarray:
    """Bool [LENGTH, LENGTH]: whether output t has a gradient by input s."""
    params, x = draw(layer), inputs()[:1]

    @jax.jit
    def jacobian(x: jax.Array) -> jax.Array:
        return jax.jacobian(lambda x: layer.apply(params, x, ctx)[0][0].sum(-1))(x)[:, 0]

    return np.abs(jacobian(x)).max(-1) > 0


@pytest.mark.parametrize("window", [1, 2, 5, LENGTH, None])
def test_a_window_keeps_exactly_that_many_keys(window: int | None) -> None:
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    expected = (distance >= 0) & (distance < (window or LENGTH))
    np.testing.assert_array_equal(influence(make(window=window), Context()), expected)


@every_option
def test_the_future_does_not_matter(name: str) -> None:
    layer = OPTIONS[name]
    params, before = draw(layer), inputs()
    after = before.copy()
    after[:, PROMPT:] += 3
    before, after = forward(name)(params, before), forward(name)(params, after)
    np.testing.assert_array_equal(before[:, :PROMPT], after[:, :PROMPT])
    assert (before[:, PROMPT:] != after[:, PROMPT:]).any()


DOCUMENTS = [5, 4, 3]
STARTS = np.cumsum([0, *DOCUMENTS])


def packing() -> Context:
    """One row of three documents, positions restarting in each."""
    positions = np.concatenate([np.arange(n) for n in DOCUMENTS])
    segments = np.repeat([1, 2, 3], DOCUMENTS)
    return Context(positions=jnp.asarray(positions)[None], segment_ids=jnp.asarray(segments)[None])


@every_option
def test_packed_documents_are_alone(name: str) -> None:
    layer = OPTIONS[name]
    params, x = draw(layer), inputs()[:1]
    middle = np.s_[:, STARTS[1] : STARTS[2]]

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        packed, pull = jax.vjp(lambda x: layer.apply(params, x, packing())[0], x)
        return packed, pull(jnp.zeros_like(packed).at[middle].set(1.0))[0]

    packed, gradient = run(x)
    alone = [oracle(layer, params, x[:, a:b]) for a, b in zip(STARTS, STARTS[1:], strict=False)]
    close(packed, np.concatenate(alone, 1))
    outside = np.ones(LENGTH, bool)
    outside[STARTS[1] : STARTS[2]] = False
    assert not gradient[:, outside].any()
    assert gradient[middle].any()
    x[middle] += 3
    np.testing.assert_array_equal(run(x)[0][:, outside], packed[:, outside])


@every_decoder
def test_packed_documents_teach_alone(model: Decoder) -> None:
    """Logits and parameter gradients of one document do not depend on its neighbours."""
    params = draw(model)
    tokens = jnp.asarray(np.random.default_rng(3).integers(31, size=(1, LENGTH)))

    @jax.jit
    def gradient(tokens: jax.Array) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            z = model.apply(params, tokens, packing())[0][:, : DOCUMENTS[0]]
            return jnp.square(z).sum(), z

        grads, z = jax.grad(loss, has_aux=True)(params)
        return z, grads

    before = gradient(tokens)
    after = gradient(tokens.at[:, DOCUMENTS[0] :].set(7))
    np.testing.assert_array_equal(before[0], after[0])
    # the embedding rows of the neighbours' tokens get zeros whoever they are
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads 4"),
        ({"num_kv_heads": 0}, "num_kv_heads: 0; need at least 1"),
        ({"window": 0}, "window: 0; need at least 1"),
        (SPARK | {"predictor_dim": 8}, "predictor_dim: 8; need 1 to 7"),
        (SPARK | {"predictor_dim": 0}, "predictor_dim: 0; need 1 to 7"),
        (SPARK | {"top_k": 0}, "top_k: 0; need at least 1"),
        (SPARK | {"softcap": 5.0}, "softcap: 5.0"),
        (SPARK | {"scale": 5.0}, "scale: 5.0"),
        (SPARK | {"sinks": True}, "sinks: True"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("fraction", [0.0, 1.1, -0.5])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction: {fraction}"):
        Rope(fraction=fraction)


def test_an_odd_rotation_is_refused_when_the_layer_is_made() -> None:
    with pytest.raises(
        ValueError, match="fraction: rotates 3 of 8 channels; need an even number > 0"
    ):
        make(rope=Rope(fraction=0.4))


def test_the_window_is_the_only_difference_between_alternating_layers() -> None:
    local, full = DECODERS["gemma2"].blocks.block.layers
    assert local == replace(full, mixer=replace(full.mixer, window=4))
