"""Hybrid decoders: which layer mixes how, decoding, packing, causality, what the cache holds."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bestiary.layers import (
    Attention,
    Chain,
    Context,
    GatedDeltaNet,
    GatedLinearAttention,
    Layer,
    Mamba2,
    Performer,
    Precision,
)
from bestiary.layers.base import params_of
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.hybrid import byte_hybrid, hybrid, hybrid_mini, hybrid_tiny
from bestiary.zoo.llama import byte_llama, multi_head, swiglu

BATCH, LENGTH, DIM, VOCAB = 2, 19, 16, 30
MIXERS: dict[str, Layer] = {
    "s": Mamba2(dim=DIM, num_heads=4, head_dim=6, state=10, chunk=8),
    "a": multi_head(DIM, 4),
    "g": GatedLinearAttention(dim=DIM, num_heads=2, key_dim=4, value_dim=8, chunk=4),
    "d": GatedDeltaNet(
        dim=DIM, num_heads=4, num_key_heads=2, key_dim=6, value_dim=4, kernel=3, chunk=8
    ),
    "p": Performer(dim=DIM, num_heads=2, head_dim=8, num_features=12, chunk=16),
}


def decoder(pattern: str, num_layers: int) -> Decoder:
    return hybrid(
        vocab_size=VOCAB,
        num_layers=num_layers,
        dim=DIM,
        mixers=MIXERS,
        pattern=pattern,
        ffn=swiglu(DIM, 24),
    )


MODELS = {"sssa": decoder("sssa", 8), "gdpa": decoder("gdpa", 4)}
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def parts(name: str) -> tuple[Any, Any, jax.Array]:
    """Parameters, the compiled model, tokens."""
    model = MODELS[name]
    run = jax.jit(lambda params, tokens, ctx, cache: model.apply(params, tokens, ctx, cache)[:2])
    tokens = jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(BATCH, LENGTH)))
    return model.init(jax.random.key(0)), run, tokens


def mixers(model: Decoder) -> list[type]:
    """The mixer of every layer, first to last."""
    (stack,) = model.stacks
    assert isinstance(stack.block, Chain)
    return [type(getattr(block, "mixer")) for block in stack.block.layers] * stack.n  # noqa: B009


def test_patterns() -> None:
    three_to_one = [Mamba2, Mamba2, Mamba2, Attention]
    assert mixers(hybrid_tiny()) == three_to_one
    assert mixers(hybrid_mini()) == 2 * three_to_one
    assert mixers(byte_hybrid(4, 128, "s")) == 4 * [Mamba2]
    assert mixers(byte_hybrid(6, 128, "as")) == 3 * [Attention, Mamba2]
    attention_only = byte_hybrid(4, 128, "a")
    assert attention_only.count() == byte_llama(4, 128).count()
    assert attention_only.cost(64) == byte_llama(4, 128).cost(64)
    with pytest.raises(ValueError, match="pattern: 'x' in 'sx'; known: s, a"):
        byte_hybrid(4, 128, "sx")
    with pytest.raises(ValueError, match="pattern: 'sssa' does not divide num_layers 6"):
        byte_hybrid(6, 128)


@every_model
def test_decoding_equals_the_full_sequence(name: str) -> None:
    params, run, tokens = parts(name)
    expected, _ = run(params, tokens, Context(), None)
    cache, logits = MODELS[name].init_cache(BATCH, LENGTH), []
    for start, stop in ((0, 13), (13, 17), (17, 18), (18, 19)):
        part, cache = run(params, tokens[:, start:stop], Context(), cache)
        logits.append(part)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, rtol=1e-4, atol=2e-5)


@every_model
def test_documents_and_the_future_are_not_seen(name: str) -> None:
    params, run, tokens = parts(name)
    segments = np.repeat([[1, 2]], BATCH, 0).repeat((7, 12), axis=1)
    positions = jnp.asarray(np.r_[:7, :12])[None].repeat(BATCH, 0)
    ctx = Context(positions=positions, segment_ids=segments)
    expected, _ = run(params, tokens, ctx, None)
    for mine in (slice(0, 7), slice(7, None)):
        other = ((tokens + 5) % VOCAB).at[:, mine].set(tokens[:, mine])
        np.testing.assert_array_equal(run(params, other, ctx, None)[0][:, mine], expected[:, mine])
    later = tokens.at[:, 11:].set((tokens[:, 11:] + 3) % VOCAB)
    np.testing.assert_array_equal(run(params, later, ctx, None)[0][:, :11], expected[:, :11])


def test_only_attention_makes_the_cache_longer() -> None:
    def growth(pattern: str) -> int:
        def size(length: int) -> int:
            cache = byte_hybrid(8, 128, pattern).cache_spec(1, length)
            return sum(p.nbytes for p in params_of(cache))

        return size(4000) - size(2000)

    assert growth("s") == 0 < growth("a") == 4 * growth("sssa")


@every_model
def test_bfloat16_training_learns(name: str) -> None:
    """Steps on one batch: finite, and the loss falls."""
    model = replace(MODELS[name], precision=Precision(compute="bfloat16"))
    params, _, tokens = parts(name)
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model.apply(params, tokens)[0]
            labels = tokens[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimiser.init(params), []
    for _ in range(4):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
