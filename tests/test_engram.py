"""Engram: against a loop over documents, n-grams that stay inside them, decoding, and learning."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.layers import Attention, Engram
from bestiary.layers.base import Context
from bestiary.zoo import load_model
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.engram import engram_tiny

DIM, LENGTH, VOCAB = 12, 11, 23
LAYER = Engram(
    dim=DIM,
    mixer=Attention(dim=DIM, num_heads=2, num_kv_heads=1, head_dim=6),
    rows=37,
    max_n=4,
    num_heads=2,
    head_dim=5,
)
PARAMS = LAYER.init(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (3, LENGTH, DIM))
TOKENS = jax.random.randint(jax.random.key(2), (3, LENGTH), 0, VOCAB)
SEGMENTS = jnp.array([[1] * 11, [1] * 4 + [2] * 5 + [0] * 2, [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 0]])
POSITIONS = jnp.array(
    [[*range(11)], [*range(4), *range(5), 0, 1], [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0]]
)
PACKED = Context(positions=POSITIONS, segment_ids=SEGMENTS, tokens=TOKENS)
APPLY = jax.jit(LAYER.apply)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def rows_of(context: list[int]) -> np.ndarray:
    """Addresses of the last token of a document's beginning, which stands alone in a batch."""
    suffix = [*reversed(context), -1, -1, -1][: LAYER.max_n]
    return np.asarray(LAYER.addresses(jnp.array([[suffix]])))[0, 0]


def test_the_formula_document_by_document() -> None:
    """In float64, with every document's n-grams taken from a list of its tokens."""
    y, _, aux = APPLY(PARAMS, X, PACKED)
    mixed, _, _ = LAYER.mixer.apply(PARAMS["mixer"], X, PACKED)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS)
    values = p["table"]["values"][:, 0]

    def norm(v: np.ndarray) -> np.ndarray:
        return v / np.sqrt(np.mean(v * v) + 1e-6)

    expected, gates = np.array(mixed, np.float64), []
    for b in range(3):
        for t in range(LENGTH):
            document = np.flatnonzero(SEGMENTS[b] == SEGMENTS[b, t])
            context = [int(TOKENS[b, i]) for i in document if i <= t]
            e = values[rows_of(context)].ravel()
            score = norm(np.asarray(X[b, t], np.float64)) @ norm(e @ p["key"])
            gate = 1 / (1 + np.exp(-score / np.sqrt(DIM)))
            expected[b, t] += gate * (e @ p["value"])
            gates += [gate] * bool(SEGMENTS[b, t] > 0)
    close(y, expected)
    close(aux.metrics["gate"], np.mean(gates))


@pytest.mark.parametrize("known", ["segment_ids", "positions"])
def test_either_tells_documents_apart(known: str) -> None:
    here = Context(tokens=TOKENS[1:2, :9], **{known: getattr(PACKED, known)[1:2, :9]})
    suffixes = LAYER.suffixes(
        here.tokens,
        jnp.arange(9)[None] if here.positions is None else here.positions,
        here.segment_ids,
    )
    tokens = TOKENS[1].tolist()
    assert suffixes[0, 3].tolist() == tokens[3::-1]
    assert suffixes[0, 5].tolist() == [tokens[5], tokens[4], -1, -1]


def test_orders_and_heads_have_rows_of_their_own() -> None:
    """Heads that agree on one n-gram disagree on others, and an order sees its n tokens alone."""
    grams = jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(1, 400, 4)))
    rows = np.asarray(LAYER.addresses(grams))[0]
    np.testing.assert_array_equal(rows // LAYER.rows, np.tile(np.arange(6), (400, 1)))
    assert len(np.unique(rows[:, 0] * 37 + rows[:, 1])) > 200, "one head alone has 37"
    changed = np.asarray(LAYER.addresses(grams.at[..., 2].add(1)))[0] != rows
    assert not changed[:, :2].any() and changed[:, 2:].mean() > 0.9


@pytest.mark.parametrize("rows", [4096, 4099])
def test_the_hash_spreads_ids_evenly(rows: int) -> None:
    """All pairs of bytes: as many rows stay empty as by chance, also where `rows` is a power of
    two."""
    memory = dataclasses.replace(LAYER, rows=rows, max_n=2, num_heads=3)
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(64), jnp.arange(64)), -1).reshape(1, -1, 2)
    found = np.asarray(memory.addresses(pairs))[0]
    for head in range(3):
        share = len(np.unique(found[:, head])) / rows
        assert share == pytest.approx(1 - np.exp(-4096 / rows), abs=0.03)


