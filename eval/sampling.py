"""From logits to the next token: filters, Gumbel-max draws and speculative acceptance.

Filters take logits [batch, vocab] and set what they remove to -inf. They follow Hugging Face
transformers, except that tokens of equal logit stay or go together.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array


def temperature(z: Array, value: float) -> Array:
    """z / value: above 1 flattens the distribution, below 1 sharpens it."""
    return z / value


def top_k(z: Array, k: int) -> Array:
    """Keeps the `k` largest logits."""
    return jnp.where(z < _largest(z, k), -jnp.inf, z)


def top_p(z: Array, mass: float, keep: int = 1) -> Array:
    """Keeps the likeliest tokens up to the one that crosses `mass` (Holtzman et al. 2020)."""
    ascending = jnp.sort(z, -1)
    below = jnp.cumsum(jax.nn.softmax(ascending, -1), -1) <= 1 - mass
    threshold = jnp.where(below, jnp.inf, ascending).min(-1, keepdims=True)
    return _drop(z, z < threshold, keep)


def min_p(z: Array, share: float, keep: int = 1) -> Array:
    """Drops p < share * max p (Nguyen et al. 2024)."""
    p = jax.nn.softmax(z, -1)
    return _drop(z, p < share * p.max(-1, keepdims=True), keep)


def typical(z: Array, mass: float, keep: int = 1) -> Array:
    """Keeps the tokens whose surprise -ln p is nearest to the entropy, up to `mass` (Meister et al.
    2022); `keep` of them at least."""
    p, entropy = _entropy(z)
    distance = jnp.abs(-jax.nn.log_softmax(z, -1) - entropy)
    order = jnp.argsort(distance, -1)
    nearest = jnp.take_along_axis(distance, order, -1)
    before = jnp.cumsum(jnp.take_along_axis(p, order, -1), -1) < mass
    last = jnp.maximum(before.sum(-1, keepdims=True), keep - 1)
    last = jnp.minimum(last, z.shape[-1] - 1)
    return jnp.where(distance > jnp.take_along_axis(nearest, last, -1), -jnp.inf, z)


def epsilon_cutoff(z: Array, epsilon: float, keep: int = 1) -> Array:
    """Drops p < epsilon (Hewitt et al. 2022)."""
    return _drop(z, jax.nn.softmax(z, -1) < epsilon, keep)


def eta_cutoff(z: Array, epsilon: float, keep: int = 1) -> Array:
    """Drops p < min(epsilon, sqrt(epsilon) exp(-entropy)) (Hewitt et al. 2022)."""
    p, entropy = _entropy(z)
    return _drop(z, p < jnp.minimum(epsilon, math.sqrt(epsilon) * jnp.exp(-entropy)), keep)


def repetition_penalty(z: Array, tokens: Array, penalty: float) -> Array:
    """Seen tokens: z / penalty where z > 0, else z * penalty (Keskar et al. 2019).

    `tokens` int32 [batch, T] are those so far; negative ones are padding.
    """
    return jnp.where(_mark(z, tokens), jnp.where(z > 0, z / penalty, z * penalty), z)


def no_repeat_ngram(z: Array, tokens: Array, n: int) -> Array:
    """Drops what would complete an n-gram of `tokens` [batch, T] again (negative: padding, on the
    left), unless that is everything."""
    if tokens.shape[1] < n:
        return z
    starts = jnp.arange(tokens.shape[1] - n + 1)
    windows = tokens[:, starts[:, None] + jnp.arange(n)]  # [batch, windows, n]
    suffix = tokens[:, tokens.shape[1] - n + 1 :]
    repeats = (windows[..., :-1] == suffix[:, None]).all(-1) & (windows >= 0).all(-1)
    dropped = jnp.where(_mark(z, jnp.where(repeats, windows[..., -1], -1)), -jnp.inf, z)
    return jnp.where(jnp.isneginf(dropped).all(-1, keepdims=True), z, dropped)


def guidance(conditional: Array, unconditional: Array, scale: float) -> Array:
    """u + scale (c - u) on log-probabilities: classifier-free guidance (Sanchez et al. 2023)."""
    c, u = jax.nn.log_softmax(conditional, -1), jax.nn.log_softmax(unconditional, -1)
    return u + scale * (c - u)


def draw(keys: Array, z: Array) -> Array:
    """One token per row, int32 [batch], of softmax(z): argmax(z + Gumbel noise).

    Every row has a key of its own, so that it does not matter which rows share a batch.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, z.shape[1:], jnp.float32))(keys)
    return jnp.argmax(z + noise, -1).astype(jnp.int32)


