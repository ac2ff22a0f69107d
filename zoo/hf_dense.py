"""Families of dense models: Llama and Gemma-2."""

import dataclasses
from typing import Any

from bestiary.layers.attention import Attention
from bestiary.layers.feedforward import GLU
from bestiary.layers.repeat import Chain
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.gemma2 import gemma2
from bestiary.zoo.hf_config import Fields, rope_from_fields
from bestiary.zoo.hf_families import (
    BLOCK_NAMES,
    BOOLEAN,
    LAYER,
    Family,
    activation_name,
    attention_config,
    decoder_config,
    gated,
    grouped_attention,
    heads_that_divide,
    part,
)
from bestiary.zoo.llama import llama

ALTERNATING = ["sliding_attention", "full_attention"]


def llama_decoder(f: Fields) -> Decoder:
    f.fixed(attention_bias=False, mlp_bias=False)
    heads = heads_that_divide(f)
    return llama(
        vocab_size=f.integer("vocab_size"),
        num_layers=f.integer("num_hidden_layers"),
        attention=grouped_attention(
            f, heads, f.integer("hidden_size") // heads, rope_from_fields(f)
        ),
        ffn=gated(f, "hidden_act", "silu"),
        eps=f.number("rms_norm_eps", 1e-6),
        tied=f.choice("tie_word_embeddings", BOOLEAN, False),
    )


def llama_config(model: Decoder) -> dict[str, Any]:
    return block_config(model, part(model, "blocks.block", Block), "hidden_act")


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=lambda model: (
        BLOCK_NAMES | {"blocks/ffn_norm/weight": f"{LAYER}post_attention_layernorm.weight"}
    ),
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
    attention = grouped_attention(f, 4, 256, rope_from_fields(f))
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
    names=lambda model: (
        BLOCK_NAMES
        | {
            "blocks/mixer_post_norm/weight": f"{LAYER}post_attention_layernorm.weight",
            "blocks/ffn_norm/weight": f"{LAYER}pre_feedforward_layernorm.weight",
            "blocks/ffn_post_norm/weight": f"{LAYER}post_feedforward_layernorm.weight",
        }
    ),
    decoder=gemma2_decoder,
    config=gemma2_config,
)


def block_config(model: Decoder, block: Block, activation: str) -> dict[str, Any]:
    """The entries that the families have in common."""
    attention, ffn = part(block, "mixer", Attention), part(block, "ffn", GLU)
    return {
        **decoder_config(model),
        **attention_config(attention),
        "intermediate_size": ffn.hidden,
        activation: activation_name(ffn),
    }
