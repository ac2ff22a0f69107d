"""Parity with the published programs: values, hidden states and gradients of the golden vectors.

Shapes come from the arrays and everything else from the JSON, so that a new vector is a new test.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.attention import visible
from bestiary.kernels.stat_topk_glu import normal_quantile, statistical_topk
from bestiary.layers import (
    GLU,
    MLP,
    Attention,
    Context,
    Embedding,
    GaussianGLU,
    Gelu,
    GeluTanh,
    Layer,
    Linear,
    PolyNorm,
    PolyReLU,
    Relu,
    Repeat,
    RMSNorm,
    Rope,
    Silu,
    SparkAttention,
    SparkFFN,
)
from bestiary.layers import rope as scalings
from bestiary.layers.base import flatten
from bestiary.layers.repeat import Chain
from bestiary.zoo.decoder import Block, Decoder

RTOL = 1e-5


def close(actual: Any, expected: np.ndarray, name: str, rtol: float = RTOL) -> None:
    """Equal to `rtol` of the largest entry; a scalar to `rtol` of itself."""
    finite = np.abs(expected[np.isfinite(expected)]) if expected.dtype != bool else expected
    atol = rtol * float(finite.max(initial=0))
    np.testing.assert_allclose(
        np.asarray(actual).reshape(expected.shape), expected, rtol=rtol, atol=atol, err_msg=name
    )


# --- single layers --------------------------------------------------------------------------------

GATES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
ACTIVATIONS = {"gelu_tanh": GeluTanh, "gelu": Gelu, "relu": Relu, "silu": Silu}


def gradients(layer: Layer, params: Any, x: jax.Array, cotangent: np.ndarray) -> tuple:
    """(output, gradient of the parameters, gradient of x) of a feed-forward."""

    @jax.jit
    def run(params: Any, x: jax.Array, cotangent: jax.Array) -> tuple:
        y, pull = jax.vjp(lambda params, x: layer.apply(params, x)[0], params, x)
        return y, *pull(cotangent)

    return run(params, x, jnp.asarray(cotangent))


@pytest.mark.golden("polycom_mlp")
def test_polycom(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    hidden, dim = a["W1"].shape
    down = slice(None) if hp["coefficient_order"] == "descending_power" else slice(None, None, -1)
    kinds = {"polynorm": PolyNorm(order=hp["order"], eps=hp["eps"])}
    kinds["polyrelu"] = PolyReLU(order=hp["order"])
    for name in hp["activations"]:
        layer = MLP(dim=dim, hidden=hidden, activation=kinds[name], bias=hp["use_bias"])
        weight, bias = a[f"{name}_a"][down], a[f"{name}_b"].reshape(())
        params = {
            "up": a["W1"].T,
            "activation": {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)},
            "down": a["W2"].T,
        }
        u = a["x"] @ a["W1"].T
        if hp["use_bias"]:
            params |= {"up_bias": a["b1"], "down_bias": a["b2"]}
            u += a["b1"]
        act = kinds[name].apply(params["activation"], jnp.asarray(u))
        close(act, a[f"{name}_act"], f"{name}_act")
        y, g, gx = gradients(layer, jax.tree.map(jnp.asarray, params), a["x"], a["cotangent"])
        close(y, a[f"{name}_y"], f"{name}_y")
        close(gx, a[f"{name}_gx"], f"{name}_gx")
        close(g["up"].T, a[f"{name}_gW1"], f"{name}_gW1")
        close(g["down"].T, a[f"{name}_gW2"], f"{name}_gW2")
        coefficients = [*g["activation"]["weight"][down], g["activation"]["bias"]]
        expected = np.append(a[f"{name}_ga"], a[f"{name}_gb"])
        close(np.stack(coefficients), expected, f"{name}_ga, {name}_gb")


@pytest.mark.golden("gemma3n_gaussian_topk")
def test_gaussian_topk(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    hidden, dim = a["W_gate"].shape
    sparsity, ddof = hp["activation_sparsity"], hp["ddof"]
    layer = GaussianGLU(
        dim=dim,
        hidden=hidden,
        sparsity=sparsity,
        ddof=ddof,
        activation=GATES[hp["hidden_activation"]],
    )
    names = {"gate": "W_gate", "up": "W_up", "down": "W_down"}
    params = {ours: jnp.asarray(a[theirs].T) for ours, theirs in names.items()}
    gate = a["x"] @ a["W_gate"].T
    close(gate, a["gate_pre"], "gate_pre")
    if sparsity > 0:
        sparse = statistical_topk(a["gate_pre"], normal_quantile(1 - sparsity, 1), ddof)
        close(sparse, a["gate_sparse"], "gate_sparse")
    y, g, gx = gradients(layer, params, jnp.asarray(a["x"]), a["cotangent"])
    close(y, a["y"], "y")
    close(gx, a["gx"], "gx")
    for ours, theirs in names.items():
        close(g[ours].T, a[f"g{theirs}"], f"g{theirs}")
    nonzero = float(layer.apply(params, a["x"])[1].metrics["nonzero"])
    assert nonzero == pytest.approx(
        float(a["nonzero"]), abs=1.5 / gate.size
    )  # one may be on the edge


@pytest.mark.golden("spark")
def test_spark_ffn(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    r, hidden = a["K1"].shape
    names = {"predictor": "K1", "value": "K2", "out": "V"}
    params = {ours: jnp.asarray(a[theirs]) for ours, theirs in names.items()}
    for ddof in hp["ffn_ddofs"]:
        layer = SparkFFN(
            dim=a["x"].shape[-1],
            hidden=hidden,
            predictor_dim=r,
            top_k=hp["top_k"],
            ddof=ddof,
            activation=GATES[hp["hidden_activation"]],
        )
        quantile = normal_quantile(hp["top_k"], hidden)
        sparse = statistical_topk(a["x"][..., :r] @ a["K1"], quantile, ddof)
        close(sparse, a[f"ffn_sparse_ddof{ddof}"], "ffn_sparse")
        y, g, gx = gradients(layer, params, jnp.asarray(a["x"]), a["cotangent"])
        close(y, a[f"ffn_y_ddof{ddof}"], "ffn_y")
        close(gx, a[f"ffn_gx_ddof{ddof}"], "ffn_gx")
        for ours, theirs in names.items():
            close(g[ours], a[f"ffn_g{theirs}_ddof{ddof}"], f"ffn_g{theirs}")


@pytest.mark.golden("spark")
def test_spark_attention(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    _, heads, length, head_dim = a["att_q"].shape
    layer = SparkAttention(
        dim=heads * head_dim,
        num_heads=heads,
        num_kv_heads=a["att_k"].shape[1],
        head_dim=head_dim,
        rope=Rope(theta=hp["rope_theta"], interleaved=hp["rope_interleave"]),
        window=hp.get("sliding_window"),
        predictor_dim=hp["r_attn"],
        top_k=hp["k_attn"],
        ddof=hp["attn_ddof"],
        predictor_scale=hp["predictor_scale"],
        value_scale=hp["value_scale"],
    )
    q, k, v = (jnp.asarray(a[f"att_{n}"]).swapaxes(1, 2) for n in "qkv")
    positions = jnp.arange(length)[None]
    q, k = layer.rotate(q, positions), layer.rotate(k, positions)
    seen = visible(positions, positions, mask=layer.pattern)
    s1, _ = layer.scores(q, k)
    close(layer.threshold(s1, seen[:, None, None]), a["att_theta"], "att_theta")
    close(layer.reaches(s1, seen[:, None, None]), a["att_keep"], "att_keep")
    close(layer.weigh({}, k, q, seen), a["att_w"], "att_w")
    close(layer.attend({}, q, k, v).swapaxes(1, 2), a["att_out"], "att_out")


@pytest.mark.golden("statistical_topk")
def test_statistical_topk(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    hidden, r = a["K1"].shape
    ddof, quantile = hp["ddof"], normal_quantile(hp["top_k"], hidden)
    sparse = statistical_topk(jnp.asarray(a["x"]), quantile, ddof)
    close(sparse, a["gaussian_topk"], "gaussian_topk")

    dim = a["h"].shape[-1]
    exact = hp["hidden_activation"] == "gelu" and not hp.get("gelu_approximate", False)
    activation = "gelu" if exact else GATES.get(hp["hidden_activation"], "gelu_tanh")
    ffn = SparkFFN(
        dim=dim,
        hidden=hidden,
        predictor_dim=r,
        top_k=hp["top_k"],
        ddof=ddof,
        activation="gelu_tanh" if activation == "gelu" and not exact else activation,
    )
    names = {"predictor": "K1", "value": "K2", "out": "V"}
    params = {ours: jnp.asarray(a[theirs].T) for ours, theirs in names.items()}
    y, g, gx = gradients(ffn, params, jnp.asarray(a["h"])[None], a["cot"][None])
    close(y, a["ffn_out"], "ffn_out")
    close(gx, a["d_h"], "d_h")
    for ours, theirs in names.items():
        close(g[ours].T, a[f"d_{theirs}"], f"d_{theirs}")

    # softmax does not see the shift of a soft threshold: both forms give the same weights
    head_dim = a["q"].shape[-1]
    attention = SparkAttention(
        dim=head_dim,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        rope=None,
        predictor_dim=hp["r_attn"],
        top_k=hp["k_attn"],
        ddof=hp.get("attn_ddof", ddof),
        predictor_scale=hp["attention_scale"],
        value_scale=hp["attention_scale"],
    )
    q, k, v = (jnp.asarray(a[n])[None, :, None] for n in "qkv")
    close(attention.attend({}, q, k, v), a["attn_out"], "attn_out")


# --- whole models ---------------------------------------------------------------------------------


def rope_of(hp: dict) -> Rope:
    """The rotary embedding of a Hugging Face configuration, with the parameters flat or nested."""
    p = hp | (hp.get("rope_scaling") or {}) | (hp.get("rope_parameters") or {})
    kind = p.get("rope_type", "default")
    length = p.get("original_max_position_embeddings", p.get("max_position_embeddings"))
    scaling = None
    if kind == "linear":
        scaling = scalings.Linear(factor=p["factor"])
    elif kind == "llama3":
        scaling = scalings.Llama3(
            factor=p["factor"],
            original_length=length,
            low_factor=p["low_freq_factor"],
            high_factor=p["high_freq_factor"],
        )
    elif kind == "yarn":
        scaling = scalings.Yarn(
            factor=p["factor"],
            original_length=length,
            beta_fast=p.get("beta_fast") or 32.0,
            beta_slow=p.get("beta_slow") or 1.0,
            mscale=p.get("attention_factor"),
        )
    else:
        assert kind == "default", f"rope_type {kind!r}"
    return Rope(
        theta=p["rope_theta"],
        fraction=p.get("partial_rotary_factor", 1.0),
        interleaved=p.get("rope_interleave", False),
        scaling=scaling,
    )


def period(pattern: list) -> int:
    """The length of the shortest prefix that the pattern repeats."""
    n = len(pattern)
    return next(p for p in range(1, n + 1) if n % p == 0 and pattern == pattern[:p] * (n // p))


def decoder_of(hp: dict, placement: str) -> Decoder:
    """A decoder from the JSON of a dense vector."""
    bias = bool(hp.get("attention_bias"))
    dim, heads = hp["hidden_size"], hp["num_attention_heads"]
    norm = RMSNorm(
        dim=dim, eps=hp["rms_norm_eps"], gain="offset" if hp["norm_unit_offset"] else "scale"
    )
    activation = ACTIVATIONS[GATES[hp.get("hidden_act") or hp["hidden_activation"]]]()
    ffn = GLU(
        dim=dim,
        hidden=hp["intermediate_size"],
        activation=activation,
        bias=bool(hp.get("mlp_bias")),
    )
    windows = {"full_attention": None, "sliding_attention": hp.get("sliding_window")}
    kinds = hp.get("layer_types") or ["full_attention"] * hp["num_hidden_layers"]
    p = period(kinds)
    pattern = tuple(
        Block(
            mixer=Attention(
                dim=dim,
                num_heads=heads,
                num_kv_heads=hp["num_key_value_heads"],
                head_dim=hp.get("head_dim") or dim // heads,
                bias=bias,
                out_bias=bias,
                rope=rope_of(hp),
                window=windows[kind],
                softcap=hp.get("attn_logit_softcapping"),
                scale=hp.get("attention_scale"),
            ),
            ffn=ffn,
            norm=norm,
            placement=placement,
        )
        for kind in kinds[:p]
    )
    head = Linear(inputs=dim, outputs=hp["vocab_size"], axes=("embed", "vocab"))
    return Decoder(
        embedding=Embedding(vocab_size=hp["vocab_size"], dim=dim, scale=hp["embedding_scale"]),
        blocks=Repeat(
            block=pattern[0] if p == 1 else Chain(layers=pattern), n=hp["num_hidden_layers"] // p
        ),
        norm=norm,
        head=None if hp["tie_word_embeddings"] else head,
        softcap=hp.get("final_logit_softcapping"),
    )


BLOCK_NAMES = {
    "mixer/query": "self_attn.q_proj",
    "mixer/key": "self_attn.k_proj",
    "mixer/value": "self_attn.v_proj",
    "mixer/out": "self_attn.o_proj",
    "ffn/gate": "mlp.gate_proj",
    "ffn/up": "mlp.up_proj",
    "ffn/down": "mlp.down_proj",
    "mixer_norm/weight": "input_layernorm",
}
NORM_NAMES = {
    "pre": {"ffn_norm/weight": "post_attention_layernorm"},
    "sandwich": {
        "mixer_post_norm/weight": "post_attention_layernorm",
        "ffn_norm/weight": "pre_feedforward_layernorm",
        "ffn_post_norm/weight": "post_feedforward_layernorm",
    },
}


def torch_names(model: Decoder, tree: Any) -> dict[str, np.ndarray]:
    """Our tree as Hugging Face tensors: torch layout (out, in), one tensor per layer."""
    block = model.blocks.block
    members = block.layers if isinstance(block, Chain) else (block,)
    names = BLOCK_NAMES | NORM_NAMES[members[0].placement]
    tensors = {}
    for path, array in flatten(jax.tree.map(np.asarray, tree)):
        if not path.startswith("blocks/"):
            top = {"embedding/table": "model.embed_tokens", "norm/weight": "model.norm"}
            name = top.get(path, "lm_head")
            tensors[f"{name}.weight"] = array.T if name == "lm_head" else array.copy()
            continue
        path = path.removeprefix("blocks/")
        offset, path = (0, path) if len(members) == 1 else path.split("/", 1)
        stem = path.removesuffix("_bias")
        kind = "weight" if path == stem else "bias"
        for i, w in enumerate(array):
            if kind == "bias":
                w = w.ravel()
            elif w.ndim > 1:
                inputs = 2 if path == "mixer/out" else 1
                w = w.reshape(np.prod(w.shape[:inputs]), -1).T
            layer = i * len(members) + int(offset)
            tensors[f"model.layers.{layer}.{names[stem]}.{kind}"] = w
    return tensors


def from_torch(model: Decoder, tensors: dict[str, np.ndarray]) -> Any:
    """The inverse of `torch_names`, through the positions of numbered entries."""
    shapes = model.abstract()
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([0] + [x.size for x in leaves])
    numbered = [
        np.arange(a, b).reshape(x.shape) for x, a, b in zip(leaves, ends, ends[1:], strict=False)
    ]
    where = torch_names(model, jax.tree.unflatten(structure, numbered))
    assert where.keys() == tensors.keys()
    flat = np.full(ends[-1], np.nan, np.float32)
    for name, index in where.items():
        flat[index] = tensors[name]
    return jax.tree.unflatten(structure, [jnp.asarray(flat[n]) for n in numbered])


def prefixed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def check_decoder(golden: SimpleNamespace, placement: str, padding: int | None) -> None:
    a, hp = golden.arrays, golden.hp
    model = decoder_of(hp, placement)
    params = from_torch(model, prefixed(a, hp["weight_prefix"]))
    ids = jnp.asarray(a["input_ids"], jnp.int32)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits, _, _ = model.apply(params, ids)
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, ids[:, 1:, None], -1).mean(), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for i, x in enumerate(jax.jit(hidden_states, static_argnums=0)(model, params, ids)):
        close(x, a[f"hidden_{i}"], f"hidden_{i}")
    close(logits, a["logits"], "logits")
    close(value, a["loss"], "loss")
    ours = torch_names(model, grads)
    if padding in a["input_ids"].ravel().tolist():
        # transformers gives look-ups of this row no gradient
        name = "model.embed_tokens.weight"
        ours[name][padding] = a[hp["gradient_prefix"] + name][padding]
    for name, expected in prefixed(a, hp["gradient_prefix"]).items():
        close(ours[name], expected, f"gradient of {name}")


def hidden_states(model: Decoder, params: Any, ids: jax.Array) -> list[jax.Array]:
    """The input of every layer and the final, normalised states."""
    block = model.blocks.block
    members = block.layers if isinstance(block, Chain) else (block,)
    states = [model.embedding.apply(params["embedding"], ids)]
    for i in range(model.blocks.n):
        repeat = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
        for j, member in enumerate(members):
            mine = repeat if len(members) == 1 else repeat[str(j)]
            states.append(member.apply(mine, states[-1], Context())[0])
    states[-1] = model.norm.apply(params["norm"], states[-1])
    return states


@pytest.mark.golden("dense_llama")
def test_llama(golden: SimpleNamespace) -> None:
    check_decoder(golden, "pre", golden.hp.get("pad_token_id"))


@pytest.mark.golden("dense_gemma2")
def test_gemma2(golden: SimpleNamespace) -> None:
    check_decoder(golden, "sandwich", golden.hp.get("pad_token_id", 0))
