"""Sampling: filters against published code, invariants, and the statistics of draws."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.eval import sampling
from bestiary.eval.sampling import Sampling, accept_drafts, draw

KEY = jax.random.key(0)
# name of the setting -> (logits, tokens, value, least) -> logits
STEPS = {
    "repetition_penalty": lambda z, t, v, n: sampling.repetition_penalty(z, t, v),
    "no_repeat_ngram_size": lambda z, t, v, n: sampling.no_repeat_ngram(z, t, v),
    "temperature": lambda z, t, v, n: sampling.temperature(z, v),
    "top_k": lambda z, t, v, n: sampling.top_k(z, max(v, n)),
    "top_p": lambda z, t, v, n: sampling.top_p(z, v, n),
    "min_p": lambda z, t, v, n: sampling.min_p(z, v, n),
    "typical_p": lambda z, t, v, n: sampling.typical(z, v, n),
    "epsilon_cutoff": lambda z, t, v, n: sampling.epsilon_cutoff(z, v, n),
    "eta_cutoff": lambda z, t, v, n: sampling.eta_cutoff(z, v, n),
}
# array of the golden file -> name of the setting
ARRAYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical": "typical_p",
    "epsilon": "epsilon_cutoff",
    "eta": "eta_cutoff",
    "rep": "repetition_penalty",
    "ngram": "no_repeat_ngram_size",
}


def same_distribution(z, expected):
    actual = np.asarray(jax.nn.softmax(z, -1))
    np.testing.assert_array_equal(actual == 0, expected == 0)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-8)


@pytest.mark.golden("sampling_filters")
def test_filters_match_the_published_code(golden):
    z, tokens, least = (
        golden.arrays["scores"],
        golden.arrays["input_ids"],
        golden.hp["min_tokens_to_keep"],
    )
    for array, name in ARRAYS.items():
        value = golden.hp[name]
        alone = Sampling(**{name: value, "min_tokens_to_keep": least})
        same_distribution(jax.jit(alone.filter)(z, tokens), golden.arrays[array])

    order = golden.hp["chain_order"]
    chain = z
    for name in order:
        chain = STEPS[name](chain, tokens, golden.hp[name], least)
    same_distribution(chain, golden.arrays["chain"])
    if order == [name for name in STEPS if name in order]:  # the one order that Sampling has
        together = Sampling(**{n: golden.hp[n] for n in order}, min_tokens_to_keep=least)
        same_distribution(together.filter(z, tokens), golden.arrays["chain"])

    guided = sampling.guidance(z, golden.arrays["cfg_uncond"], golden.hp["guidance_scale"])
    same_distribution(guided, golden.arrays["cfg"])


@pytest.mark.golden("sampling_filters")
def test_speculation_matches_the_published_code(golden):
    count, after = jax.jit(accept_drafts)(
        golden.arrays["spec_target_logits"],
        golden.arrays["spec_draft_logits"],
        golden.arrays["spec_draft_tokens"],
        golden.arrays["spec_u"],
    )
    np.testing.assert_array_equal(count, golden.arrays["spec_n_accepted"])
    np.testing.assert_allclose(after, golden.arrays["spec_next_probs"], rtol=2e-5, atol=1e-7)


@st.composite
def settings_and_logits(draw):
    unit = st.floats(0.01, 0.99)
    fields = {
        "temperature": st.floats(0.0, 3.0).filter(lambda t: t == 0 or t > 0.05),
        "top_k": st.integers(0, 30),
        "top_p": unit,
        "min_p": unit,
        "typical_p": unit,
        "epsilon_cutoff": unit,
        "eta_cutoff": unit,
        "repetition_penalty": st.floats(0.5, 2.0),
        "no_repeat_ngram_size": st.integers(0, 3),
        "min_tokens_to_keep": st.integers(1, 4),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(fields))))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    z = rng.normal(0, draw(st.sampled_from([0.0, 0.1, 3.0, 30.0])), (2, 11)).astype(np.float32)
    tokens = rng.integers(-1, 11, (2, 9), dtype=np.int32)
    return Sampling(**{name: draw(fields[name]) for name in sorted(chosen)}), z, tokens


@settings(max_examples=60, deadline=None)
@given(settings_and_logits())
def test_filters_leave_a_distribution_and_never_nothing(case):
    chosen, z, tokens = case
    filtered = np.asarray(chosen.filter(z, tokens))
    np.testing.assert_allclose(np.exp(jax.nn.log_softmax(filtered, -1)).sum(-1), 1, rtol=1e-5)
    kept = filtered > -np.inf
    if chosen.temperature and not chosen.no_repeat_ngram_size:
        assert (kept.sum(-1) >= chosen.min_tokens_to_keep).all()
    if not chosen.uses_history:  # what stays keeps its order
        for before, after, stays in zip(z, filtered, kept, strict=True):
            assert (np.diff(after[stays][np.argsort(before[stays], kind="stable")]) >= 0).all()


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_a_stricter_threshold_keeps_less(name):
    z = jax.random.normal(KEY, (3, 50))
    values = {"top_k": [40, 9, 1], "top_p": [0.9, 0.5, 0.01], "min_p": [0.01, 0.3, 1.0]}[name]
    kept = [np.asarray(Sampling(**{name: v}).filter(z)) > -np.inf for v in values]
    for loose, strict in itertools.pairwise(kept):
        assert (strict <= loose).all() and strict.sum() < loose.sum()
    np.testing.assert_array_equal(kept[-1].sum(-1), 1)


def test_top_p_keeps_the_token_that_crosses_the_mass():
    z = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for mass, count in [(0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4)]:
        assert (sampling.top_p(z, mass) > -jnp.inf).sum() == count


def test_equal_logits_stay_together():
    z = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    for kept in (sampling.top_k(z, 1), sampling.top_p(z, 0.1), sampling.min_p(z, 1.0)):
        np.testing.assert_array_equal(kept > -jnp.inf, [[False, True, True, False]])


def test_ngrams_of_padding_do_not_count():
    z = jnp.zeros((2, 7))
    tokens = jnp.array([[-1, -1, 3, 4, 3], [3, 4, 3, 5, 3]])
    dropped = jnp.isneginf(sampling.no_repeat_ngram(z, tokens, 2))
    assert [np.flatnonzero(row).tolist() for row in dropped] == [[4], [4, 5]]
    dropped = jnp.isneginf(sampling.no_repeat_ngram(z, tokens, 1))
    assert [np.flatnonzero(row).tolist() for row in dropped] == [[3, 4], [3, 4, 5]]
    everything = sampling.no_repeat_ngram(z, jnp.tile(jnp.arange(7), (2, 1)), 1)
    np.testing.assert_array_equal(everything, z)


def test_temperature_zero_is_greedy():
    z = jax.random.normal(KEY, (5, 23))
    keys = jax.random.split(KEY, 5)
    np.testing.assert_array_equal(Sampling(temperature=0).sample(keys, z), z.argmax(-1))
    tied = Sampling(temperature=0).filter(jnp.zeros((1, 4)))
    np.testing.assert_array_equal(jax.nn.softmax(tied), [[1, 0, 0, 0]])


def test_a_row_is_drawn_the_same_in_any_batch():
    z, keys = jax.random.normal(KEY, (6, 31)), jax.random.split(KEY, 6)
    chosen = Sampling(temperature=0.8, top_p=0.9)
    sample = jax.jit(chosen.sample)
    whole = sample(keys, z)
    np.testing.assert_array_equal(sample(keys[::-1], z[::-1]), whole[::-1])
    for row in range(6):
        assert sample(keys[row : row + 1], z[row : row + 1]) == whole[row]


def chi_square(counts, p):
    """Pearson's statistic, as standard deviations above its mean."""
    expected = counts.sum() * p
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    freedom = used.sum() - 1
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_draws_follow_the_filtered_distribution():
    z = jax.random.normal(KEY, (1, 12))
    chosen, n = Sampling(temperature=1.3, top_k=9), 40_000
    tokens = jax.jit(chosen.sample)(jax.random.split(KEY, n), jnp.tile(z, (n, 1)))
    p = np.asarray(jax.nn.softmax(chosen.filter(z), -1)[0], np.float64)
    assert chi_square(np.bincount(tokens, minlength=12), p) < 3.5


