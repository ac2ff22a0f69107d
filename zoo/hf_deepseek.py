"""DeepSeek-V3: latent attention, leading dense layers, mixtures with a selection bias, and a layer
for multi-token prediction."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bestiary.layers.feedforward import GLU
from bestiary.layers.mla import MLA
from bestiary.layers.moe import MoE
from bestiary.layers.norms import RMSNorm
from bestiary.layers.rope import Yarn
from bestiary.layers.router import Router
from bestiary.zoo.decoder import Block, Decoder, plain_decoder
from bestiary.zoo.hf_config import Fields, rope_entries, rope_from_fields
from bestiary.zoo.hf_families import (
    BLOCK_NAMES,
    BOOLEAN,
    LAYER,
    MTP_NAMES,
    Family,
    activation_name,
    decoder_config,
    gated,
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
from bestiary.zoo.mixtures import dense_then_mixtures

LATENT_NAMES = {
    "blocks/mixer/query": f"{LAYER}self_attn.q_b_proj.weight",
    "blocks/mixer/query_down": f"{LAYER}self_attn.q_a_proj.weight",
    "blocks/mixer/query_down_bias": f"{LAYER}self_attn.q_a_proj.bias",
    "blocks/mixer/query_norm/weight": f"{LAYER}self_attn.q_a_layernorm.weight",
    "blocks/mixer/kv_down": f"{LAYER}self_attn.kv_a_proj_with_mqa.weight",
    "blocks/mixer/kv_down_bias": f"{LAYER}self_attn.kv_a_proj_with_mqa.bias",
    "blocks/mixer/kv_norm/weight": f"{LAYER}self_attn.kv_a_layernorm.weight",
    "blocks/mixer/key": f"{LAYER}self_attn.kv_b_proj.weight",
    "blocks/mixer/value": f"{LAYER}self_attn.kv_b_proj.weight",
    "blocks/mixer/out_bias": f"{LAYER}self_attn.o_proj.bias",
}

OWN_NAMES = {
    "blocks/ffn/router/bias": f"{LAYER}mlp.gate.e_score_correction_bias",
    "mtp/final_norm/weight": f"{LAYER}shared_head.norm.weight",
}


def deepseek_decoder(f: Fields) -> Decoder:
    f.fixed(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    dim = f.integer("hidden_size")
    norm = RMSNorm(dim=dim, eps=f.number("rms_norm_eps", 1e-6))
    num_experts, top_k = experts_of(f, "n_routed_experts", 256, 8)
    num_groups, top_groups = groups_of(f, num_experts, top_k)
    normalize = f.choice("norm_topk_prob", BOOLEAN, True)
    if normalize and top_k == 1:
        raise f.wrong("num_experts_per_tok", "2 or more with norm_topk_prob")
    router = Router(
        dim=dim,
        num_experts=num_experts,
        top_k=top_k,
        score="sigmoid",
        normalize=normalize,
        scale=f.number("routed_scaling_factor", 2.5),
        num_groups=num_groups,
        top_groups=top_groups,
        bias="sign",
    )
    expert = gated(f, "hidden_act", "silu", "moe_intermediate_size")
    shared = replace(expert, hidden=expert.hidden * f.integer("n_shared_experts", 1))
    mixture = MoE(router=router, expert=expert, shared=shared)
    block = Block(mixer=latent_attention(f), ffn=mixture, norm=norm)
    dense, num_dense = gated(f, "hidden_act", "silu"), dense_of(f, 3)
    num_layers = f.integer("num_hidden_layers")
    vocab_size, tied = f.integer("vocab_size"), f.choice("tie_word_embeddings", BOOLEAN, False)
    model = plain_decoder(
        vocab_size=vocab_size,
        blocks=dense_then_mixtures(block, dense, mixture, num_dense, num_layers),
        norm=norm,
        tied=tied,
    )
    return with_further(f, model)


def latent_attention(f: Fields) -> MLA:
    heads = f.integer("num_attention_heads")
    f.fixed(num_key_value_heads=heads)
    nope_dim, rope_dim = f.integer("qk_nope_head_dim", 128), f.integer("qk_rope_head_dim", 64)
    if rope_dim % 2:
        raise f.wrong("qk_rope_head_dim", "an even number")
    f, factor = without_mscale(f)
    rope = rope_from_fields(f)
    return MLA(
        dim=f.integer("hidden_size"),
        num_heads=heads,
        kv_rank=f.integer("kv_lora_rank", 512),
        q_rank=f.integer_or_none("q_lora_rank", 1536),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=f.integer("v_head_dim", 128),
        bias=f.choice("attention_bias", BOOLEAN, False),
        rope=replace(rope, interleaved=f.choice("rope_interleave", BOOLEAN, True)),
        scale=None if factor == 1 else (nope_dim + rope_dim) ** -0.5 * factor**2,
    )


def without_mscale(f: Fields) -> tuple[Fields, float]:
    """YaRN's `mscale` and `mscale_all_dim` as the `attention_factor` that they stand for, and the
    factor by which the second one scales queries and keys, both."""
    name = "rope_scaling" if f.entries.get("rope_scaling") else "rope_parameters"
    entries = f.entries.get(name)
    if not isinstance(entries, dict) or "yarn" not in (
        entries.get("rope_type"),
        entries.get("type"),
    ):
        return f, 1.0
    r = Fields(entries, f"{f.where}: {name}")
    rest = {k: v for k, v in entries.items() if k not in ("mscale", "mscale_all_dim")}
    scales = {k: r.number(k) for k in ("mscale", "mscale_all_dim") if entries.get(k)}
    factors = {k: mscale(r.number("factor"), scale) for k, scale in scales.items()}
    if len(factors) == 2 and rest.get("attention_factor") is None:
        rest["attention_factor"] = factors["mscale"] / factors["mscale_all_dim"]
    return Fields({**f.entries, name: rest}, f.where), factors.get("mscale_all_dim", 1.0)


def mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def latent_config(mixer: MLA) -> dict[str, Any]:
    entries = rope_entries(mixer.rope)
    yarn = mixer.rope.scaling
    if mixer.scale is not None and isinstance(yarn, Yarn) and yarn.factor > 1:
        # the inverse of what reading does
        factor = math.sqrt(abs(mixer.scale) * math.sqrt(mixer.query_dim))
        scale = (factor - 1) / (mscale(yarn.factor, 1) - 1)
        entries["rope_scaling"]["mscale_all_dim"] = round(scale, 9)
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "attention_bias": mixer.bias,
        "rope_interleave": mixer.rope.interleaved,
        **entries,
    }


def deepseek_config(model: Decoder) -> dict[str, Any]:
    num_dense, dense, block = dense_then_routed(model)
    router, expert = routed(block)
    shared = part(block, "ffn.shared", GLU)
    return {
        **decoder_config(model),
        **latent_config(part(block, "mixer", MLA)),
        "hidden_act": activation_name(expert),
        "intermediate_size": dense.hidden,
        "moe_intermediate_size": expert.hidden,
        "first_k_dense_replace": num_dense,
        "n_routed_experts": router.num_experts,
        "n_shared_experts": shared.hidden // expert.hidden,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scale,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "num_nextn_predict_layers": int(model.mtp is not None),
    }


def deepseek_names(model: Decoder) -> Mapping[str, str | None]:
    direct = part(model.stacks[-1], "block.mixer", MLA).q_rank is None
    query = {"blocks/mixer/query": f"{LAYER}self_attn.q_proj.weight"} if direct else {}
    return MIXTURE_NAMES | LATENT_NAMES | query | MTP_NAMES | OWN_NAMES


DEEPSEEK = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    names=deepseek_names,
    by_head=(LATENT_NAMES["blocks/mixer/key"],),
    copies={
        f"{LAYER}embed_tokens.weight": BLOCK_NAMES["embedding/table"],
        f"{LAYER}shared_head.head.weight": BLOCK_NAMES["head/weight"],
    },
    unread=LAYER,
    decoder=deepseek_decoder,
    config=deepseek_config,
)
