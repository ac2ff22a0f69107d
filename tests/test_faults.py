"""Bit flips: golden vectors, words against NumPy's, how many flip, what is refused."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.eval.faults import Fixed, Int8, Native, faults, flip, flip_bit, number_format


def words(x: Any) -> np.ndarray:
    return np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")


def identical(a: Any, b: Any) -> bool:
    return np.array_equal(words(a), words(b))


@pytest.mark.golden("bitflip_weights")
def test_golden(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    assert hp["fixed_rounding"] == "trunc"
    w, bit = jnp.asarray(a["w"]), jnp.asarray(a["bit"])
    true = np.asarray(flip_bit(w, bit, Native(hp["ieee_dtype"])))
    np.testing.assert_array_equal(np.isfinite(true), a["ieee_true_is_finite"])
    np.testing.assert_array_equal(np.where(np.isfinite(true), true, 0), a["ieee_flipped_true"])
    fixed = Fixed(hp["word_bits"] - 1 - hp["n_frac"], hp["n_frac"])
    np.testing.assert_array_equal(fixed.decode(*fixed.encode(w)), a["w_fixed_quantised"])
    np.testing.assert_array_equal(flip_bit(w, bit, fixed), a["fixed_flipped"])


@pytest.mark.parametrize("m, n", [(15, 16), (0, 31), (31, 0), (3, 4), (0, 1), (7, 16), (7, 17)])
def test_fixed_point_words(m: int, n: int) -> None:
    """Against whole numbers in Python: rounding, saturation, and every bit."""
    w = np.array([0, 0.3, -0.3, 1.7, -1.7, 5.9, -6.2, 1e5, -1e5, 1e12, -1e12], np.float32)
    form, least, most = Fixed(m, n), -(2 ** (m + n)), 2 ** (m + n) - 1
    word = [min(max(int(float(v) * 2**n), least), most) for v in w]
    encoded, _ = form.encode(jnp.asarray(w))
    assert [int(v) % 2**form.bits for v in encoded] == [v % 2**form.bits for v in word]
    for bit in range(form.bits):
        flipped = [v % 2**form.bits ^ 2**bit for v in word]
        signed = [v - 2**form.bits if v > most else v for v in flipped]
        actual = flip_bit(jnp.asarray(w), jnp.full(w.shape, bit), form)
        np.testing.assert_array_equal(actual, np.float32(signed) * np.float32(2.0**-n))


def test_other_formats() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
    for name in ("bfloat16", "float16"):
        stored = words(w.astype(name))
        for bit in (0, 7, 15):
            expected = (stored ^ np.uint16(1 << bit)).view(jnp.dtype(name)).astype(np.float32)
            actual = flip_bit(w, jnp.full(50, bit), number_format(name))
            np.testing.assert_array_equal(actual, expected)
    scale = np.abs(w).max() / np.float32(127)
    q = np.round(np.asarray(w) / scale).astype(np.int8)
    for bit in (0, 7):
        expected = (q.view(np.uint8) ^ np.uint8(1 << bit)).view(np.int8) * scale
        np.testing.assert_allclose(flip_bit(w, jnp.full(50, bit), Int8()), expected, rtol=1e-6)
    assert not np.asarray(flip_bit(jnp.zeros(3), jnp.zeros(3, int), Int8()) > 1e-30).any()


TREE = {
    "a": jnp.linspace(-2, 2, 40_000).reshape(200, 200),
    "b": {"c": jnp.ones(30_000, jnp.bfloat16), "d": jnp.arange(20_000, dtype=jnp.int8)},
}


def test_how_many_flip() -> None:
    """Within five standard deviations of the binomial, for every bit alike; reproducible."""
    rate, key = 3e-3, jax.random.key(1)
    faulty = flip(TREE, key, rate)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), faulty) == jax.tree.map(
        lambda x: (x.shape, x.dtype), TREE
    )
    for before, after in zip(jax.tree.leaves(TREE), jax.tree.leaves(faulty), strict=True):
        bits = 8 * before.dtype.itemsize
        mask = (words(before) ^ words(after)).reshape(-1)
        for bit in range(bits):
            count, mean = (mask >> bit & 1).sum(), mask.size * rate
            assert abs(count - mean) < 5 * mean**0.5
    again, other = flip(TREE, key, rate), flip(TREE, jax.random.key(2), rate)
    assert all(jax.tree.leaves(jax.tree.map(identical, again, faulty)))
    assert not identical(other["a"], faulty["a"])


def test_small_rates_are_exact() -> None:
    """2e-8 of 2^28 bits: 5.4 expected; the steps of a uniform float32 would give 32 or none."""
    count = jax.jit(lambda key: jax.lax.population_count(faults(key, (2**20,), 32, 2e-8)).sum())
    total = sum(int(count(jax.random.key(i))) for i in range(8))
    assert 1 <= total <= 17
    assert not np.asarray(faults(jax.random.key(0), (99,), 8, 0.0)).any()
    assert (np.asarray(faults(jax.random.key(0), (99,), 8, 1.0)) == 255).all()


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    sharded = TREE | {"a": jax.device_put(TREE["a"], where)}
    expected, actual = (flip(t, jax.random.key(3), 1e-2, Fixed(15, 16)) for t in (TREE, sharded))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda: Native("float64"), "dtype: float64; need floats or integers of 8 to 32 bits"),
        (
            lambda: Fixed(20, 16),
            "Q20.16: need 1 to 31 bits beside the sign, none negative",
        ),
        (
            lambda: number_format("int3"),
            "format: unknown 'int3'; need one of float32, bfloat16, float16, int8, q15.16",
        ),
        (
            lambda: flip({"a": jnp.ones(2, bool)}, jax.random.key(0), 0.1),
            "dtype: bool; need floats or integers of 8 to 32 bits",
        ),
    ],
)
def test_refuses(run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run()
