"""What every token mixer promises on tiny shapes: decoding, packing, causality, sharding, bfloat16.

Each of them alone, and several in one hybrid. What a mixer computes is tested where it stands.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import close, draw

from bestiary.kernels.attention.masks import CAUSAL, causal_big_bird, longformer, streaming
from bestiary.layers import (
    DEFAULT_RULES,
    DSA,
    MLA,
    NSA,
    Attention,
    Chain,
    Context,
    GatedDeltaNet,
    GatedLinearAttention,
    Layer,
    Mamba,
    Mamba2,
    MoBA,
    Performer,
    SparkAttention,
    use_rules,
)

ROWS, DIM = 4, 16
LENGTHS = (5, 8, 3)  # of the documents of a row
SEGMENTS = np.repeat([[1, 2, 3]], ROWS, 0).repeat(LENGTHS, axis=1)
POSITIONS = np.broadcast_to(np.concatenate([np.arange(n) for n in LENGTHS]), SEGMENTS.shape)
PACKED = Context(positions=jnp.asarray(POSITIONS), segment_ids=jnp.asarray(SEGMENTS))
LENGTH = sum(LENGTHS)
PROMPT = 7  # ends within the second document

HEADS: dict[str, Any] = dict(dim=DIM, num_heads=4, num_kv_heads=2, head_dim=4)
LATENTS: dict[str, Any] = dict(
    dim=DIM, num_heads=4, kv_rank=6, q_rank=8, nope_dim=4, rope_dim=2, value_dim=6
)
ALONE: dict[str, Layer] = {
    "attention": Attention(**HEADS, softcap=3.0, sinks=True),
    "window": Attention(**HEADS, window=4),
    "big_bird": Attention(**HEADS, mask=causal_big_bird(block=2, num_random=1)),
    "streaming": Attention(**HEADS, mask=streaming(window=3, sinks=2)),
    "spark": SparkAttention(**HEADS, predictor_dim=2, top_k=3),
    "nsa": NSA(**HEADS, block_size=4, num_selected=2, local_window=3),
    "moba": MoBA(**HEADS, block_size=4, top_k=2),
    "mla": MLA(**LATENTS, mask=CAUSAL & longformer(6, (0, 2), dilation=2)),
    "dsa": DSA(**LATENTS, top_k=3, index_heads=2, index_dim=4, mask=streaming(window=4, sinks=1)),
    "mamba": Mamba(dim=DIM, inner=20, state=6, dt_rank=2, chunk=4),
    "mamba2": Mamba2(dim=DIM, num_heads=4, head_dim=6, state=8, groups=2, mlp=10, chunk=4),
    "performer": Performer(dim=DIM, num_heads=4, head_dim=6, num_features=14, chunk=8),
    "gla": GatedLinearAttention(dim=DIM, num_heads=4, key_dim=6, value_dim=8, rank=3, chunk=8),
    "delta": GatedDeltaNet(
        dim=DIM, num_heads=4, num_key_heads=2, key_dim=6, value_dim=8, kernel=3, chunk=8
    ),
}
HYBRID = Chain(layers=tuple(ALONE[name] for name in ("mamba2", "delta", "attention", "moba")))
MIXERS: dict[str, Layer] = ALONE | {"hybrid": HYBRID}
every_mixer = pytest.mark.parametrize("name", MIXERS)


@cache
def setting(name: str) -> tuple[Any, jax.Array, Any]:
    """Parameters, inputs and the compiled mixer: (params, x, ctx, cache) -> (y, cache)."""
    layer = MIXERS[name]
    x = np.random.default_rng(1).normal(size=(ROWS, LENGTH, DIM)).astype(np.float32)
    return draw(layer), jnp.asarray(x), jax.jit(lambda *args: layer.apply(*args)[:2])


def packed(name: str, x: jax.Array) -> np.ndarray:
    params, _, apply = setting(name)
    return np.asarray(apply(params, x, PACKED, None)[0])


@every_mixer
def test_a_prompt_and_single_tokens_equal_the_whole(name: str) -> None:
    """Documents end between the calls and in them."""
    params, x, apply = setting(name)
    cached, parts, start = MIXERS[name].init_cache(ROWS, LENGTH), [], 0
    for size in (PROMPT, *[1] * (LENGTH - PROMPT)):
        here = slice(start, start + size)
        these = jax.tree.map(lambda a, here=here: a[:, here], PACKED)
        y, cached = apply(params, x[:, here], these, cached)
        parts.append(y)
        start += size
    close(jnp.concatenate(parts, 1), packed(name, x), rtol=5e-5)


@every_mixer
def test_documents_are_alone(name: str) -> None:
    """Nothing outside a document changes a bit of it, and it reads as in a row of its own."""
    params, x, apply = setting(name)
    y = packed(name, x)
    second = SEGMENTS[0] == 2
    changed = packed(name, jnp.where(second[:, None], x, 30 - 20 * x))
    np.testing.assert_array_equal(changed[:, second], y[:, second])
    assert (changed[:, ~second] != y[:, ~second]).any()
    alone, _ = apply(params, x[:, second], Context(), None)
    close(y[:, second], alone, rtol=5e-5)


@every_mixer
def test_the_future_changes_no_bit(name: str) -> None:
    _, x, _ = setting(name)
    y = packed(name, x)
    for place in (2, 8, LENGTH - 1):
        changed = packed(name, x.at[:, place:].multiply(-9.0))
        np.testing.assert_array_equal(changed[:, :place], y[:, :place])
        assert (changed[:, place] != y[:, place]).any()


@every_mixer
def test_sharded_over_heads_equals_unsharded(name: str, mesh: jax.sharding.Mesh) -> None:
    layer = MIXERS[name]
    params, x, _ = setting(name)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        y, back = jax.vjp(lambda p, x: layer.apply(p, x, PACKED)[0], params, x)
        return y, back(x[:, ::-1])

    expected = run(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        shardings = jax.tree.map(lambda s: s.sharding, layer.abstract(mesh))
        actual = run(jax.device_put(params, shardings), x)
    assert any("tensor" in s.spec for s in jax.tree.leaves(shardings))
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-4), actual, expected)


@every_mixer
def test_a_bfloat16_training_step_is_finite(name: str) -> None:
    """Of inputs thirty times as large as usual, too."""
    layer, (params, x, _) = MIXERS[name], setting(name)
    optimiser = optax.adamw(0.01)

    @jax.jit
    def step(params: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            y, _, aux = layer.apply(params, x, PACKED)
            return jnp.square(y.astype(jnp.float32)).mean() + sum(aux.losses.values())

        value, grads = jax.value_and_grad(loss)(params)
        updates, _ = optimiser.update(grads, optimiser.init(params), params)
        return value, grads, optax.apply_updates(params, updates)

    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    for factor in (1, 30):
        value, grads, after = step(narrow[0], factor * narrow[1])
        for leaf in jax.tree.leaves((value, grads, after)):
            assert np.isfinite(leaf.astype(jnp.float32)).all()
        assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, narrow[0])
        assert any(jax.tree.leaves(moved))
