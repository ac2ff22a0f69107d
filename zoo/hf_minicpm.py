"""BlockFFN as its released folders have it: a MiniCPM whose feed-forwards are of `ffn_type` "block"
or "block_linear".

MiniCPM multiplies every residual branch by scale_depth / sqrt(layers) and the input of the head by
dim_model_base / hidden_size. Here both are part of the weights: of the matrices that end a branch,
and of the gains of the last norm. Folders that we write have factors of 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bestiary.layers.attention import Attention
from bestiary.layers.blockffn import AdaptiveFactor, BlockFFN
from bestiary.layers.linear import Embedding, Linear
from bestiary.layers.mla import MLA
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Repeat
from bestiary.zoo.blockffn import block_ffn
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.hf_config import Fields, rope_from_fields
from bestiary.zoo.hf_deepseek import LATENT_NAMES, latent_config
from bestiary.zoo.hf_families import (
    ACTIVATIONS,
    BLOCK_NAMES,
    BOOLEAN,
    LAYER,
    Adapter,
    Family,
    activation_name,
    attention_config,
    decoder_config,
    grouped_attention,
    part,
)

NAMES: dict[str, str] = BLOCK_NAMES | {
    "blocks/ffn_norm/weight": f"{LAYER}post_attention_layernorm.weight",
    "blocks/ffn/router": f"{LAYER}mlp.router_proj.weight",
    "blocks/ffn/gain": f"{LAYER}mlp.router_norm.weight",
    "blocks/ffn/up": f"{LAYER}mlp.up_proj",
    "blocks/ffn/down": f"{LAYER}mlp.down_proj",
}


def minicpm_decoder(f: Fields) -> Decoder:
    f.choice("ffn_type", {"block_linear": None, "block": None}, None)
    f.choice("norm_after_router", {"rms": None}, None)
    f.fixed(router_act="relu", attention_bias=False)
    dim, layers = f.integer("hidden_size"), f.integer("num_hidden_layers")
    eps = f.number("rms_norm_eps", 1e-6)
    norm = RMSNorm(dim=dim, eps=eps)
    num_experts, width = sizes(f)
    ffn = block_ffn(dim, layers, num_experts, width, density=1.0)
    ffn = replace(ffn, activation=f.choice("hidden_act", ACTIVATIONS, "silu"), eps=eps)
    vocab_size = f.integer("vocab_size")
    tied = f.choice("tie_word_embeddings", BOOLEAN, True)
    return Decoder(
        embedding=Embedding(vocab_size=vocab_size, dim=dim, scale=f.number("scale_emb", 1.0)),
        blocks=Repeat(block=Block(mixer=attention_of(f), ffn=ffn, norm=norm), n=layers),
        norm=norm,
        head=None if tied else Linear(inputs=dim, outputs=vocab_size, axes=("embed", "vocab")),
    )


def attention_of(f: Fields) -> Attention | MLA:
    dim, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if dim % heads:
        raise f.wrong("hidden_size", f"a multiple of num_attention_heads {heads}")
    f.fixed(head_dim=dim // heads)
    rope = rope_from_fields(f)
    if f.choice("attention_type", {"vanilla": True, "mla": False}, "vanilla"):
        return grouped_attention(f, heads, dim // heads, rope)
    f.fixed(v_head_dim=dim // heads)
    rope_dim = f.integer("qk_rope_head_dim", 32)
    if rope_dim % 2:
        raise f.wrong("qk_rope_head_dim", "an even number")
    return MLA(
        dim=dim,
        num_heads=heads,
        kv_rank=f.integer("kv_lora_rank", 256),
        q_rank=f.integer("q_lora_rank", 768),
        nope_dim=f.integer("qk_nope_head_dim", 64),
        rope_dim=rope_dim,
        value_dim=dim // heads,
        rope=rope,
    )


def sizes(f: Fields) -> tuple[int, int]:
    """How many experts there are, and how wide one is."""
    return f.integer("num_experts", 40), f.integer("expert_size", 128)


def minicpm_adapters(f: Fields) -> Mapping[str, Adapter]:
    """What the factors multiply, and in "block" the matrices that are stored expert by expert."""
    dim, (num_experts, width) = f.integer("hidden_size"), sizes(f)
    branch = f.number("scale_depth", 1.0) / math.sqrt(f.integer("num_hidden_layers"))
    head = f.number("dim_model_base", 1.0) / dim
    hidden = num_experts * width
    adapters = {
        "model.norm.weight": Adapter((dim,), times(head)),
        NAMES["blocks/mixer/out"]: Adapter((dim, dim), times(branch)),
        NAMES["blocks/ffn/down"]: Adapter((dim, hidden), times(branch)),
    }
    if f.entries.get("ffn_type") == "block":
        up, down = (num_experts, width, dim), (num_experts, dim, width)
        adapters[NAMES["blocks/ffn/up"]] = Adapter(up, lambda x: x.reshape(hidden, dim))
        adapters[NAMES["blocks/ffn/down"]] = Adapter(
            down, lambda x: times(branch)(x.transpose(1, 0, 2).reshape(dim, hidden))
        )
    return adapters


def times(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: x if factor == 1 else x.astype(np.float32) * np.float32(factor)


def minicpm_config(model: Decoder) -> dict[str, Any]:
    block = part(model, "blocks.block", Block)
    ffn = part(block, "ffn", BlockFFN)
    if isinstance(block.mixer, MLA):
        mixer = {"attention_type": "mla", **latent_config(block.mixer)}
    else:
        mixer = {"attention_type": "vanilla", **attention_config(part(block, "mixer", Attention))}
    config = decoder_config(model)
    return {
        **config,
        **mixer,
        "ffn_type": "block_linear",
        "hidden_act": activation_name(ffn),
        "router_act": "relu",
        "norm_after_router": "rms",
        "num_experts": ffn.num_experts,
        "expert_size": ffn.expert_dim,
        "intermediate_size": ffn.num_experts * ffn.expert_dim,
        "scale_emb": model.embedding.scale,
        "scale_depth": math.sqrt(config["num_hidden_layers"]),
        "dim_model_base": ffn.dim,
    }


def minicpm_names(model: Decoder) -> Mapping[str, str | None]:
    latent = isinstance(part(model, "blocks.block", Block).mixer, MLA)
    state = {f"blocks/ffn/sparsity/{name}": None for name in AdaptiveFactor(start=0.0).spec()}
    return NAMES | (LATENT_NAMES if latent else {}) | state


MINICPM = Family(
    model_type="minicpm",
    architecture="MiniCPMForCausalLM",
    names=minicpm_names,
    by_head=(LATENT_NAMES["blocks/mixer/key"],),
    adapters=minicpm_adapters,
    decoder=minicpm_decoder,
    config=minicpm_config,
)
