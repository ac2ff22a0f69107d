"""Multi-head latent attention: parity with DeepSeek-V3, absorbed decoding, packing, costs."""

import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, draw

from bestiary.kernels.attention.masks import CAUSAL, Window, streaming
from bestiary.layers import (
    DEFAULT_RULES,
    GLU,
    MLA,
    CachePolicy,
    Chain,
    Context,
    Embedding,
    Full,
    Layer,
    Linear,
    MoE,
    Repeat,
    RMSNorm,
    Rope,
    Router,
    Silu,
    SinksWindow,
    use_rules,
)
from bestiary.layers.base import flatten
from bestiary.zoo.decoder import Block, Decoder

BATCH, LENGTH, DIM = 3, 12, 20
SIZES = {"dim": DIM, "num_heads": 4, "nope_dim": 6, "rope_dim": 4, "value_dim": 7}
# Latents that are wider than the expanded heads, and narrower: both forms serve a chunk.
OPTIONS = {
    "wide": MLA(**SIZES, kv_rank=96, q_rank=9),
    "narrow": MLA(**SIZES, kv_rank=3, q_rank=9),
    "direct_query": MLA(**SIZES, kv_rank=5, scale=0.3, rope=Rope(theta=300.0)),
    "bias": MLA(**SIZES, kv_rank=5, q_rank=9, bias=True),
    "window": MLA(**SIZES, kv_rank=5, mask=CAUSAL & Window(3)),
    "values_wider": MLA(**SIZES | {"value_dim": 13}, kv_rank=5),
}
every_option = pytest.mark.parametrize("name", OPTIONS)


