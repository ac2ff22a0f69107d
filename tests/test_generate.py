"""Generation: the cache against repeated full forwards, batching, streaming, and the command."""

import functools
import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.eval import generate as generation
from bestiary.eval.caching import Caching
from bestiary.eval.generate import Generate, Tokens, bucket, collect, generate, stream_text
from bestiary.eval.sampling import Sampling
from bestiary.layers.attention import Attention
from bestiary.layers.base import flatten
from bestiary.layers.kv_selection import pyramid_budgets
from bestiary.layers.spark import SparkAttention, SparkFFN
from bestiary.train.data import Data
from bestiary.train.tokenizer import ByteTokenizer
from bestiary.zoo.gemma2 import geglu, gemma2
from bestiary.zoo.llama import llama, swiglu

VOCAB, DIM = 53, 24
GREEDY = Sampling(temperature=0)
KEY = jax.random.key(7)
HEADS: dict[str, Any] = dict(dim=DIM, num_heads=4, num_kv_heads=2, head_dim=8)


def models():
    ffn = SparkFFN(dim=DIM, hidden=40, predictor_dim=11, top_k=7)
    spark = SparkAttention(**HEADS, predictor_dim=2, top_k=4)
    sizes: dict[str, Any] = dict(vocab_size=VOCAB, num_layers=2)
    dense = Attention(**HEADS)
    return {
        "llama": llama(**sizes, attention=dense, ffn=swiglu(DIM, 40)),
        "gemma2": gemma2(**sizes, attention=dense, ffn=geglu(DIM, 40), window=5),
        "spark": gemma2(**sizes, attention=spark, ffn=ffn, window=6),
    }


MODELS = models()


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@functools.cache
def weights(model):
    """Larger than at the start of training, so that tokens depend on all that came before."""
    return jax.jit(lambda key: jax.tree.map(lambda w: 3 * w, model.init(key)))(KEY)


def prompts(batch, length):
    return np.random.default_rng(0).integers(0, VOCAB, (batch, length), dtype=np.int32)


def full_forward(model, prompt, steps):
    """Greedy tokens and their log-probabilities without a cache, one whole forward per token.

    Behind the end of the sequence stands garbage that causality hides: one compilation serves all.
    """
    ids, log_probs = list(prompt), []
    for _ in range(steps):
        z = log_softmax(model, weights(model), np.pad(ids, (0, 24 - len(ids)))[None])[0]
        z = z[len(ids) - 1]
        ids.append(int(z.argmax()))
        log_probs.append(z.max())
    return np.array(ids[len(prompt) :]), np.array(log_probs)


@jax.jit
def log_softmax(model, params, tokens):
    return jax.nn.log_softmax(model.apply(params, tokens)[0], -1)


def test_greedy_equals_the_argmax_of_full_forwards(model):
    """For prompts of 13, 7 and 2 tokens in one batch: longer and shorter than the windows."""
    prompt, steps = prompts(3, 13), 8
    prompt[1, :6] = prompt[2, :11] = -1
    options: dict[str, Any] = dict(max_new_tokens=steps, sampling=GREEDY, key=KEY)
    ids, log_probs = collect(generate(model, weights(model), prompt, **options))
    for row, tokens, log_prob in zip(prompt, ids, log_probs, strict=True):
        expected, expected_log_prob = full_forward(model, row[row >= 0], steps)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_allclose(log_prob, expected_log_prob, rtol=1e-4, atol=1e-4)
    assert len(np.unique(ids)) > 3


def test_samples_share_a_prefill_and_do_not_depend_on_the_batch():
    model = MODELS["gemma2"]
    params, prompt = weights(model), prompts(2, 10)
    options: dict[str, Any] = dict(max_new_tokens=5, sampling=Sampling(temperature=2.0, top_k=20))
    several = collect(generate(model, params, prompt, **options, key=KEY, num_samples=3)).ids
    assert several.shape == (6, 5)
    assert len(np.unique(several, axis=0)) == 6
    one = collect(generate(model, params, prompt[:1], **options, key=KEY)).ids
    np.testing.assert_array_equal(one, several[:1])
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(6))
    last = collect(generate(model, params, prompt[1:], **options, key=keys[5:])).ids
    np.testing.assert_array_equal(last, several[5:])
    repeated = generate(model, params, prompt.repeat(3, 0), **options, key=keys)
    np.testing.assert_array_equal(collect(repeated).ids, several)
    assert not keys.is_deleted()


