"""Ling 2.0, which Hugging Face folders call BailingMoeV2."""

from dataclasses import replace
from typing import Any

from bestiary.layers.attention import Attention
from bestiary.layers.feedforward import GLU
from bestiary.layers.rope import Rope
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.hf_config import Fields, rope_from_fields
from bestiary.zoo.hf_families import (
    BOOLEAN,
    LAYER,
    MTP_NAMES,
    Family,
    attention_config,
    decoder_config,
    grouped_attention,
    heads_that_divide,
    part,
    with_further,
)
from bestiary.zoo.hf_mixtures import (
    MIXTURE_NAMES,
    dense_of,
    dense_then_routed,
    experts_of,
    groups_of,
    routed,
)
from bestiary.zoo.ling import ling, ling_ffn


def bailing_decoder(f: Fields) -> Decoder:
    # the first version has the same model_type
    f.fixed(architectures=["BailingMoeV2ForCausalLM"], score_function="sigmoid")
    f.fixed(moe_router_enable_expert_bias=True, norm_topk_prob=True, use_qk_norm=True)
    f.fixed(hidden_act="silu", use_bias=False, use_qkv_bias=False, norm_head=False)
    heads = heads_that_divide(f)
    dim, hidden = f.integer("hidden_size"), f.integer("moe_intermediate_size")
    f.fixed(moe_shared_expert_intermediate_size=hidden)
    rope = rope_from_fields(f, theta=6e5, partial=True)
    attention = grouped_attention(f, f.integer("num_key_value_heads"), dim // heads, rope)
    num_experts, top_k = experts_of(f, "num_experts", 256, 8)
    num_groups, top_groups = groups_of(f, num_experts, top_k)
    ffn = ling_ffn(
        dim,
        hidden,
        num_experts=num_experts,
        top_k=top_k,
        num_shared=f.integer("num_shared_experts"),
        num_groups=num_groups,
        top_groups=top_groups,
    )
    scale = f.number("routed_scaling_factor", 2.5)
    model = ling(
        vocab_size=f.integer("vocab_size"),
        num_layers=f.integer("num_hidden_layers"),
        num_dense=dense_of(f, 0),
        dim=dim,
        num_heads=heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        dense_hidden=f.integer("intermediate_size"),
        ffn=replace(ffn, router=replace(ffn.router, scale=scale)),
        rope=rope,
        eps=f.number("rms_norm_eps", 1e-6),
        tied=f.choice("tie_word_embeddings", BOOLEAN, False),
    )
    return with_further(f, model)


def bailing_config(model: Decoder) -> dict[str, Any]:
    num_dense, dense, block = dense_then_routed(model)
    router, expert = routed(block)
    shared, attention = part(block, "ffn.shared", GLU), part(block, "mixer", Attention)
    return {
        **decoder_config(model),
        **attention_config(attention),
        "partial_rotary_factor": part(attention, "rope", Rope).fraction,
        "use_qk_norm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "hidden_act": "silu",
        "intermediate_size": dense.hidden,
        "moe_intermediate_size": expert.hidden,
        "first_k_dense_replace": num_dense,
        "num_experts": router.num_experts,
        "num_shared_experts": shared.hidden // expert.hidden,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": router.scale,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "num_nextn_predict_layers": int(model.mtp is not None),
    }


BAILING = Family(
    model_type="bailing_moe",
    architecture="BailingMoeV2ForCausalLM",
    names=lambda model: (
        MIXTURE_NAMES
        | MTP_NAMES
        | {
            "embedding/table": "model.word_embeddings.weight",
            "blocks/mixer/query": f"{LAYER}attention.query_key_value.weight",
            "blocks/mixer/key": f"{LAYER}attention.query_key_value.weight",
            "blocks/mixer/value": f"{LAYER}attention.query_key_value.weight",
            "blocks/mixer/query_norm/weight": f"{LAYER}attention.query_layernorm.weight",
            "blocks/mixer/key_norm/weight": f"{LAYER}attention.key_layernorm.weight",
            "blocks/mixer/out": f"{LAYER}attention.dense.weight",
            "blocks/ffn/router/bias": f"{LAYER}mlp.gate.expert_bias",
            "mtp/final_norm/weight": f"{LAYER}final_layernorm.weight",
        }
    ),
    decoder=bailing_decoder,
    config=bailing_config,
)