def oracle(layer: MLA, params: Any, x: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Token by token in float64; rotation as a product of complex numbers."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = x.astype(np.float64)
    nope = layer.nope_dim

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + layer.norm_eps)
        return x / rms * params[name]["weight"]

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        half, y = layer.rope_dim // 2, np.zeros_like(x)
        interleaved = layer.rope.interleaved
        a, b = (
            (np.s_[..., 0::2], np.s_[..., 1::2])
            if interleaved
            else (np.s_[..., :half], np.s_[..., half:])
        )
        z = (x[a] + 1j * x[b]) * np.exp(1j * position * layer.rope.frequencies(layer.rope_dim))
        y[a], y[b] = z.real, z.imag
        return y

    c = x @ params["kv_down"] + params.get("kv_down_bias", 0)
    c, key = norm(c[..., : layer.kv_rank], "kv_norm"), c[..., layer.kv_rank :]
    if layer.q_rank is not None:
        down = x @ params["query_down"] + params.get("query_down_bias", 0)
        x = norm(down, "query_norm")
    q = np.einsum("bsd,dnh->bsnh", x, params["query"])
    k = np.einsum("bsr,rnh->bsnh", c, params["key"])
    v = np.einsum("bsr,rnh->bsnh", c, params["value"])
    y = np.zeros_like(v)
    for b, h, t in np.ndindex(y.shape[0], layer.num_heads, y.shape[1]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        keys = [s for s in seen if layer.mask(np.int32(t), np.int32(s))]
        scores = [
            q[b, t, h, :nope] @ k[b, s, h] + turn(q[b, t, h, nope:], t) @ turn(key[b, s], s)
            for s in keys
        ]
        e = np.exp(np.array(scores) * (layer.scale or layer.query_dim**-0.5))
        y[b, t, h] = e / e.sum() @ v[b, keys, h]
    return np.einsum("bsnh,nhd->bsd", y, params["out"]) + params.get("out_bias", 0)


X = np.random.default_rng(1).normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
SEGMENTS = np.array([[1] * 12, [1] * 5 + [2] * 7, [1] * 4 + [2] * 4 + [0] * 4])


@every_option
def test_equals_the_oracle_in_packed_rows(name: str) -> None:
    layer = OPTIONS[name]
    params = draw(layer)
    y, _, _ = jax.jit(layer.apply)(params, X, Context(segment_ids=jnp.asarray(SEGMENTS)))
    close(y, oracle(layer, params, X, SEGMENTS))


@every_option
def test_decoding_equals_the_full_forward(name: str) -> None:
    """A prompt, a chunk, then single tokens; one row holds documents, one is padded on the left."""
    layer = OPTIONS[name]
    params, chunks = draw(layer), (0, 7, 10, 11, 12)
    places = np.broadcast_to(np.arange(LENGTH), SEGMENTS.shape) - np.array([[0], [0], [3]])
    segments = np.array([[1] * 12, [1] * 5 + [2] * 7, [1] * 12])

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        cache, outputs = layer.init_cache(BATCH, 16), []
        for a, b in zip(chunks, chunks[1:], strict=False):
            where = (jnp.asarray(i[:, a:b], jnp.int32) for i in (places, segments))
            y, cache, _ = layer.apply(params, X[:, a:b], Context(*where), cache)
            outputs.append(y)
        whole = Context(segment_ids=jnp.asarray(np.where(places < 0, 0, segments)))
        return layer.apply(params, X, whole)[0], jnp.concatenate(outputs, 1)

    full, steps = run(params)
    close(np.where(places[..., None] < 0, 0, steps), np.where(places[..., None] < 0, 0, full))


def test_both_forms_are_one_function_and_the_cheaper_one_is_taken() -> None:
    layer = OPTIONS["wide"]
    params = draw(layer)
    where = {"q_segments": jnp.asarray(SEGMENTS), "kv_segments": jnp.asarray(SEGMENTS)}

    @jax.jit
    def both(params: Any) -> tuple[jax.Array, jax.Array]:
        positions = jnp.arange(LENGTH)[None]
        q, latents = (
            layer.queries(params, layer.query_latent(params, X), positions),
            layer.latents(params, X, positions),
        )
        forms = layer.absorbed, layer.expanded
        one, other = (form(params, q, latents, where) for form in forms)
        return one, other

    close(*both(params))
    published = MLA(
        dim=7680, num_heads=128, kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128
    )
    assert published.absorbs(1, 4096) and published.absorbs(64, 4096)
    assert not published.absorbs(512, 4096) and not published.absorbs(4096, 4096)


@pytest.mark.parametrize("kv_rank", [3, 96])
@pytest.mark.parametrize("cache", [Full(), SinksWindow(sinks=2, window=4)])
def test_decodes_by_its_mask(kv_rank: int, cache: CachePolicy) -> None:
    """First tokens and a window, which a policy may keep alone; both forms serve."""
    layer = MLA(**SIZES, kv_rank=kv_rank, mask=streaming(4, sinks=2), cache=cache)
    params, state, outputs = draw(layer), layer.init_cache(BATCH, LENGTH), []
    apply = jax.jit(layer.apply)
    for a, b in itertools.pairwise((0, 7, 9, *range(10, LENGTH + 1))):
        at = jnp.broadcast_to(jnp.arange(a, b), (BATCH, b - a))
        y, state, _ = apply(params, X[:, a:b], Context(positions=at), state)
        outputs.append(y)
    close(jnp.concatenate(outputs, 1), oracle(layer, params, X, np.ones_like(SEGMENTS)))


def test_every_parameter_learns_through_scan_and_remat() -> None:
    layer = OPTIONS["bias"]
    ffn = GLU(dim=DIM, hidden=8, activation=Silu())
    stack = Repeat(block=Block(mixer=layer, ffn=ffn, norm=RMSNorm(dim=DIM)), n=2, remat="full")

    @jax.jit
    def gradient(params: Any) -> Any:
        return jax.grad(lambda params: (stack.apply(params, jnp.asarray(X))[0] ** 2).sum())(params)

    for path, g in flatten(gradient(draw(stack))):
        assert np.all(np.any(g, axis=tuple(range(1, g.ndim)))), path


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    """Heads and batch spread over devices: the full forward, its gradients, and a decoded token."""
    layer = OPTIONS["wide"]
    params, x = draw(layer), jnp.asarray(np.concatenate((X, X[:1])))

    def run(params: Any, x: jax.Array) -> tuple:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = layer.apply(params, x)[0]
            return (y**2).sum(), y

        here = Context(positions=jnp.zeros((len(x), 1), jnp.int32))
        y, cache, _ = layer.apply(params, x[:, :1], here, layer.init_cache(len(x), LENGTH))
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x), y, cache

    expected = jax.jit(run)(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, layer.abstract(mesh)))
        actual = jax.jit(run)(placed, x)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("name", ["wide", "direct_query"])
