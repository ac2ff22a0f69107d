"""Static masks and the blocked path: intervals equal brute force, blocks equal dense attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.eval.hlo import jaxpr_flops
from bestiary.kernels.attention import api, attention, blocked
from bestiary.kernels.attention.masks import (
    CAUSAL,
    Causal,
    Chunked,
    Full,
    Global,
    RandomBlocks,
    Rectangles,
    Sinks,
    Strided,
    Window,
    alternating,
    big_bird,
    causal_big_bird,
    live_blocks,
    longformer,
    num_live,
    seen_keys,
    streaming,
    visible_pairs,
)
from bestiary.layers import Attention
from bestiary.layers import cache as kv
from bestiary.layers.base import Context

LENGTH = 150
PRESETS = {
    "causal": Causal(),
    "window": alternating(0, 30),
    "longformer": Causal() & longformer(24, (0, 70), dilation=2),
    "big_bird": causal_big_bird(8, num_random=2),
    "streaming": streaming(20),
    "chunked": Causal() & Chunked(32),
    "holes": Causal() & ~Chunked(16),
}
sizes = st.integers(1, 60)
atoms = st.one_of(
    st.just(Causal()),
    st.just(Full()),
    sizes.map(Window),
    st.builds(Chunked, sizes, st.integers(0, 2)),
    sizes.map(Strided),
    sizes.map(Sinks),
    st.lists(st.integers(0, LENGTH), min_size=1, max_size=5).map(lambda p: Global(tuple(p))),
    st.builds(
        RandomBlocks, sizes, st.integers(1, 3), st.integers(0, 9), st.sampled_from((None, LENGTH))
    ),
)
masks = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda mask: ~mask),
    ),
    max_leaves=4,
)


def dense(mask, length=LENGTH, keys=None):
    return mask(np.arange(length)[:, None], np.arange(length if keys is None else keys)[None])


def random_rectangles(seed, number=200):
    ends = np.sort(np.random.default_rng(seed).integers(0, LENGTH, (2, number, 2)), -1)
    return Rectangles(*(ends[i, :, j] for i in (0, 1) for j in (0, 1)))


def brute_force(mask, at):
    seen = dense(mask)
    parts = [seen[a : b + 1, c : d + 1] for a, b, c, d in zip(*at, strict=True)]
    return np.array([x.any() for x in parts]), np.array([x.all() for x in parts])


@settings(max_examples=60, deadline=None)
@given(atoms, st.integers(0, 99))
def test_a_mask_knows_what_a_rectangle_shows(mask, seed):
    at = random_rectangles(seed)
    for ours, theirs in zip(mask.some_all(at), brute_force(mask, at), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(masks, st.integers(0, 99))
def test_a_combination_never_loses_what_is_visible(mask, seed):
    at = random_rectangles(seed)
    (some, all_), (truly_some, truly_all) = mask.some_all(at), brute_force(mask, at)
    assert (some | ~truly_some).all() and (truly_all | ~all_).all()
    assert visible_pairs(mask, LENGTH) == dense(mask).sum()
    for block in (16, 10):
        live = live_blocks(mask, LENGTH, LENGTH, block)
        assert num_live(mask, LENGTH, block) == sum(map(len, live))
    traced = jax.jit(lambda q, kv: mask(q, kv))(jnp.arange(LENGTH)[:, None], jnp.arange(LENGTH))
    np.testing.assert_array_equal(traced, dense(mask))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_skip_all_dead_blocks(name):
    mask, block = PRESETS[name], 10
    seen = dense(mask).reshape(LENGTH // block, block, LENGTH // block, block)
    full, partly = live_blocks(mask, LENGTH, LENGTH, block)
    got = {tuple(pair) for pair in np.concatenate((full, partly)).tolist()}
    assert got == {tuple(pair) for pair in np.argwhere(seen.any((1, 3))).tolist()}
    assert all(seen[i, :, j].all() for i, j in full)


def test_random_blocks_are_distinct_and_the_same_everywhere():
    np.random.seed(0)
    first = dense(RandomBlocks(4, 3, seed=7, length=LENGTH))
    np.random.seed(1)
    np.testing.assert_array_equal(dense(RandomBlocks(4, 3, seed=7, length=LENGTH)), first)
    assert (first[:, ::4].sum(1) == 3).all(), "three distinct blocks"
    assert (dense(RandomBlocks(4, 3, seed=8, length=LENGTH)) != first).any()
    assert not (dense(RandomBlocks(4, 3)) & ~dense(CAUSAL)).any(), "earlier blocks alone"


def test_the_published_windows():
    np.testing.assert_array_equal(dense(CAUSAL & Window(3)).sum(1)[:4], [1, 2, 3, 3])
    assert dense(longformer(8, (40,)))[20].sum() == 8 + 1 + 1  # half on each side, own, global
    row = dense(big_bird(LENGTH, 10, num_random=1, seed=3))[75]
    assert row[60:90].all() and row[:10].all() and row[140:].all() and row.sum() <= 60
    assert [alternating(i, 4) == CAUSAL for i in range(4)] == [False, True, False, True]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Window(0), "window: 0; need at least 1"),
        (lambda: Chunked(8, -1), "neighbours: -1; need at least 0"),
        (lambda: Global((-1,)), "positions: (-1,); need one or more, none negative"),
    ],
)
def test_impossible_masks_are_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


# --- the blocked path -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(api, "SHORT", 8)
    monkeypatch.setattr(blocked, "BLOCKS", {16: 1.0, 32: 0.9})


def operands(length, keys, heads=4, kv_heads=2, dtype=jnp.float32):
    shapes = (2, length, heads, 8), *[(2, keys, kv_heads, 8)] * 2, (2, length, heads, 8)
    shapes = *shapes, (heads,), (1, kv_heads, keys)
    keys_ = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys_, shapes, strict=True)]


def gradients(impl, arrays, **options):
    q, k, v, dy, sinks, bias = arrays

    def run(q, k, v, sinks, bias):
        return attention(q, k, v, sinks=sinks, bias=bias, impl=impl, **options)

    y, transpose = jax.vjp(jax.jit(run), q, k, v, sinks, bias)
    return y, *transpose(dy)


def assert_equal(arrays, atol=2e-5, **options):
    ours, theirs = (gradients(impl, arrays, **options) for impl in ("auto", "reference"))
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=atol)


@settings(max_examples=8, deadline=None)
@given(masks, st.integers(9, 70), st.booleans(), st.sampled_from((None, 2.0)), st.integers(0, 9))
def test_blocks_equal_dense_attention(mask, length, documents, softcap, seed):
    """Some of these rows see no key at all, but the sink."""
    where = {}
    if documents:
        cuts = np.random.default_rng(seed).integers(0, 3, (2, length))
        segments = jnp.asarray(np.sort(cuts), jnp.int32)
        where = kv.where({}, jnp.arange(length)[None], segments, mask)
    assert_equal(operands(length, length), mask=mask, softcap=softcap, **where)


@pytest.mark.parametrize("mask", [~Causal(), Sinks(3) & ~Causal(), ~Full()])
def test_rows_that_see_nothing_give_zeros(mask):
    q, k, v, dy, *_ = operands(37, 37)
    arrays = q, k, v, dy, None, None
    assert_equal(arrays, mask=mask)
    empty = ~dense(mask, 37).any(1)
    y, dq, *_ = gradients("auto", arrays, mask=mask)
    assert empty.any() and not y[:, empty].any() and not dq[:, empty].any()


@pytest.mark.parametrize("name", PRESETS)
def test_the_running_program_finds_the_live_blocks(name):
    """Of two documents, the second of which begins within a block, and empty slots."""
    mask, block = PRESETS[name], 10
    place, segment = np.r_[:25, :65, [-1] * 20], np.repeat([3, 7], [25, 85])
    x = jnp.zeros((1, len(place), 1, 1))
    where = blocked.Where(jnp.asarray(place)[None], jnp.asarray(segment)[None])
    static = blocked.Static(mask, None, block, len(place), len(place))
    found = blocked._Blocks(static, x, x, x, None, (where, where))._live_by_position()
    seen = mask(place[:, None], place) & (segment[:, None] == segment) & (place >= 0)
    seen = seen.reshape(11, block, 11, block).any((1, 3))
    assert not (seen & ~found).any()
    crossing = np.arange(11) == 2  # the block of keys of which only ranges are known
    assert not (found & ~seen)[:, ~crossing].any()


def test_positions_and_rows_of_other_lengths():
    arrays = operands(21, 45)
    assert_equal(arrays, mask=Full())
    slots = jnp.asarray([[-1] * 5 + list(range(40))] * 2)
    where = {"q_positions": jnp.arange(20, 41)[None], "kv_positions": slots}
    assert_equal(arrays, **where, window=9)


def test_under_vmap_and_remat_and_in_bfloat16():
    q, k, v, dy, *_ = operands(40, 40)

    def loss(q, k, v, dy):
        return (attention(q, k, v, window=11) * dy).sum()

    expected = jax.grad(loss, (0, 1, 2))(q, k, v, dy)
    rows = (x[:, None] for x in (q, k, v, dy))
    mapped = jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*rows)
    for one, other in zip(mapped, expected, strict=True):
        np.testing.assert_allclose(one[:, 0], other, atol=1e-5)
    narrow = [x.astype(jnp.bfloat16) for x in operands(40, 40)]
    for one, other in zip(
        gradients("auto", narrow), gradients("reference", operands(40, 40)), strict=True
    ):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_later_tokens_leave_earlier_results_as_they_are(name):
    q, k, v, *_ = operands(61, 61)
    run = jax.jit(lambda q, k, v: attention(q, k, v, mask=PRESETS[name]))
    later = [x.at[:, 40:].add(3.0) for x in (q, k, v)]
    np.testing.assert_array_equal(run(*later)[:, :40], run(q, k, v)[:, :40])


def test_sharded_over_heads_and_rows(mesh):
    q, k, v, dy, sinks, bias = operands(50, 50)
    P = jax.sharding.PartitionSpec
    spec = P("data", None, "tensor")

    def run(q, k, v, dy):
        y, transpose = jax.vjp(lambda *x: attention(*x, mask=PRESETS["streaming"]), q, k, v)
        return y, *transpose(dy)

    expected = run(q, k, v, dy)
    with jax.set_mesh(mesh):
        split = jax.shard_map(run, in_specs=(spec,) * 4, out_specs=spec)
        placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in (q, k, v, dy)]
        results = jax.jit(split)(*placed), jax.jit(run)(*placed)
    for got in results:
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_layer_decodes_by_its_mask():
    layer = Attention(dim=12, num_heads=2, num_kv_heads=1, head_dim=6, mask=streaming(5, sinks=2))
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 19, 12))
    whole, _, _ = layer.apply(params, x)
    cache = layer.init_cache(2, 19)
    apply = jax.jit(layer.apply)
    parts = []
    for first, last in [(0, 12), *((i, i + 1) for i in range(12, 19))]:
        at = jnp.broadcast_to(jnp.arange(first, last), (2, last - first))
        y, cache, _ = apply(params, x[:, first:last], Context(positions=at), cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL & Window(3), streaming(5, sinks=2)])
def test_how_many_keys_a_query_sees(mask):
    seen = dense(mask, 19).sum(1)
    assert seen_keys(mask, 19) == seen.mean()
    assert seen_keys(mask, 19, 2) == np.minimum(seen, 2).mean() or mask == streaming(5, sinks=2)


# --- programs at real lengths ---------------------------------------------------------------------


@pytest.fixture
def real_blocks(monkeypatch):
    monkeypatch.undo()


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL & Window(100), causal_big_bird(16)])
@pytest.mark.parametrize("length", [200, 1500])
def test_the_cost_of_a_layer_counts_live_blocks(real_blocks, mask, length):
    layer = Attention(dim=12, num_heads=2, num_kv_heads=1, head_dim=6, mask=mask)
    x = jax.ShapeDtypeStruct((1, length, 12), jnp.float32)
    traced = jax.jit(layer.apply).trace(layer.abstract(), x).jaxpr
    assert layer.cost(length).flops * length == pytest.approx(jaxpr_flops(traced, "cpu"))


def lowered(length, mask):
    q, kv = (jax.ShapeDtypeStruct((1, length, h, 16), jnp.float32) for h in (2, 1))

    def loss(q, k, v):
        return attention(q, k, v, mask=mask).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv)


def test_no_array_of_all_pairs(real_blocks):
    text = lowered(4096, streaming(512)).compile().as_text()
    sizes = [np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"\w\[([\d,]+)\]", text)]
    assert max(sizes) < 4096 * 4096 / 16


def test_work_grows_with_the_live_blocks(real_blocks):
    def live(mask):
        return sum(map(len, live_blocks(mask, 32768, 32768, 256)))

    window = CAUSAL & Window(1024)
    assert live(CAUSAL) == 128 * 129 / 2
    assert live(window) == 5 * 128 - 10
    assert live(streaming(1024)) < 6 * 128

    def trips(mask):
        text = lowered(4096, mask).as_text()
        return text.count("stablehlo.while")

    assert trips(window) == 4  # full and partly visible blocks, forward and backward
