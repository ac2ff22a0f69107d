"""Attention over chosen blocks: places, choices, the linear path, and what NSA and MoBA share."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.extend import core

from bestiary.eval.hlo import jaxpr_flops
from bestiary.kernels.block_attention import (
    Blocks,
    api,
    block_attention,
    blocked,
    choosable_blocks,
    choose,
    complete_blocks,
    find_places,
    reference,
)
from bestiary.kernels.block_attention import blocks as blocks_module
from bestiary.layers import (
    DEFAULT_RULES,
    KIVI,
    NSA,
    Attention,
    CachePolicy,
    Context,
    Full,
    LearnedMLP,
    MoBA,
    Param,
    Precision,
    RMSNorm,
    pspec,
    use_rules,
)
from bestiary.layers.base import map_params, params_of
from bestiary.zoo import llama

BATCH, LENGTH, PROMPT, DIM = 3, 23, 14, 20
BASE = {"dim": DIM, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
NORM = RMSNorm(dim=8)
MLP = LearnedMLP(head_dim=8, hidden=12, length=4, stride=2)

MIXERS: dict[str, Attention] = {
    "nsa": NSA(**BASE, block_size=4, num_selected=2, local_window=3),
    "nsa_of_the_paper": NSA(
        **BASE,
        block_size=4,
        num_selected=3,
        local_window=3,
        compression=MLP,
        initial_blocks=1,
        local_blocks=2,
        shared_kv=False,
        query_norm=NORM,
        key_norm=NORM,
        bias=True,
    ),
    "nsa_without_window": NSA(
        **(BASE | {"num_kv_heads": 1}),
        block_size=3,
        num_selected=3,
        local_window=0,
        softcap=3.0,
        scale=0.9,
    ),
    "moba": MoBA(**BASE, block_size=4, top_k=2),
    "moba_with_options": MoBA(
        **(BASE | {"num_kv_heads": 1}),
        block_size=3,
        top_k=4,
        softcap=3.0,
        scale=0.9,
        sinks=True,
        bias=True,
        query_norm=NORM,
        key_norm=NORM,
        rope=None,
    ),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)
mixers_with_options = pytest.mark.parametrize("name", ["nsa_of_the_paper", "moba_with_options"])


@pytest.fixture(params=["dense", "linear"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing, which choose by length, at the same small length."""
    monkeypatch.setattr(api, "is_blocked", lambda *_: request.param == "linear")
    if request.param == "linear":
        monkeypatch.setattr(blocks_module, "QUERIES", 5)
    return request.param


def draw(layer: Any) -> Any:
    """Parameters away from their initial zeros and ones."""
    rng = np.random.default_rng(0)

    def one(p: Param) -> jax.Array:
        scale, mean = (0.3, 0.5) if p.inputs is None else (p.shape[0] ** -0.5, 0.0)
        return jnp.asarray(rng.normal(mean, scale, p.shape), p.dtype)

    return map_params(one, layer.declare())


def inputs(batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, LENGTH, DIM)).astype(np.float32)


def close(actual: Any, expected: Any, rtol: float = 2e-5) -> None:
    def one(a: Any, b: Any) -> None:
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(initial=0.1))

    jax.tree.map(one, actual, expected)


documents = st.lists(st.integers(1, LENGTH), min_size=LENGTH, max_size=LENGTH)


def segments_of(lengths: list[int]) -> np.ndarray:
    """Segment ids [LENGTH] of documents of these lengths, as many as fit."""
    return 1 + np.repeat(np.arange(len(lengths)), lengths)[:LENGTH]


# --- blocks and choices ---------------------------------------------------------------------------


@cache
def found(size: int, length: int, stride: int, slots: bool) -> Callable:
    def find(positions: Any, segments: Any, order: Any) -> Any:
        if slots:
            where = positions, positions[:, order], segments, segments[:, order]
        else:
            where = None, None, segments, segments
        places = find_places(LENGTH, *where)
        return places, choosable_blocks(places, size), complete_blocks(places, length, stride)

    return jax.jit(find)