def test_the_cache_holds_latents_and_one_key(name: str) -> None:
    layer = OPTIONS[name]
    floats = {k: c.shape for k, c in layer.init_cache(BATCH, 50).items() if c.dtype == "float32"}
    assert floats == {"k": (BATCH, 50, 1, layer.kv_rank + layer.rope_dim)}


def test_impossible_sizes_are_refused() -> None:
    for field, message in (("rope_dim", "rotates 3 of 3"), ("kv_rank", "kv_rank: 0; need")):
        with pytest.raises(ValueError, match=message):
            MLA(**SIZES | {"kv_rank": 5} | {field: 3 if field == "rope_dim" else 0})


# --- golden ---------------------------------------------------------------------------------------


def prefixed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def mla_of(hp: dict) -> MLA:
    """The attention of a DeepSeek-V3 configuration; its latent norms keep the default epsilon."""
    assert hp["rope_type"] == "default"
    return MLA(
        dim=hp["hidden_size"],
        num_heads=hp["num_attention_heads"],
        kv_rank=hp["kv_lora_rank"],
        q_rank=hp["q_lora_rank"],
        nope_dim=hp["qk_nope_head_dim"],
        rope_dim=hp["qk_rope_head_dim"],
        value_dim=hp["v_head_dim"],
        bias=hp["attention_bias"],
        rope=Rope(theta=hp["rope_theta"], interleaved=hp["rope_interleave"]),
        scale=hp["attention_scale"],
    )


def mla_from_torch(layer: MLA, tensors: dict[str, np.ndarray]) -> Any:
    """Parameters from the tensors of a Hugging Face `self_attn`: (out, in) matrices."""
    heads, nope = layer.num_heads, layer.nope_dim
    names = {"query_down": "q_a_proj", "kv_down": "kv_a_proj_with_mqa", "out": "o_proj"}
    norms = {"query_norm": "q_a_layernorm", "kv_norm": "kv_a_layernorm"}
    query = tensors["q_proj.weight" if layer.q_rank is None else "q_b_proj.weight"]
    kv = tensors["kv_b_proj.weight"].T.reshape(layer.kv_rank, heads, -1)
    params = {
        "query": query.T.reshape(-1, heads, layer.query_dim),
        "key": kv[..., :nope],
        "value": kv[..., nope:],
    }
    for ours, theirs in names.items():
        if f"{theirs}.weight" in tensors:
            params[ours] = tensors[f"{theirs}.weight"].T
        if f"{theirs}.bias" in tensors:
            params[f"{ours}_bias"] = tensors[f"{theirs}.bias"]
    params["out"] = params["out"].reshape(heads, layer.value_dim, -1)
    for ours, theirs in norms.items():
        if f"{theirs}.weight" in tensors:
            params[ours] = {"weight": tensors[f"{theirs}.weight"]}
    params = jax.tree.map(jnp.asarray, params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, layer.abstract())
    return params