def accept_drafts(
    target: Array, draft: Array | None, tokens: Array, uniforms: Array
) -> tuple[Array, Array]:
    """Speculative sampling (Leviathan et al. 2023): which drafts to keep, and what comes next.

    Args:
      target: [batch, K + 1, vocab] logits of the model, filtered as in plain decoding.
      draft: [batch, K, vocab] logits the drafts were drawn from; None: drafted without
        probabilities (a look-up), which counts as certain.
      tokens: int32 [batch, K], the drafts.
      uniforms: [batch, K] in [0, 1).

    Returns:
      How many leading drafts are accepted, while u <= p / q: int32 [batch]. And the distribution
      [batch, vocab] of the token after them: max(p - q, 0), normalised, at the rejected position,
      or p at position K. Accepted drafts and one draw from it are distributed as plain samples.
    """
    p = jax.nn.softmax(target, -1)
    hit = jax.nn.one_hot(tokens, p.shape[-1], dtype=p.dtype)
    q = hit if draft is None else jax.nn.softmax(draft, -1)
    p_token, q_token = (p[:, :-1] * hit).sum(-1), (q * hit).sum(-1)
    accepted = (uniforms * q_token <= p_token) & (p_token > 0)  # u may be 0
    count = jnp.cumprod(accepted, -1, dtype=jnp.int32).sum(-1)
    q = jnp.concatenate((q, jnp.zeros_like(q[:, :1])), 1)  # nothing was drafted at position K
    p, q = (jnp.take_along_axis(a, count[:, None, None], 1)[:, 0] for a in (p, q))
    rest = jnp.maximum(p - q, 0)
    total = rest.sum(-1, keepdims=True)
    return count, jnp.where(total > 0, rest / jnp.where(total > 0, total, 1), p)


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability."""
    typical_p: float = 1.0
    """Keep the tokens of most typical surprise that together reach this probability."""
    epsilon_cutoff: float = 0.0
    """Drop tokens less likely than this."""
    eta_cutoff: float = 0.0
    """Drop tokens less likely than this, or than a bound that falls with the entropy."""
    repetition_penalty: float = 1.0
    """Make tokens that have occurred less likely (above 1) or more likely (below 1)."""
    no_repeat_ngram_size: int = 0
    """Let no run of this many tokens occur twice; 0: any may."""
    min_tokens_to_keep: int = 1
    """Leave at least this many tokens to choose from."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "0 (off) to 1"),
            "typical_p": (0 < self.typical_p <= 1, "above 0, at most 1 (off)"),
            "epsilon_cutoff": (0 <= self.epsilon_cutoff < 1, "0 (off) or more, below 1"),
            "eta_cutoff": (0 <= self.eta_cutoff < 1, "0 (off) or more, below 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1: off)"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            "min_tokens_to_keep": (self.min_tokens_to_keep >= 1, "1 or more"),
        }
        for name, (holds, need) in rules.items():
            if not holds:
                raise ValueError(f"{name}: {getattr(self, name)}; need {need}")

    @property
    def uses_history(self) -> bool:
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0

    def filter(self, z: Array, tokens: Array | None = None) -> Array:
        """The logits [batch, vocab] whose softmax is sampled from.

        In the order of transformers, each filter on the output of the one before. `tokens` int32
        [batch, T], the sequence so far (negative: padding, on the left), is needed for
        `repetition_penalty` and `no_repeat_ngram_size`; ValueError when it is missing.
        """
        z, keep = z.astype(jnp.float32), self.min_tokens_to_keep
        if self.uses_history:
            if tokens is None:
                raise ValueError("tokens: None; repetition rules need the sequence so far")
            z = repetition_penalty(z, tokens, self.repetition_penalty)
            if self.no_repeat_ngram_size:
                z = no_repeat_ngram(z, tokens, self.no_repeat_ngram_size)
        if self.temperature == 0:
            best = jnp.argmax(z, -1, keepdims=True)
            return jnp.where(jnp.arange(z.shape[-1]) == best, z, -jnp.inf)
        z = temperature(z, self.temperature)
        if self.top_k:
            z = top_k(z, max(self.top_k, keep))
        if self.top_p < 1:
            z = top_p(z, self.top_p, keep)
        if self.min_p:
            z = min_p(z, self.min_p, keep)
        if self.typical_p < 1:
            z = typical(z, self.typical_p, keep)
        if self.epsilon_cutoff:
            z = epsilon_cutoff(z, self.epsilon_cutoff, keep)
        if self.eta_cutoff:
            z = eta_cutoff(z, self.eta_cutoff, keep)
        return z

    def sample(self, keys: Array, z: Array, tokens: Array | None = None) -> Array:
        """Tokens int32 [batch] drawn from the filtered logits, with one key per row."""
        return draw(keys, self.filter(z, tokens))


def _largest(z: Array, k: int) -> Array:
    """The `k`-th largest logit of each row (the smallest, if there are fewer)."""
    return jax.lax.top_k(z, min(k, z.shape[-1]))[0][..., -1:]


def _drop(z: Array, drop: Array, keep: int) -> Array:
    return jnp.where(drop & (z < _largest(z, keep)), -jnp.inf, z)


def _entropy(z: Array) -> tuple[Array, Array]:
    """Probabilities [batch, vocab] and their entropy [batch, 1]; removed tokens add none."""
    p, log_p = jax.nn.softmax(z, -1), jax.nn.log_softmax(z, -1)
    return p, -jnp.where(p > 0, p * log_p, 0).sum(-1, keepdims=True)


def _mark(z: Array, tokens: Array) -> Array:
    """Which entries of the vocabulary occur in `tokens` [batch, T]: bool, shaped as `z`."""
    rows = jnp.arange(z.shape[0])[:, None]
    columns = jnp.where(tokens < 0, z.shape[1], tokens)  # out of range: dropped
    return jnp.zeros(z.shape, bool).at[rows, columns].set(True, mode="drop")