@settings(deadline=None, max_examples=25)
@given(documents, st.randoms(use_true_random=False))
@pytest.mark.parametrize("size, length, stride", [(4, 4, 4), (3, 3, 1), (4, 6, 2), (1, 1, 1)])
@pytest.mark.parametrize("slots", [False, True])
def test_blocks_begin_with_documents(
    size: int, length: int, stride: int, slots: bool, lengths: list[int], random: Any
) -> None:
    segments = segments_of(lengths)
    order = np.array(random.sample(range(LENGTH), LENGTH)) if slots else np.arange(LENGTH)
    positions = np.arange(LENGTH)  # of slots they need not restart
    places, choosable, complete = found(size, length, stride, slots)(
        positions[None], segments[None], order
    )
    starts = np.searchsorted(segments, segments)  # of the token's document
    ends = np.searchsorted(segments, segments, side="right")
    np.testing.assert_array_equal(places.q_place[0], positions - starts)
    np.testing.assert_array_equal(places.place[0], (positions - starts)[order])

    def listed(blocks: Blocks) -> list[int]:
        return [int(i) for i in blocks.start[0] if i < LENGTH]

    def expected(length: int, stride: int, whole: bool) -> list[int]:
        begins = ((positions - starts) % stride == 0) & (
            positions + (length if whole else 1) <= ends
        )
        return positions[begins].tolist()

    assert listed(complete) == expected(length, stride, True)
    assert listed(choosable) == expected(size, size, not slots)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-2, 2), min_size=7, max_size=7), st.integers(0, 127))
def test_of_equal_scores_the_first_are_chosen(scores: list[int], candidates: int) -> None:
    allowed = np.array([candidates >> i & 1 for i in range(7)], bool)
    chosen = choose(jnp.float32(scores)[None, None, None], jnp.asarray(allowed)[None, None], 3)
    best = sorted(np.flatnonzero(allowed), key=lambda i: (-scores[i], i))[:3]
    assert chosen[0, 0, 0].tolist() == best + [-1] * (3 - len(best))


@pytest.mark.parametrize("chosen_heads", [1, 3, 8])
def test_wrong_selecting_heads_are_refused(chosen_heads: int) -> None:
    q, k = jnp.zeros((1, 5, 4, 8)), jnp.zeros((1, 5, 2, 8))
    places = find_places(5)
    chosen = jnp.zeros((1, 5, chosen_heads, 1), jnp.int32)
    with pytest.raises(
        ValueError, match=f"chosen: {chosen_heads} selecting heads; need a multiple"
    ):
        block_attention(q, k, k, places, choosable_blocks(places, 2), chosen, size=2, scale=1.0)


def test_slots_that_differ_by_head_are_refused() -> None:
    positions = jnp.zeros((1, 5), jnp.int32)
    with pytest.raises(ValueError, match="need the same positions in all heads"):
        find_places(5, positions, positions[:, None])


# --- the linear path ------------------------------------------------------------------------------

CASES = {  # size, blocks chosen, heads, selecting heads, key heads, soft-cap, sinks
    "grouped": (4, 2, 4, 2, 2, None, False),
    "by_query_head": (4, 3, 4, 4, 2, 1.5, True),
    "multi_query": (3, 9, 4, 1, 1, None, False),
    "own_block_only": (5, 0, 2, 2, 2, None, True),
    "one_long_block": (30, 2, 2, 2, 1, None, False),
}


@cache
def both(case: str, packed: bool) -> Callable:
    """(operands, segments) -> (value, gradients) by the reference and by the linear path."""
    size, count, _, selecting, _, softcap, _ = CASES[case]

    def run(operands: tuple, cotangent: Any, scores: Any, segments: Any) -> Any:
        where = (None, None, segments, segments) if packed else ()
        places = find_places(LENGTH, *where)
        blocks = choosable_blocks(places, size)
        scores = scores[:, :, :selecting, : blocks.start.shape[1]]
        chosen = choose(scores, blocks_module.earlier(places, blocks, size), count)

        def value(attend: Callable, q: Any, k: Any, v: Any, sinks: Any) -> Any:
            options = {"size": size, "scale": 0.4, "softcap": softcap}
            return attend(q, k, v, places, blocks, chosen, sinks, **options)

        results = []
        for module in (reference, blocked):
            o, pull = jax.vjp(lambda *x, m=module: value(m.block_attention, *x), *operands)
            results.append((o, pull(cotangent)))
        return results

    return jax.jit(run)