@pytest.mark.golden("mla_moe")
def test_attention_equals_deepseek(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    layer = mla_of(hp)
    prefix = f"{hp['weight_prefix']}model.layers.0.self_attn."
    tensors = prefixed(a, prefix)
    params, x = mla_from_torch(layer, tensors), jnp.asarray(a["attn0_in"])
    close(jax.jit(layer.apply)(params, x)[0], a["attn0_out"], 1e-5)


def deepseek_of(hp: dict) -> Decoder:
    """Leading dense layers, then mixtures of experts."""
    assert hp["hidden_act"] == "silu" and not hp["tie_word_embeddings"]
    assert hp["topk_weight_eps"] == 1e-20
    dim, vocab_size = hp["hidden_size"], hp["vocab_size"]
    norm = RMSNorm(dim=dim, eps=hp["rms_norm_eps"])

    def swiglu(hidden: int) -> GLU:
        return GLU(dim=dim, hidden=hidden, activation=Silu())

    router = Router(
        dim=dim,
        num_experts=hp["n_routed_experts"],
        top_k=hp["num_experts_per_tok"],
        score=hp["router_score"],
        normalize=hp["norm_topk_prob"],
        scale=hp["routed_scaling_factor"],
        num_groups=hp["n_group"],
        top_groups=hp["topk_group"],
        group_top=hp["group_score_top"],
        bias="sign",
    )
    width, shared = hp["moe_intermediate_size"], hp["n_shared_experts"]
    mixture = MoE(
        router=router, expert=swiglu(width), shared=swiglu(width * shared) if shared else None
    )

    def stack(ffn: Layer, n: int) -> Repeat:
        return Repeat(block=Block(mixer=mla_of(hp), ffn=ffn, norm=norm), n=n)

    dense = hp["first_k_dense_replace"]
    stacks = (swiglu(hp["intermediate_size"]), dense), (mixture, hp["num_hidden_layers"] - dense)
    return Decoder(
        embedding=Embedding(vocab_size=vocab_size, dim=dim),
        blocks=Chain(layers=tuple(stack(ffn, n) for ffn, n in stacks if n)),
        norm=norm,
        head=Linear(inputs=dim, outputs=vocab_size, axes=("embed", "vocab")),
    )


def ffn_from_torch(layer: Layer, tensors: dict[str, np.ndarray]) -> Any:
    if isinstance(layer, GLU):
        names = ("gate", "up", "down")
        return {n: tensors[f"{n}_proj.weight"].T for n in names} | {"activation": {}}
    assert isinstance(layer, MoE)
    gate, up = np.split(tensors["experts.gate_up_proj"].swapaxes(1, 2), 2, -1)
    down = tensors["experts.down_proj"].swapaxes(1, 2)
    bias = tensors["gate.e_score_correction_bias"]
    params = {
        "router": {"weight": tensors["gate.weight"].T, "bias": bias, "load": 0 * bias},
        "experts": {"gate": gate, "up": up, "down": down, "activation": {}},
    }
    if layer.shared:
        params["shared"] = ffn_from_torch(layer.shared, prefixed(tensors, "shared_experts."))
    return params


def deepseek_from_torch(model: Decoder, tensors: dict[str, np.ndarray]) -> Any:
    first, blocks = 0, {}
    for i, stack in enumerate(model.stacks):
        assert isinstance(stack.block, Block) and isinstance(stack.block.mixer, MLA)
        layers = []
        for n in range(first, first + stack.n):
            mine = prefixed(tensors, f"model.layers.{n}.")
            layers.append(
                {
                    "mixer": mla_from_torch(stack.block.mixer, prefixed(mine, "self_attn.")),
                    "ffn": ffn_from_torch(stack.block.ffn, prefixed(mine, "mlp.")),
                    "mixer_norm": {"weight": mine["input_layernorm.weight"]},
                    "ffn_norm": {"weight": mine["post_attention_layernorm.weight"]},
                }
            )
        first += stack.n
        blocks[str(i)] = jax.tree.map(lambda *w: jnp.stack(w), *layers)
    params = {
        "embedding": {"table": tensors["model.embed_tokens.weight"]},
        "blocks": blocks,
        "norm": {"weight": tensors["model.norm.weight"]},
        "head": {"weight": tensors["lm_head.weight"].T},
    }
    params = jax.tree.map(jnp.asarray, params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, model.abstract())
    return params


@pytest.mark.golden("mla_moe")
def test_model_equals_deepseek(golden: SimpleNamespace) -> None:
    """Hidden states and logits, in one piece and token by token."""
    a, hp = golden.arrays, golden.hp
    model = deepseek_of(hp)
    params = deepseek_from_torch(model, prefixed(a, hp["weight_prefix"]))
    ids = jnp.asarray(a["input_ids"], jnp.int32)

    @jax.jit
    def run(params: Any) -> tuple:
        states = [model.embedding.apply(params["embedding"], ids)]
        for i, stack in enumerate(model.stacks):
            for n in range(stack.n):
                mine = jax.tree.map(lambda w, n=n: w[n], params["blocks"][str(i)])
                states.append(stack.block.apply(mine, states[-1])[0])
        states[-1] = model.norm.apply(params["norm"], states[-1])
        return states, model.apply(params, ids)[0]

    states, logits = run(params)
    for i, x in enumerate(states):
        close(x, a[f"hidden_{i}"], 1e-5)
    close(logits, a["logits"], 1e-5)

    step = jax.jit(lambda params, ids, cache: model.apply(params, ids, Context(), cache)[:2])
    prompt, cache = ids.shape[1] // 2, model.init_cache(*ids.shape)
    steps, cache = step(params, ids[:, :prompt], cache)
    close(steps, a["logits"][:, :prompt], 1e-5)
    for t in range(prompt, ids.shape[1]):
        steps, cache = step(params, ids[:, t : t + 1], cache)
        close(steps, a["logits"][:, t : t + 1], 1e-5)
