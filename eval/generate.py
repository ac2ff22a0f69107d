"""Text generation: the prompt in one pass, then one token per step from a key-value cache."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from numpy.typing import ArrayLike

from bestiary.eval.caching import Caching
from bestiary.eval.sampling import Sampling
from bestiary.layers.base import Array, Context, Param, Tree, is_param
from bestiary.train.tokenizer import Tokenizer, load_tokenizer
from bestiary.zoo.decoder import Decoder


class Tokens(NamedTuple):
    """What was chosen: [rows] in one step, [rows, steps] in all."""

    ids: np.ndarray
    """int32; -1 behind the end of a sequence."""
    log_probs: np.ndarray
    """float32: under the model, before temperature and filters; 0 behind the end."""


class State(NamedTuple):
    """What one decoding step hands to the next, in place."""

    cache: Tree
    history: Array | None
    """int32 [rows, length], the last token at the end, -1 in front; None where nothing reads it."""


def generate(
    model: Decoder,
    params: Tree,
    prompt: ArrayLike,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: Array,
    eos: int | None = None,
    num_samples: int = 1,
) -> Iterator[Tokens]:
    """Continues every prompt `num_samples` times, yielding a token of each row per step.

    The host reads a step while the device computes the next. Lengths are rounded up, so that
    prompts of similar length share their two compiled programs.

    Args:
      prompt: int32 [batch, T]; negative ids on the left pad shorter prompts.
      max_new_tokens: ends rows that did not end before.
      key: a PRNG key, of which row i uses fold_in(key, i), or a key per row [rows]. With the same
        key, a row is the same whatever shares its batch.
      eos: the token that ends a row, included in it; None: none does.
      num_samples: rows num_samples i and on continue prompt i.

    Raises:
      ValueError: for a prompt that is empty or has ids outside the vocabulary, or numbers below 1.
    """
    prompt = np.asarray(prompt, np.int32)
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if value < 1:
            raise ValueError(f"{name}: {value}; need at least 1")
    if prompt.ndim != 2 or not prompt.size:
        raise ValueError(f"prompt: shape {prompt.shape}; need [batch, T], both at least 1")
    if ((prompt < 0) & np.maximum.accumulate(prompt >= 0, 1)).any() or (prompt[:, -1] < 0).any():
        raise ValueError("prompt: negative ids pad on the left and leave at least one token")
    if prompt.max() >= model.vocab_size:
        raise ValueError(f"prompt: id {prompt.max()}; need ids below {model.vocab_size}")
    rows = len(prompt) * num_samples
    keys = key if key.ndim else jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))
    if keys.shape != (rows,):
        raise ValueError(f"key: shape {keys.shape}; need one key, or one for each of {rows} rows")

    padding = bucket(prompt.shape[1]) - prompt.shape[1]
    padded = np.pad(prompt, ((0, 0), (padding, 0)), constant_values=-1)
    length = bucket(prompt.shape[1] + max_new_tokens)
    state, *chosen = prefill(
        model, sampling, params, padded, keys, length=length, num_samples=num_samples
    )

    def steps(state: State, tokens: Array, log_probs: Array) -> Iterator[Tokens]:
        end = -1 if eos is None else eos
        for left in reversed(range(max_new_tokens)):
            current = tokens, log_probs
            if left:  # before reading: the device works on while the host waits and prints
                state, tokens, log_probs = decode(model, sampling, params, state, keys, tokens, end)
            step = Tokens(*jax.device_get(current))
            yield step
            if ((step.ids == end) | (step.ids < 0)).all():
                return

    return steps(state, *chosen)


def collect(steps: Iterable[Tokens]) -> Tokens:
    """All the steps of `generate` as arrays [rows, steps]."""
    ids, log_probs = zip(*steps, strict=True)
    return Tokens(np.stack(ids, 1), np.stack(log_probs, 1))


def bucket(length: int) -> int:
    """The next multiple of 16, or beyond 64 of a quarter of the power of two below: four sizes per
    doubling, and at most a quarter too much."""
    step = max(16, (1 << length.bit_length()) >> 3)
    return -(-length // step) * step


@partial(jax.jit, static_argnames=("length", "num_samples"))
def prefill(
    model: Decoder,
    sampling: Sampling,
    params: Tree,
    prompt: Array,
    keys: Array,
    *,
    length: int,
    num_samples: int,
) -> tuple[State, Array, Array]:
    """Reads prompts [batch, T] (negative: padding, on the left) into a cache of `length` positions.

    Every prompt is computed once and its cache repeated for its samples. Returns the state, and the
    first tokens and their log-probabilities [batch num_samples].
    """
    batch, size = prompt.shape
    positions = jnp.cumsum(prompt >= 0, 1, dtype=jnp.int32) - 1
    cache = model.init_cache(batch, length)
    x, cache, _ = model.hidden(params, prompt, Context(positions=positions), cache)
    z = model.logits(params, x[:, -1])

    def repeat(declared: Param, entry: Array) -> Array:
        return jnp.repeat(entry, num_samples, declared.axes.index("batch"))

    cache = jax.tree.map(repeat, model.cache_spec(batch, length), cache, is_leaf=is_param)
    history = None
    if sampling.uses_history:
        history = jnp.pad(prompt, ((0, 0), (length - size, 0)), constant_values=-1)
        history = jnp.repeat(history, num_samples, 0)
    return choose(sampling, State(cache, history), keys, jnp.repeat(z, num_samples, 0))


@partial(jax.jit, donate_argnames="state")
def decode(
    model: Decoder,
    sampling: Sampling,
    params: Tree,
    state: State,
    keys: Array,
    tokens: Array,
    eos: Array | int,
) -> tuple[State, Array, Array]:
    """One step: from the last tokens [rows] to the state, the next and their log-probabilities.

    Rows that ended, with `eos` or before, continue with -1.
    """
    x, cache, _ = model.hidden(params, tokens[:, None], Context(), state.cache)
    z = model.logits(params, x[:, -1])
    state, chosen, log_probs = choose(sampling, state._replace(cache=cache), keys, z)
    ended = (tokens == eos) | (tokens < 0)
    return state, jnp.where(ended, -1, chosen), jnp.where(ended, 0.0, log_probs)


def choose(sampling: Sampling, state: State, keys: Array, z: Array) -> tuple[State, Array, Array]:
    """Draws from logits [rows, vocab]; a token's randomness depends on its row's key and its
    position only."""
    keys = jax.vmap(jax.random.fold_in)(keys, state.cache["seen"])
    tokens = sampling.sample(keys, z, state.history)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(z, -1), tokens[:, None], 1)[:, 0]
    if state.history is not None:
        history = jnp.concatenate((state.history[:, 1:], tokens[:, None]), 1)
        state = state._replace(history=history)
    return state, tokens, log_probs


def stream_text(
    steps: Iterable[Tokens], tokenizer: Tokenizer, prompt: ArrayLike, file: TextIO | None = None
) -> None:
    """Prints prompt ids [T] and the first sample as it comes, then the other samples, which were
    made beside it."""
    file = sys.stdout if file is None else file
    decoder = tokenizer.decoder()
    ids: list[np.ndarray] = []
    for step in steps:
        if not ids:
            print(_header(0, len(step.ids)) + decoder.decode(prompt), end="", file=file)
        ids.append(step.ids)
        first = step.ids[:1]
        print(decoder.decode(first[first >= 0]), end="", file=file, flush=True)
    print(decoder.decode([], final=True), file=file)
    rows = np.stack(ids, 1)
    for i in range(1, len(rows)):
        text = tokenizer.decode(np.append(prompt, rows[i][rows[i] >= 0]))
        print(_header(i, len(rows)) + text, file=file)


def _header(row: int, rows: int) -> str:
    return f"--- sample {row + 1} of {rows} ---\n" if rows > 1 else ""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with a trained model."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    prompt: str
    """Text to continue."""
    num_samples: int = 1
    """How many continuations, made side by side."""
    max_new_tokens: int = 256
    """Length at which a continuation that did not end before is cut."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()
    caching: tyro.conf.OmitArgPrefixes[Caching] = Caching()
    seed: int = 0
    """Equal seeds give equal samples, however many are made at once."""
    json: bool = False
    """Print one JSON object: the prompt, and text, tokens and log-probabilities of each sample."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: ''; need at least one character")
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; need at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: {self.seed}; need 0 to 2**32 - 1")


def run(command: Generate) -> None:
    """`bestiary generate`. Raises ValueError for a directory that holds no readable run."""
    from bestiary.train.checkpoint import load_run
    from bestiary.train.experiment import language_model

    experiment, params = load_run(command.run_dir)
    model, data = language_model(experiment)
    tokenizer = load_tokenizer(data.tokenizer)
    prompt = tokenizer.encode(command.prompt)
    if command.caching.cache is not None:
        model, params, others = command.caching.apply(
            model, params, len(prompt), room=command.max_new_tokens
        )
        if others:
            print(f"cache: {', '.join(others)} as before", file=sys.stderr)
    steps = generate(
        model,
        params,
        prompt[None],
        max_new_tokens=command.max_new_tokens,
        key=jax.random.key(command.seed),
        sampling=command.sampling,
        eos=tokenizer.eos,
        num_samples=command.num_samples,
    )
    if command.json:
        samples = [
            _sample(tokenizer, prompt, ids[ids >= 0], log_probs[ids >= 0])
            for ids, log_probs in zip(*collect(steps), strict=True)
        ]
        print(json.dumps({"prompt": command.prompt, "samples": samples}))
    else:
        stream_text(steps, tokenizer, prompt)


def _sample(
    tokenizer: Tokenizer, prompt: np.ndarray, ids: np.ndarray, log_probs: np.ndarray
) -> dict[str, object]:
    decoder = tokenizer.decoder()
    decoder.decode(prompt)  # a token's leading space needs what stands before it
    text = decoder.decode(ids, final=True)
    return {"text": text, "tokens": ids.tolist(), "log_probs": log_probs.tolist()}