@settings(deadline=None, max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(documents, st.integers(0, 2**31))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_linear_path_equals_the_reference(
    case: str, packed: bool, lengths: list[int], seed: int
) -> None:
    _, _, heads, _, kv_heads, _, sinks = CASES[case]
    rng = np.random.default_rng(seed)
    shapes = [(1, LENGTH, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    operands = (*qkv, rng.normal(size=heads).astype(np.float32) if sinks else None)
    scores = rng.integers(3, size=(1, LENGTH, heads, LENGTH)).astype(np.float32)
    expected, actual = both(case, packed)(operands, cotangent, scores, segments_of(lengths)[None])
    close(actual, expected)


LONG = {
    "nsa": NSA(**BASE, block_size=16, num_selected=4, local_window=40),
    "moba": MoBA(**BASE, block_size=16, top_k=4),
}


@pytest.mark.parametrize("name", LONG)
def test_flops_of_long_rows_are_counted(name: str) -> None:
    layer = LONG[name]
    x = jax.ShapeDtypeStruct((1, 1500, DIM), jnp.float32)
    traced = jax.jit(layer.apply).trace(layer.abstract(), x).jaxpr
    assert layer.cost(1500).flops * 1500 == pytest.approx(jaxpr_flops(traced, "cpu"), rel=1e-9)


# --- what NSA and MoBA share ----------------------------------------------------------------------

# Where the tokens of four rows stand: whole and packed ones, padded on the left and inside.
POSITIONS = np.stack(
    [
        np.arange(LENGTH),
        np.arange(LENGTH),
        np.r_[[-1] * 6, np.arange(LENGTH - 6)],
        np.r_[0, 1, 2, -1, -1, np.arange(3, 9), -1, np.arange(9, LENGTH - 3)],
    ]
)
SEGMENTS = np.where(np.arange(4)[:, None] == 1, 1 + POSITIONS // 10, 1)


TAIL = KIVI(bits=8, group_size=4, residual=32)  # of more tokens than there are: nothing is rounded


@pytest.mark.parametrize(
    "name, policy", [*((name, Full()) for name in MIXERS), ("nsa", TAIL), ("moba", TAIL)]
)
def test_decoding_equals_the_full_forward(name: str, policy: CachePolicy) -> None:
    layer = replace(MIXERS[name], cache=policy)
    params, rows = draw(layer), inputs(4)
    padded = np.take_along_axis(rows, np.maximum(POSITIONS, 0)[..., None], 1)
    whole = Context(segment_ids=jnp.asarray(np.where(np.arange(4)[:, None] == 1, SEGMENTS[1], 1)))

    @jax.jit
    def step(cache: Any, *fed: Any) -> tuple[Any, jax.Array]:
        x, positions, segments = fed
        ctx = Context(positions=positions, segment_ids=segments)
        y, cache, _ = layer.apply(params, x, ctx, cache)
        return cache, y

    full = jax.jit(lambda x: layer.apply(params, x, whole)[0])(rows)
    caches, steps = layer.init_cache(4, LENGTH + 2), []
    for start, stop in itertools.pairwise((0, 9, 14, *range(15, LENGTH + 1))):
        chunk = (a[:, start:stop] for a in (padded, POSITIONS, SEGMENTS))
        caches, y = step(caches, *chunk)
        steps.append(y)
    steps = np.concatenate(steps, 1)
    assert np.isfinite(steps).all()
    for row, positions in enumerate(POSITIONS):
        real = positions >= 0
        close(steps[row, real], full[row, positions[real]])


@every_mixer
def test_a_decoded_token_reads_what_the_cache_declares(name: str) -> None:
    """Keys and values are gathered, as many as are active, and met by nothing else; the compiled
    program, which gets the cache to keep, does not copy them."""
    layer, slots = MIXERS[name], 200
    cache = jax.eval_shape(partial(layer.init_cache, 1, slots))
    x = jax.ShapeDtypeStruct((1, 1, DIM), jnp.float32)
    position = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(params: Any, cache: Any, x: Any, position: Any) -> Any:
        return layer.apply(params, x, Context(positions=position), cache)[:2]

    traced = jax.jit(step, donate_argnums=1).trace(layer.abstract(), cache, x, position)
    whole, read = cache["k"].size, 0
    for eqn in equations(traced.jaxpr):
        if any(v.aval.size >= whole for v in eqn.invars):
            assert eqn.primitive.name in ("gather", "scatter", "reshape", "jit", "cond")
            read += eqn.outvars[0].aval.size * (eqn.primitive.name == "gather")
    declared = layer.cache_spec(1, slots)
    assert read == pytest.approx(sum(whole * declared[n].active for n in ("k", "v")))
    assert read < whole
    codes = replace(layer, cache=KIVI(group_size=2, residual=32)).cache_spec(1, slots)
    assert all(p.active == 1 for p in params_of(codes))  # attended to as a whole
    shape = ",".join(map(str, cache["k"].shape))
    assert not re.search(rf"\[{shape}\]\S* copy\(", traced.lower().compile().as_text())


def equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(tuple(eqn.params.values())):
            if isinstance(inner, core.ClosedJaxpr):
                yield from equations(inner.jaxpr)


@mixers_with_options
@pytest.mark.parametrize("path", ["linear"], indirect=True)
def test_long_rows_equal_short_ones(name: str, path: str) -> None:
    """Computed by either path: values and gradients."""
    layer = MIXERS[name]
    params, x = draw(layer), inputs()
    cotangent = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def run() -> Any:
        y, pull = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        return y, pull(cotangent)

    linear = jax.jit(lambda: run())()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "is_blocked", lambda *_: False)
        patch.setattr(blocks_module, "QUERIES", 512)
        close(linear, jax.jit(lambda: run())())


@mixers_with_options
def test_the_order_of_slots_does_not_matter(name: str) -> None:
    layer = MIXERS[name]
    rng = np.random.default_rng(4)
    q = rng.normal(size=(1, LENGTH, layer.num_heads, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, LENGTH + 6, layer.cached_heads, 8)).astype(np.float32)
    params = draw(layer) | {"gates": rng.uniform(size=(1, LENGTH, layer.num_heads, 3))}
    positions = np.r_[np.arange(LENGTH), [-1] * 6]
    order = rng.permutation(LENGTH + 6)

    @jax.jit
    def slots(k: Any, v: Any, positions: Any) -> jax.Array:
        where = {"q_positions": np.arange(LENGTH)[None], "kv_positions": positions[None]}
        return layer.attend(params, q, k, v, **where)

    @jax.jit
    def rows() -> jax.Array:
        return layer.attend(params, q, k[:, :LENGTH], v[:, :LENGTH])

    close(slots(k[:, order], v[:, order], positions[order]), rows())


@every_mixer
def test_the_future_does_not_matter(name: str, path: str) -> None:
    layer = MIXERS[name]
    params, before = draw(layer), inputs()
    run = jax.jit(lambda x: layer.apply(params, x)[0])
    after = before.copy()
    after[:, PROMPT:] += 3
    before, after = run(before), run(after)
    np.testing.assert_array_equal(before[:, :PROMPT], after[:, :PROMPT])
    assert (before[:, PROMPT:] != after[:, PROMPT:]).any()


@every_mixer
def test_packed_documents_are_alone(name: str, path: str) -> None:
    """As if each had a row of its own, and bit by bit whatever the others are."""
    layer = MIXERS[name]
    params, x = draw(layer), inputs(1)
    lengths = [9, 1, 8, 5]
    document, place = np.repeat(range(4), lengths), np.concatenate([np.arange(n) for n in lengths])
    ctx = Context(positions=jnp.asarray(place)[None], segment_ids=jnp.asarray(document)[None] + 1)
    rows = np.zeros((4, max(lengths), DIM), np.float32)  # one document each, and then nothing
    rows[document, place] = x[0]
    run = jax.jit(lambda x: layer.apply(params, x, ctx)[0])
    packed = run(x)
    alone = jax.jit(lambda rows: layer.apply(params, rows)[0])(rows)
    close(packed[0], alone[document, place])
    third = document == 2
    x[:, third] += 3
    changed = run(x)
    np.testing.assert_array_equal(changed[:, ~third], packed[:, ~third])
    assert (changed[:, third] != packed[:, third]).any()


@pytest.mark.parametrize("name", ["nsa_of_the_paper", "moba"])
def test_sharded_equals_unsharded(name: str, path: str, mesh: jax.sharding.Mesh) -> None:
    layer = MIXERS[name]
    params, x = draw(layer), inputs(4)
    cotangent = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        y, pull = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        return y, pull(cotangent)

    expected = run(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, layer.abstract(mesh)))
        rows = jax.device_put(x, jax.NamedSharding(mesh, pspec("batch", "seq", "embed")))
        actual = run(placed, rows)
    assert placed["key"].sharding.spec[1] == "tensor"
    close(actual, expected)


@mixers_with_options
def test_a_step_in_bfloat16_stays_finite(name: str, path: str) -> None:
    model = llama.llama(
        vocab_size=31, num_layers=2, attention=MIXERS[name], ffn=llama.swiglu(DIM, 28), tied=True
    )
    model = replace(model, precision=Precision(params="bfloat16", compute="bfloat16"))
    tokens = jnp.asarray(np.random.default_rng(3).integers(31, size=(BATCH, LENGTH)))

    @jax.jit
    def step(params: Any) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> jax.Array:
            logits = jax.nn.log_softmax(model.apply(params, tokens)[0][:, :-1])
            return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    before, params = step(model.init(jax.random.key(0)))
    after, params = step(params)
    assert after < before
    assert all(np.isfinite(p.astype(np.float32)).all() for p in jax.tree.leaves(params))
