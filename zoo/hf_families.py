"""Model families as Hugging Face folders describe them: one declaration each, used both ways.

A family says which entries of `config.json` make which `Decoder` and how the tensor of each
parameter is called. `zoo/hf.py` does everything else from that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bestiary.layers.activations import Gelu, GeluTanh, Relu, ReluSquared, Silu
from bestiary.layers.attention import Attention
from bestiary.layers.base import Layer
from bestiary.layers.feedforward import GLU
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Chain
from bestiary.layers.rope import Rope
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.gemma2 import gemma2
from bestiary.zoo.hf_config import Fields, rope_entries, rope_from_fields
from bestiary.zoo.llama import llama

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A `model_type` of Hugging Face transformers."""

    model_type: str
    architecture: str
    names: Mapping[str, str]
    """Parameter path -> tensor name; `{}` stand for the layer, then for other stacked axes.
    A path leaves out the position in a `Chain`: the layer's number says it."""
    decoder: Callable[[Fields], Decoder]
    config: Callable[[Decoder], dict[str, Any]]
    """Entries that `decoder` turns into this model, if any do: `zoo/hf.py` checks that."""


ACTIVATIONS: dict[str, Layer] = {
    "silu": Silu(),
    "gelu_pytorch_tanh": GeluTanh(),
    "gelu": Gelu(),
    "relu": Relu(),
    "relu2": ReluSquared(),
    # further names of the same functions
    "swish": Silu(),
    "gelu_new": GeluTanh(),
}

BLOCK_NAMES = {
    "embedding/table": "model.embed_tokens.weight",
    "blocks/mixer_norm/weight": "model.layers.{}.input_layernorm.weight",
    "blocks/mixer/query": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/mixer/key": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/mixer/value": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/mixer/out": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/ffn/gate": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/ffn/up": "model.layers.{}.mlp.up_proj.weight",
    "blocks/ffn/down": "model.layers.{}.mlp.down_proj.weight",
    "norm/weight": "model.norm.weight",
    "head/weight": "lm_head.weight",
}

ALTERNATING = ["sliding_attention", "full_attention"]


def llama_decoder(f: Fields) -> Decoder:
    f.fixed(attention_bias=False, mlp_bias=False)
    dim, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if f.entries.get("head_dim") is None and dim % heads:
        raise f.wrong("hidden_size", f"a multiple of num_attention_heads {heads}")
    return llama(
        vocab_size=f.integer("vocab_size"),
        num_layers=f.integer("num_hidden_layers"),
        attention=grouped_attention(f, num_kv_heads=heads, head_dim=dim // heads),
        ffn=gated(f, "hidden_act", "silu"),
        eps=f.number("rms_norm_eps", 1e-6),
        tied=f.choice("tie_word_embeddings", {True: True, False: False}, False),
    )


def llama_config(model: Decoder) -> dict[str, Any]:
    return block_config(model, part(model, "blocks.block", Block), "hidden_act")


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=BLOCK_NAMES
    | {"blocks/ffn_norm/weight": "model.layers.{}.post_attention_layernorm.weight"},
    decoder=llama_decoder,
    config=llama_config,
)


def gemma2_decoder(f: Fields) -> Decoder:
    f.fixed(attention_bias=False, tie_word_embeddings=True, use_bidirectional_attention=False)
    layers = f.integer("num_hidden_layers")
    if layers % 2:
        raise f.wrong("num_hidden_layers", "an even number: windows alternate")
    types = f.entries.get("layer_types")
    # lengths first: a wrong number of layers must not build a list as long
    if types is not None and (
        not isinstance(types, list) or len(types) != layers or types != ALTERNATING * (layers // 2)
    ):
        raise f.wrong("layer_types", f"{ALTERNATING} {layers // 2} times")
    attention = grouped_attention(f, num_kv_heads=4, head_dim=256)
    scalar = f.number("query_pre_attn_scalar", 256)
    return gemma2(
        vocab_size=f.integer("vocab_size"),
        num_layers=layers,
        attention=dataclasses.replace(
            attention,
            softcap=f.number_or_none("attn_logit_softcapping", 50.0),
            scale=None if scalar == attention.head_dim else scalar**-0.5,
        ),
        ffn=gated(f, "hidden_activation", "gelu_pytorch_tanh"),
        window=f.integer("sliding_window", 4096),
        softcap=f.number_or_none("final_logit_softcapping", 30.0),
        eps=f.number("rms_norm_eps", 1e-6),
    )


def gemma2_config(model: Decoder) -> dict[str, Any]:
    part(model, "blocks.block", Chain)
    block = part(model, "blocks.block.layers.0", Block)
    config = block_config(model, block, "hidden_activation")
    attention = part(block, "mixer", Attention)
    scale = attention.scale
    return config | {
        "num_hidden_layers": 2 * model.stacks[0].n,
        "sliding_window": attention.window,
        "layer_types": ALTERNATING * model.stacks[0].n,
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": model.softcap,
        "query_pre_attn_scalar": attention.head_dim if scale is None else round(scale**-2),
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    names=BLOCK_NAMES
    | {
        "blocks/mixer_post_norm/weight": "model.layers.{}.post_attention_layernorm.weight",
        "blocks/ffn_norm/weight": "model.layers.{}.pre_feedforward_layernorm.weight",
        "blocks/ffn_post_norm/weight": "model.layers.{}.post_feedforward_layernorm.weight",
    },
    decoder=gemma2_decoder,
    config=gemma2_config,
)

FAMILIES = {family.model_type: family for family in (LLAMA, GEMMA2)}


def grouped_attention(f: Fields, num_kv_heads: int, head_dim: int) -> Attention:
    """The entries' attention; arguments are the family's defaults."""
    heads = f.integer("num_attention_heads")
    num_kv_heads = f.integer("num_key_value_heads", num_kv_heads)
    head_dim = f.integer("head_dim", head_dim)
    if heads % num_kv_heads:
        raise f.wrong("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    if head_dim % 2:
        raise f.wrong("head_dim", f"an even number to rotate, not {head_dim}")
    return Attention(
        dim=f.integer("hidden_size"),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope_from_fields(f),
    )


def gated(f: Fields, activation: str, default: str) -> GLU:
    return GLU(
        dim=f.integer("hidden_size"),
        hidden=f.integer("intermediate_size"),
        activation=f.choice(activation, ACTIVATIONS, default),
    )


def block_config(model: Decoder, block: Block, activation: str) -> dict[str, Any]:
    """The entries that all families with these blocks share."""
    attention, ffn = part(block, "mixer", Attention), part(block, "ffn", GLU)
    names = [name for name, function in ACTIVATIONS.items() if function == ffn.activation]
    if not names:
        raise ValueError(f"ffn.activation: {type(ffn.activation).__name__} has no name there")
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": attention.dim,
        "intermediate_size": ffn.hidden,
        "num_hidden_layers": model.stacks[0].n,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        activation: names[0],
        "rms_norm_eps": part(model, "norm", RMSNorm).eps,
        "tie_word_embeddings": model.head is None,
        "attention_bias": False,
        **rope_entries(part(attention, "rope", Rope)),
    }


def part(whole: Any, path: str, kind: type[T]) -> T:
    """What stands at a dotted path; ValueError unless it is exactly a `kind`."""
    x = whole
    for name in path.split("."):
        x = x[int(name)] if name.isdigit() else getattr(x, name)
    if type(x) is not kind:
        raise ValueError(f"{path}: {type(x).__name__}, not {kind.__name__}")
    return x