@pytest.mark.parametrize("sizes", [[1] * 11, [2, 9]], ids=str)
def test_prefill_and_decode_equal_the_whole(sizes: list[int]) -> None:
    whole, _, _ = APPLY(PARAMS, X, Context(tokens=TOKENS))
    cache, parts, start = LAYER.init_cache(3, LENGTH), [], 0
    for size in sizes:
        here = slice(start, start + size)
        positions = jnp.arange(start, start + size)[None].repeat(3, 0)
        ctx = Context(positions=positions, tokens=TOKENS[:, here])
        y, cache, _ = APPLY(PARAMS, X[:, here], ctx, cache)
        parts.append(y)
        start += size
    close(jnp.concatenate(parts, 1), whole)
    assert cache["last"]["k"].shape == (3, LAYER.max_n - 1)


def test_a_position_written_anew_is_read_anew() -> None:
    """As a rejected draft would leave it: positions 1 and 2 come a second time."""
    whole = LAYER.suffixes(TOKENS[:, :3], jnp.arange(3)[None].repeat(3, 0), None)
    other = TOKENS[:, :3].at[:, 1:].add(1) % VOCAB
    ctx = Context(positions=jnp.arange(3)[None].repeat(3, 0), tokens=other)
    _, cache, _ = APPLY(PARAMS, X[:, :3], ctx, LAYER.init_cache(3, LENGTH))
    again = jnp.arange(1, 3)[None].repeat(3, 0)
    found = LAYER.suffixes(TOKENS[:, 1:3], again, None, cache["last"])
    np.testing.assert_array_equal(found, whole[:, 1:])


@pytest.mark.parametrize("pad", [(3, 0), (0, 3)], ids=["left", "right"])
def test_padding_of_a_prompt_is_not_remembered(pad: tuple[int, int]) -> None:
    """Two tokens and padding, then two more: as four in a row."""
    whole, _, _ = APPLY(PARAMS, X[:, :4], Context(tokens=TOKENS[:, :4]))
    left, right = pad
    positions = np.array([*range(-left, 0), 0, 1, *[-1] * right])[None].repeat(3, 0)
    padded = np.pad(X[:, :2], ((0, 0), pad, (0, 0)), constant_values=7.0)
    tokens = np.pad(TOKENS[:, :2], ((0, 0), pad), constant_values=5)
    ctx = Context(positions=positions, tokens=tokens)
    y, cache, _ = APPLY(PARAMS, padded, ctx, LAYER.init_cache(3, LENGTH))
    close(y[:, left : left + 2], whole[:, :2])
    for t in (2, 3):
        ctx = Context(positions=jnp.full((3, 1), t), tokens=TOKENS[:, t : t + 1])
        y, cache, _ = APPLY(PARAMS, X[:, t : t + 1], ctx, cache)
        close(y[:, 0], whole[:, t])


def test_only_the_rows_read_have_a_gradient() -> None:
    grads = jax.jit(jax.grad(lambda p: jnp.square(LAYER.apply(p, X, PACKED)[0]).sum()))(PARAMS)
    suffixes = LAYER.suffixes(TOKENS, POSITIONS, SEGMENTS)
    read = np.unique(LAYER.addresses(suffixes))
    touched = np.flatnonzero(np.any(grads["table"]["values"], axis=(1, 2)))
    np.testing.assert_array_equal(touched, read)
    for name in ("key", "value", "key_norm", "query_norm"):
        assert all(np.any(g) for g in jax.tree.leaves(grads[name])), name


def test_a_model_with_a_memory_decodes_as_it_reads() -> None:
    model = engram_tiny()
    assert load_model("engram_tiny") == model
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(3), (2, 7), 0, 256)
    apply = jax.jit(Decoder.apply, static_argnums=0)
    whole, _, _ = apply(model, params, tokens)
    z, cache, _ = apply(model, params, tokens[:, :4], Context(), model.init_cache(2, 7))
    parts = [z]
    for t in range(4, 7):
        z, cache, _ = apply(model, params, tokens[:, t : t + 1], Context(), cache)
        parts.append(z)
    close(jnp.concatenate(parts, 1), whole)


def test_a_further_token_reads_the_memory_too() -> None:
    stack = engram_tiny().stacks[1]
    model = dataclasses.replace(engram_tiny(), blocks=stack).with_mtp()
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)

    def run(params: Any, tokens: jax.Array) -> jax.Array:
        x, _, _ = model.hidden(params, tokens)
        return model.further(params, x, tokens)[0]

    assert jax.eval_shape(run, model.abstract(), tokens).shape == (2, 7, 128)


def test_a_token_reads_one_row_per_order_and_head() -> None:
    count = LAYER.count()
    assert count.total - count.active == (LAYER.rows - 1) * LAYER.tables * LAYER.head_dim


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rows": 0}, "rows: 0; need at least 1"),
        ({"num_heads": -1}, "num_heads: -1; need at least 1"),
        ({"max_n": 1}, "max_n: 1; need at least 2"),
        ({"dim": 16}, "mixer.dim: 12; need dim 16"),
    ],
)
def test_impossible_sizes_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(LAYER, **fields)


def test_tokens_are_needed() -> None:
    with pytest.raises(ValueError, match=r"^ctx.tokens: None; need the token ids"):
        LAYER.apply(PARAMS, X)
