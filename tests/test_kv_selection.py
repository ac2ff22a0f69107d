"""Scores and kept sets of key-value selection, and quantisation, against the published programs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.attention import attention, visible, weights
from bestiary.layers import kv_quant as kq
from bestiary.layers import kv_selection as kvs
from bestiary.layers.rope import Rope


def close(actual: object, expected: np.ndarray, name: str, rtol: float = 1e-5) -> None:
    """Equal to `rtol` of the largest entry."""
    atol = rtol * float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol, err_msg=name)


def rows(x: np.ndarray) -> jax.Array:
    """[batch, heads, T, head] -> [batch, T, heads, head]."""
    return jnp.asarray(x).swapaxes(1, 2)


def positions_of(kept: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Where the kept keys [..., n, head] stand among k [..., T, head]: [..., n]."""
    return np.abs(kept[..., :, None, :] - k[..., None, :, :]).max(-1).argmin(-1)


@pytest.mark.golden("kv_selection")
def test_scores_and_kept_keys(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    window, kernel, capacity = hp["window_size"], hp["kernel_size"], hp["capacity"]
    length, d, heads = hp["seq_len"], hp["head_dim"], hp["num_attention_heads"]
    rope, positions = Rope(theta=hp["rope_theta"]), jnp.arange(length)[None]

    def projected(name: str) -> jax.Array:
        return (a["h"] @ a[name]).reshape(*a["h"].shape[:2], -1, d)

    plain = jnp.asarray(projected("Wq"))
    q, k, v = (
        rope.apply(plain, positions),
        rope.apply(jnp.asarray(projected("Wk")), positions),
        jnp.asarray(projected("Wv")),
    )
    for x, name in ((q, "q_rope"), (k, "k_rope"), (v, "v")):
        close(x.swapaxes(1, 2), a[name], name)
    w = weights(q, k, visible(positions, positions), scale=d**-0.5)

    future = length + jnp.arange(hp["expected_n_future_positions"])[None]
    unit = jnp.broadcast_to(jnp.eye(d)[:, None, None], (d, future.shape[1], 1, d))
    rotation = rope.apply(unit, future).mean((1, 2)).T
    before = w[..., -window:, :-window].mean((2, 3))
    pooling = hp["snap_pooling"]
    scores = {
        "snap": kvs.forced(kvs.snap(before, kernel, pooling), after=window),
        "observed": kvs.observed(w),
        "tova": kvs.tova(w),
        "knorm": kvs.knorm(k),
        "keydiff": kvs.keydiff(k),
        "expected": kvs.expected(
            plain,
            k,
            v,
            rotation,
            sinks=hp["expected_n_sink"],
            covariance=hp["expected_use_covariance"],
            norm=hp["expected_use_vnorm"],
            eps=hp["expected_epsilon"],
        ),
    }
    for name, score in scores.items():
        np.testing.assert_array_equal(kvs.keep(score, hp["num_kept"]), a[f"{name}_keep"], name)
        close(score, a[name], name)

    kept = length - round(length * hp["compression_ratio"])
    streamed = kvs.streaming(length, kept, hp["streaming_n_sink"])
    np.testing.assert_array_equal(np.broadcast_to(streamed, a["stream"].shape), a["stream"])
    pyramid = hp["pyramid"]
    assert not pyramid["budget_excludes_window"]
    prompt = pyramid["prompt_len"]
    budgets = kvs.pyramid_budgets(
        prompt,
        int(prompt * (1 - pyramid["compression_ratio"])),
        pyramid["num_layers"],
        pyramid["window_size"],
        pyramid["beta"],
    )
    np.testing.assert_array_equal(budgets, a["pyramid_budget"])

    # the original form: every query head keeps keys of its own, in the order of their scores
    received = w[..., -window:, :-window].sum(-2).reshape(len(w), heads, -1)
    each = {n: np.repeat(a[m], heads // a[m].shape[1], 1) for n, m in (("k", "k_rope"), ("v", "v"))}
    for name in hp["snaporig_poolings"]:
        score = kvs.snap(received, kernel, "avg" if name == "avgpool" else "max")
        best = jax.lax.top_k(score, capacity - window)[0]
        theirs = positions_of(a[f"snaporig_{name}_k"], each["k"])
        np.testing.assert_array_equal(
            theirs[..., -window:] - length, np.arange(-window, 0) + 0 * theirs[..., :1]
        )
        # a maximum is that of several neighbours: any order of equal scores will do
        close(np.take_along_axis(np.asarray(score), theirs[..., :-window], -1), best, name)
        values = np.take_along_axis(each["v"], theirs[..., None], 2)
        close(values, a[f"snaporig_{name}_v"], name)
    mask = kvs.heavy_hitter_mask(w, hp["h2o_local_heavy_budget"])
    np.testing.assert_array_equal(mask.reshape(a["h2o_local_mask"].shape), a["h2o_local_mask"])


@pytest.mark.golden("kivi_quant")
def test_quantised_keys_and_values(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    bits, group = hp["bits"], hp["group_size"]
    assert hp["pack_word_bits"] == kq.WORD and hp["rounding"] == "half_to_even"
    restored = {}
    for name, axis in (("k", 2), ("v", 3)):
        found = kq.quantise(jnp.asarray(a[name]), bits, group, axis)
        np.testing.assert_array_equal(found.code, a[f"{name}_code"], name)
        close(found.scale, a[f"{name}_scale"].squeeze(axis + 1), f"{name}_scale")
        close(found.minimum, a[f"{name}_min"].squeeze(axis + 1), f"{name}_min")
        restored[name] = kq.dequantise(found, bits, group, axis)
        close(restored[name], a[f"{name}_deq"], f"{name}_deq")
    codes = jnp.moveaxis(kq.unpack(jnp.moveaxis(a["k_code"], 2, -1), bits), -1, 2)
    np.testing.assert_array_equal(codes, a["k_int"])
    last = jnp.full((1, 1), hp["seq_len"] - 1)
    for name, k, v in (("full", a["k"], a["v"]), ("quant", restored["k"], restored["v"])):
        y = attention(rows(a["q"]), rows(k), rows(v), q_positions=last, scale=hp["attention_scale"])
        close(y.swapaxes(1, 2), a[f"attn_{name}"], f"attn_{name}")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_within_half_a_step(bits: int) -> None:
    """Also where they leave part of a word empty, of constant groups, and of none."""
    x = np.random.default_rng(bits).normal(size=(3, 9, 6)).astype(np.float32)
    x[1, :3] = 0.7
    found = kq.quantise(jnp.asarray(x), bits, 3, 1)
    assert found.code.shape == (3, kq.words(9, bits), 6) and found.code.dtype == jnp.int32
    assert not found.scale[1, 0].any()
    back = np.asarray(kq.dequantise(found, bits, 3, 1))
    np.testing.assert_array_equal(back[1, :3], x[1, :3])
    groups = x.reshape(3, 3, 3, 6)
    step = (groups.max(2) - groups.min(2)) / (2**bits - 1)
    assert (np.abs(back - x).reshape(3, 3, 3, 6) <= 0.501 * step[:, :, None] + 1e-6).all()
    codes = np.random.default_rng(0).integers(2**bits, size=(2, 32))
    packed = np.asarray(kq.pack(jnp.asarray(codes), bits)).view(np.uint32)
    for i in range(32):
        word, place = divmod(i * bits, 32)
        np.testing.assert_array_equal(packed[:, word] >> place & (2**bits - 1), codes[:, i])
    none = kq.quantise(jnp.zeros((2, 0, 4)), bits, 3, 1)
    assert kq.dequantise(none, bits, 3, 1).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("length", "kept", "layers", "window", "beta", "expected"),
    [
        (1000, 100, 5, 8, 20.0, (100,) * 5),  # the last would keep 5
        (1000, 200, 5, 8, 20.0, (390, 295, 200, 105, 10)),
        (400, 300, 3, 8, 20.0, (392, 300, 208)),  # the first keeps what there is
        (400, 396, 3, 8, 20.0, (396, 396, 396)),  # the first would keep less than the last
        (1000, 200, 1, 8, 20.0, (200,)),
    ],
)
def test_pyramids(
    length: int, kept: int, layers: int, window: int, beta: float, expected: tuple[int, ...]
) -> None:
    budgets = kvs.pyramid_budgets(length, kept, layers, window, beta)
    assert budgets == expected and abs(np.mean(budgets) - kept) <= 0.5