@pytest.mark.parametrize("drafted", ["drawn", "looked up", "greedy target"])
def test_speculation_does_not_change_the_distribution(drafted):
    """The first token of a speculative round is distributed as one drawn from the model."""
    n, k, vocab = 40_000, 2, 6
    target = jax.random.normal(jax.random.key(1), (1, k + 1, vocab))
    if drafted == "greedy target":
        target = Sampling(temperature=0).filter(target[0])[None]
    draft = jax.random.normal(jax.random.key(2), (1, k, vocab))

    @jax.jit
    def round_of(key):
        keys = jax.random.split(key, (4, n))
        tiled = jnp.broadcast_to(draft, (n, k, vocab))
        tokens = jnp.stack([draw(keys[i], tiled[:, i]) for i in range(k)], 1)
        if drafted == "looked up":
            tokens, tiled = jnp.broadcast_to(jnp.array([2, 4]), (n, k)), None
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (k,)))(keys[2])
        p = jnp.broadcast_to(target, (n, k + 1, vocab))
        count, after = accept_drafts(p, tiled, tokens, uniforms)
        return jnp.where(count > 0, tokens[:, 0], draw(keys[3], jnp.log(after)))

    counts = np.bincount(round_of(jax.random.key(3)), minlength=vocab)
    p = np.asarray(jax.nn.softmax(target[0, 0]), np.float64)
    if drafted == "greedy target":
        assert counts[p.argmax()] == n
    else:
        assert chi_square(counts, p) < 3.5


def test_equal_distributions_accept_everything():
    z = jax.random.normal(KEY, (4, 3, 8))
    tokens = jnp.argmin(z[:, :2], -1)
    count, after = jax.jit(accept_drafts)(z, z[:, :2], tokens, jnp.full((4, 2), 0.999))
    np.testing.assert_array_equal(count, 2)
    np.testing.assert_allclose(after, jax.nn.softmax(z[:, 2]), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf]),
        ("top_k", [-1]),
        ("top_p", [0.0, -1.0, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("typical_p", [0.0, 1.1]),
        ("epsilon_cutoff", [-0.1, 1.0]),
        ("eta_cutoff", [-0.1, 1.0]),
        ("repetition_penalty", [0.0, -1.0, math.inf]),
        ("no_repeat_ngram_size", [-1]),
        ("min_tokens_to_keep", [0]),
    ],
)
def test_impossible_settings_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: {value}; need [^\n]+$"):
            Sampling(**{name: value})


def test_every_setting_is_one_of_the_filters_tested_here():
    assert {f.name for f in dataclasses.fields(Sampling)} == {*STEPS, "min_tokens_to_keep"}


def test_repetition_rules_need_the_tokens():
    with pytest.raises(ValueError, match="^tokens: None; "):
        Sampling(repetition_penalty=1.1).filter(jnp.zeros((1, 3)))