def test_repetition_rules_see_prompt_and_samples():
    model = MODELS["llama"]
    params, prompt = weights(model), prompts(2, 9)
    prompt[1, :4] = -1
    options: dict[str, Any] = dict(max_new_tokens=20, key=KEY)
    ids = collect(
        generate(
            model, params, prompt, **options, sampling=Sampling(no_repeat_ngram_size=1, top_k=3)
        )
    ).ids
    for row, new in zip(prompt, ids, strict=True):
        whole = np.concatenate((row[row >= 0], new))
        seen = len(np.unique(row[row >= 0]))
        assert len(np.unique(whole)) == seen + len(new)
    plain = collect(generate(model, params, prompt, **options, sampling=GREEDY)).ids
    punished = Sampling(temperature=0, repetition_penalty=50.0)
    varied = collect(generate(model, params, prompt, **options, sampling=punished)).ids
    assert all(len(np.unique(a)) > len(np.unique(b)) for a, b in zip(varied, plain, strict=True))


def test_a_bucket_of_lengths_shares_two_programs():
    model = MODELS["llama"]
    params, chosen = weights(model), Sampling(temperature=0.9, min_p=0.01)
    programs: list[Any] = [generation.prefill, generation.decode]
    before = [program._cache_size() for program in programs]
    for size, steps, eos in [(3, 20, None), (16, 13, 4), (9, 22, 51)]:
        options: dict[str, Any] = dict(max_new_tokens=steps, sampling=chosen, key=KEY, eos=eos)
        collect(generate(model, params, prompts(1, size), **options))
    assert [program._cache_size() for program in programs] == [n + 1 for n in before]


def test_buckets_are_few_and_not_much_larger():
    sizes = np.arange(1, 5000)
    rounded = np.array([bucket(int(size)) for size in sizes])
    assert (rounded >= sizes).all() and (np.diff(rounded) >= 0).all()
    assert (rounded[64:] < 1.25 * sizes[64:]).all() and len(set(rounded)) < 30
    assert all(bucket(int(size)) == size for size in rounded)


def test_rows_end_at_eos_and_the_stream_with_the_last():
    model = MODELS["llama"]
    params, prompt = weights(model), prompts(2, 8)
    options: dict[str, Any] = dict(max_new_tokens=12, sampling=GREEDY, key=KEY)
    free = collect(generate(model, params, prompt, **options))
    eos = int(free.ids[0, 4])
    first = [row.tolist().index(eos) if eos in row else None for row in free.ids]
    assert first[0] is not None
    ids, log_probs = collect(generate(model, params, prompt, **options, eos=eos))
    for row, end in enumerate(first):
        end = ids.shape[1] if end is None else end + 1
        np.testing.assert_array_equal(ids[row, :end], free.ids[row, :end])
        assert (ids[row, end:] == -1).all() and (log_probs[row, end:] == 0).all()
    alone = collect(generate(model, params, prompt[:1], **options, eos=eos)).ids
    assert alone.shape == (1, first[0] + 1)


def test_the_device_is_a_step_ahead_of_the_reader(monkeypatch):
    model = MODELS["llama"]
    calls, decode = [], generation.decode
    monkeypatch.setattr(generation, "decode", lambda *args: calls.append(1) or decode(*args))
    steps = generate(
        model, weights(model), prompts(1, 15), max_new_tokens=3, sampling=GREEDY, key=KEY
    )
    ahead = [len(calls) for _ in steps]
    assert ahead == [1, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.zeros((2, 0), np.int32)}, r"prompt: shape \(2, 0\)"),
        ({"prompt": np.zeros(3, np.int32)}, r"prompt: shape \(3,\)"),
        ({"prompt": np.array([[1, -1, 2]])}, "prompt: negative ids pad on the left"),
        ({"prompt": np.array([[-1, -1]])}, "prompt: negative ids pad on the left"),
        ({"prompt": np.array([[5, VOCAB]])}, f"prompt: id {VOCAB}; need ids below {VOCAB}"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0; need at least 1"),
        ({"num_samples": 0}, "num_samples: 0; need at least 1"),
        ({"key": jax.random.split(KEY, 3)}, r"key: shape \(3,\)"),
    ],
)
def test_impossible_arguments_are_refused_at_once(change, message):
    model = MODELS["llama"]
    options: dict[str, Any] = dict(
        prompt=np.array([[1, 2]]), max_new_tokens=2, sampling=GREEDY, key=KEY
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(model, {}, **(options | change))


def steps_of(*rows):
    """What `generate` would yield for rows of bytes; shorter rows end early."""
    length = max(map(len, rows))
    padded = np.array([[*row, *[-1] * (length - len(row))] for row in rows], np.int32)
    return [Tokens(column, np.zeros(len(rows), np.float32)) for column in padded.T]


def test_text_streams_character_by_character():
    class Recorder(io.StringIO):
        seen: list[str] = []

        def flush(self):
            self.seen.append(self.getvalue())

    file = Recorder()
    prompt = np.frombuffer("né".encode(), np.uint8)
    stream_text(steps_of("aöz".encode() + b"\xff"), ByteTokenizer(), prompt, file)
    assert Recorder.seen == ["néa", "néa", "néaö", "néaöz", "néaöz"]
    assert file.getvalue() == "néaöz\n"


def test_several_samples_are_printed_one_after_the_other():
    file = io.StringIO()
    prompt = np.frombuffer(b"Go", np.uint8)
    stream_text(steps_of(b" on\xff", b"ne", "ö".encode()[:1]), ByteTokenizer(), prompt, file)
    assert file.getvalue() == (
        "--- sample 1 of 3 ---\nGo on\n--- sample 2 of 3 ---\nGone\n"
        "--- sample 3 of 3 ---\nGo\ufffd\n"
    )


@pytest.fixture
def loaded(monkeypatch):
    """A run that holds the tiny model on bytes."""
    model = llama(vocab_size=256, num_layers=1, attention=Attention(**HEADS), ffn=swiglu(DIM, 40))
    run = SimpleNamespace(model=model, data=Data()), weights(model)
    module = SimpleNamespace(load_run=lambda path: run)
    monkeypatch.setitem(sys.modules, "bestiary.train.checkpoint", module)


@pytest.mark.parametrize("name", ["sinks-window", "h2o", "snapkv", "pyramidkv", "kivi4"])
def test_a_roomy_cache_changes_nothing(name):
    """The prompts of a batch have lengths of their own."""
    model = MODELS["llama"]
    settings = {"cache_group_size": 8} if name == "kivi4" else {}
    caching = Caching(cache=name, **settings)
    changed, params, _ = caching.apply(model, weights(model), 13, room=9)
    prompt = prompts(3, 13)
    prompt[1, :6] = prompt[2, :11] = -1
    options: dict[str, Any] = dict(max_new_tokens=9, sampling=GREEDY, key=KEY)
    expected = collect(generate(model, weights(model), prompt, **options))
    found = collect(generate(changed, params, prompt, **options))
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)


