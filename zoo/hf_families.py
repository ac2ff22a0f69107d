"""What a Hugging Face family declares, once for both ways, and what families have in common.

A family says which entries of `config.json` make which `Decoder` and how the tensor of each
parameter is called. `zoo/hf.py` does everything else from that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from bestiary.layers.activations import Gelu, GeluTanh, Relu, ReluSquared, Silu
from bestiary.layers.attention import Attention
from bestiary.layers.base import Layer
from bestiary.layers.blockffn import BlockFFN
from bestiary.layers.feedforward import GLU
from bestiary.layers.mamba import Mamba
from bestiary.layers.mamba2 import Mamba2
from bestiary.layers.norms import RMSNorm
from bestiary.layers.rope import Rope
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.hf_config import Fields, rope_entries

T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """How to read a tensor that is stored otherwise than the model declares it."""

    shape: tuple[int, ...]
    """As stored."""
    apply: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A `model_type` of Hugging Face transformers."""

    model_type: str
    architecture: str
    names: Callable[[Decoder], Mapping[str, str | None]]
    """Parameter path -> tensor name; `{}` stand for the layer, then for other stacked axes.
    A path leaves out its place in a `Chain`, and begins with "blocks" in the block of `Decoder.mtp`
    too, which counts as the layer after the last. Parameters of one name are joined along their
    outputs, in this order. None: a state that is not stored and starts anew when read."""
    by_head: tuple[str, ...] = ()
    """Names whose parameters are joined within every head."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """With `Decoder.mtp`, tensors that repeat another one by name: written, and when they are there
    compared; `{}` is the layer after the last."""
    depthwise: tuple[str, ...] = ()
    """Names of convolutions per channel, stored [channels, 1, taps]; ours are [taps, channels]."""
    unread: str | None = None
    """Without it, how the names of tensors begin that are left unread; `{}` is the same."""
    adapters: Callable[[Fields], Mapping[str, Adapter]] | None = None
    """By name, where the entries say that tensors are stored otherwise; `{}` is the layer."""
    decoder: Callable[[Fields], Decoder]
    config: Callable[[Decoder], dict[str, Any]]
    """Entries that `decoder` turns into this model, if any do: `zoo/hf_model.py` checks that."""


BOOLEAN = {True: True, False: False}
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

LAYER = "model.layers.{}."
BLOCK_NAMES = {
    "embedding/table": "model.embed_tokens.weight",
    "blocks/mixer_norm/weight": f"{LAYER}input_layernorm.weight",
    "blocks/mixer/query": f"{LAYER}self_attn.q_proj.weight",
    "blocks/mixer/key": f"{LAYER}self_attn.k_proj.weight",
    "blocks/mixer/value": f"{LAYER}self_attn.v_proj.weight",
    "blocks/mixer/out": f"{LAYER}self_attn.o_proj.weight",
    "blocks/ffn/gate": f"{LAYER}mlp.gate_proj.weight",
    "blocks/ffn/up": f"{LAYER}mlp.up_proj.weight",
    "blocks/ffn/down": f"{LAYER}mlp.down_proj.weight",
    "norm/weight": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
MTP_NAMES = {
    "mtp/embedding_norm/weight": f"{LAYER}enorm.weight",
    "mtp/hidden_norm/weight": f"{LAYER}hnorm.weight",
    "mtp/project/weight": f"{LAYER}eh_proj.weight",
}


def grouped_attention(f: Fields, num_kv_heads: int, head_dim: int, rope: Rope) -> Attention:
    """The entries' attention; numbers are the family's defaults."""
    heads = f.integer("num_attention_heads")
    num_kv_heads = f.integer("num_key_value_heads", num_kv_heads)
    head_dim = f.integer("head_dim", head_dim)
    if heads % num_kv_heads:
        raise f.wrong("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    rotated = int(head_dim * rope.fraction)
    if rotated % 2 or not rotated:
        raise f.wrong("head_dim", f"an even number to rotate, not {rotated}")
    return Attention(
        dim=f.integer("hidden_size"),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
    )


def heads_that_divide(f: Fields) -> int:
    """num_attention_heads, by which the width is split where no head_dim is given."""
    dim, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if f.entries.get("head_dim") is None and dim % heads:
        raise f.wrong("hidden_size", f"a multiple of num_attention_heads {heads}")
    return heads


def gated(f: Fields, activation: str, default: str, hidden: str = "intermediate_size") -> GLU:
    return GLU(
        dim=f.integer("hidden_size"),
        hidden=f.integer(hidden),
        activation=f.choice(activation, ACTIVATIONS, default),
    )


def with_further(f: Fields, model: Decoder) -> Decoder:
    """`model` as the entries say: with a layer for multi-token prediction, or without."""
    further = f.choice("num_nextn_predict_layers", {0: False, 1: True}, 0)
    return model.with_mtp() if further else model


def decoder_config(model: Decoder) -> dict[str, Any]:
    """The entries of everything but the blocks."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embedding.dim,
        "num_hidden_layers": sum(stack.n for stack in model.stacks),
        "rms_norm_eps": part(model, "norm", RMSNorm).eps,
        "tie_word_embeddings": model.head is None,
    }


def attention_config(attention: Attention) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": False,
        **rope_entries(part(attention, "rope", Rope)),
    }


def activation_name(ffn: GLU | BlockFFN | Mamba | Mamba2) -> str:
    names = [name for name, function in ACTIVATIONS.items() if function == ffn.activation]
    if not names:
        raise ValueError(f"ffn.activation: {type(ffn.activation).__name__} has no name there")
    return names[0]


def part(whole: Any, path: str, kind: type[T]) -> T:
    """What stands at a dotted path; ValueError unless it is exactly a `kind`."""
    x = whole
    for name in path.split("."):
        if not name.isdigit() and not hasattr(x, name):
            raise ValueError(f"{path}: {type(x).__name__} has no {name}")
        x = x[int(name)] if name.isdigit() else getattr(x, name)
    if type(x) is not kind:
        raise ValueError(f"{path}: {type(x).__name__}, not {kind.__name__}")
    return x