def test_pyramidkv_keeps_less_in_every_further_layer():
    model = llama(vocab_size=9, num_layers=3, attention=Attention(**HEADS), ffn=swiglu(DIM, 40))
    caching = Caching(cache="pyramidkv", cache_budget=40, cache_recent=2)
    changed, params, others = caching.apply(model, weights(model), 64)
    spec = dict(flatten(changed.cache_spec(1, 64)))
    room = 1
    slots = [p.shape[-1] - room for path, p in spec.items() if path.endswith("position")]
    assert slots == list(pyramid_budgets(64, 40, 3, 2)) == [62, 40, 18]
    shapes = [jax.tree.map(jnp.shape, params), jax.tree.map(lambda p: p.shape, changed.abstract())]
    assert shapes[0] == shapes[1] and not others


def test_the_command_takes_a_cache_policy(loaded, capsys):
    options: dict[str, Any] = dict(run_dir="x", prompt="Hello, hello!", max_new_tokens=20)
    said = []
    for caching in (Caching(), Caching(cache="h2o", cache_budget=4)):
        generation.run(Generate(**options, json=True, caching=caching))
        said.append(json.loads(capsys.readouterr().out)["samples"][0]["log_probs"])
    assert said[0][0] == pytest.approx(said[1][0]) and said[0] != said[1]


def test_the_command_prints_text_or_json(loaded, capsys):
    options: dict[str, Any] = dict(run_dir="x", prompt="Hello", max_new_tokens=6, num_samples=2)
    generation.run(Generate(**options, json=True))
    said = json.loads(capsys.readouterr().out)
    assert said["prompt"] == "Hello" and len(said["samples"]) == 2
    for sample in said["samples"]:
        assert 1 <= len(sample["tokens"]) == len(sample["log_probs"]) <= 6
        assert max(sample["log_probs"]) <= 0
        assert sample["text"] == ByteTokenizer().decode(sample["tokens"])
    generation.run(Generate(**options))
    texts = [
        f"--- sample {i + 1} of 2 ---\nHello{s['text']}\n" for i, s in enumerate(said["samples"])
    ]
    assert capsys.readouterr().out == "".join(texts)


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", ""), ("num_samples", 0), ("max_new_tokens", -3), ("seed", -1), ("seed", 2**32)],
)
def test_the_command_refuses_impossible_values(field, value):
    options: dict[str, Any] = {"run_dir": "x", "prompt": "Hello", field: value}
    with pytest.raises(ValueError, match=rf"^{field}: {value!r}; need [^\n]+$"):
        Generate(**options)


def test_the_command_refuses_a_folder_without_a_run(tmp_path):
    pytest.importorskip("bestiary.train.checkpoint")
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        generation.run(Generate(run_dir=str(tmp_path / "none"), prompt="Hello"))
