"""Families of mixtures of experts: OLMoE and Mixtral, and what such families have in common."""

from dataclasses import replace
from typing import Any

from bestiary.layers.attention import Attention
from bestiary.layers.feedforward import GLU
from bestiary.layers.moe import MoE
from bestiary.layers.norms import RMSNorm
from bestiary.layers.router import Router
from bestiary.zoo.decoder import Block, Decoder
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
from bestiary.zoo.mixtures import olmoe_ffn

MIXTURE_NAMES = BLOCK_NAMES | {
    "blocks/ffn_norm/weight": f"{LAYER}post_attention_layernorm.weight",
    "blocks/ffn/router/weight": f"{LAYER}mlp.gate.weight",
    "blocks/ffn/router/load": None,
    "blocks/ffn/experts/gate": f"{LAYER}mlp.experts.{{}}.gate_proj.weight",
    "blocks/ffn/experts/up": f"{LAYER}mlp.experts.{{}}.up_proj.weight",
    "blocks/ffn/experts/down": f"{LAYER}mlp.experts.{{}}.down_proj.weight",
    "blocks/ffn/shared/gate": f"{LAYER}mlp.shared_experts.gate_proj.weight",
    "blocks/ffn/shared/up": f"{LAYER}mlp.shared_experts.up_proj.weight",
    "blocks/ffn/shared/down": f"{LAYER}mlp.shared_experts.down_proj.weight",
}


def olmoe_decoder(f: Fields) -> Decoder:
    heads = heads_that_divide(f)
    dim = f.integer("hidden_size")
    f.fixed(attention_bias=False, clip_qkv=None, head_dim=dim // heads)
    attention = grouped_attention(f, heads, dim // heads, rope_from_fields(f))
    eps = f.number("rms_norm_eps", 1e-5)
    ffn = olmoe_ffn(dim, *experts_of(f, "num_experts", 64, 8), gated(f, "hidden_act", "silu"))
    normalize = f.choice("norm_topk_prob", BOOLEAN, False)
    return llama(
        vocab_size=f.integer("vocab_size"),
        num_layers=f.integer("num_hidden_layers"),
        attention=replace(
            attention,
            query_norm=RMSNorm(dim=dim, eps=eps),
            key_norm=RMSNorm(dim=attention.num_kv_heads * attention.head_dim, eps=eps),
        ),
        ffn=replace(ffn, router=replace(ffn.router, normalize=normalize)),
        eps=eps,
        tied=f.choice("tie_word_embeddings", BOOLEAN, False),
    )


def olmoe_config(model: Decoder) -> dict[str, Any]:
    block = part(model, "blocks.block", Block)
    router, expert = routed(block)
    return {
        **decoder_config(model),
        **attention_config(part(block, "mixer", Attention)),
        "hidden_act": activation_name(expert),
        "intermediate_size": expert.hidden,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.normalize,
        "clip_qkv": None,
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    names=lambda model: (
        MIXTURE_NAMES
        | {
            "blocks/mixer/query_norm/weight": f"{LAYER}self_attn.q_norm.weight",
            "blocks/mixer/key_norm/weight": f"{LAYER}self_attn.k_norm.weight",
        }
    ),
    decoder=olmoe_decoder,
    config=olmoe_config,
)


def mixtral_decoder(f: Fields) -> Decoder:
    f.fixed(attention_bias=False)
    heads = heads_that_divide(f)
    attention = grouped_attention(
        f,
        # an absent entry is not null here
        heads if "num_key_value_heads" in f.entries else 8,
        f.integer("hidden_size") // heads,
        rope_from_fields(f, theta=1e6),
    )
    num_experts, top_k = experts_of(f, "num_local_experts", 8, 2)
    if top_k == 1:
        raise f.wrong("num_experts_per_tok", "2 or more: the weight of one alone is always 1")
    router = Router(
        dim=attention.dim, num_experts=num_experts, top_k=top_k, score="topk_softmax", balance=0.02
    )
    return llama(
        vocab_size=f.integer("vocab_size"),
        num_layers=f.integer("num_hidden_layers"),
        attention=replace(attention, window=f.integer_or_none("sliding_window", None)),
        ffn=MoE(router=router, expert=gated(f, "hidden_act", "silu")),
        eps=f.number("rms_norm_eps", 1e-5),
        tied=f.choice("tie_word_embeddings", BOOLEAN, False),
    )


def mixtral_config(model: Decoder) -> dict[str, Any]:
    block = part(model, "blocks.block", Block)
    attention = part(block, "mixer", Attention)
    router, expert = routed(block)
    return {
        **decoder_config(model),
        **attention_config(attention),
        "sliding_window": attention.window,
        "hidden_act": activation_name(expert),
        "intermediate_size": expert.hidden,
        "num_local_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    names=lambda model: (
        MIXTURE_NAMES
        | {
            "blocks/ffn/router/weight": f"{LAYER}block_sparse_moe.gate.weight",
            "blocks/ffn/experts/gate": f"{LAYER}block_sparse_moe.experts.{{}}.w1.weight",
            "blocks/ffn/experts/up": f"{LAYER}block_sparse_moe.experts.{{}}.w3.weight",
            "blocks/ffn/experts/down": f"{LAYER}block_sparse_moe.experts.{{}}.w2.weight",
        }
    ),
    decoder=mixtral_decoder,
    config=mixtral_config,
)


def experts_of(f: Fields, name: str, num_experts: int, top_k: int) -> tuple[int, int]:
    """How many experts there are, and how many a token uses; numbers are the family's defaults."""
    num_experts = f.integer(name, num_experts)
    top_k = f.integer("num_experts_per_tok", top_k)
    if top_k > num_experts:
        raise f.wrong("num_experts_per_tok", f"at most {name} {num_experts}")
    return num_experts, top_k


def groups_of(f: Fields, num_experts: int, top_k: int) -> tuple[int, int]:
    """How many groups of experts there are, and of how many a token uses experts."""
    groups, top = f.integer("n_group", 8), f.integer("topk_group", 4)
    size, rest = divmod(num_experts, groups)
    if rest or (groups > 1 and size < 2):
        raise f.wrong("n_group", f"a divisor of the {num_experts} experts, 2 or more in a group")
    if top > groups or top_k > size * top:
        raise f.wrong("topk_group", f"at most n_group {groups}, with {top_k} experts in the groups")
    return groups, top


def dense_of(f: Fields, default: int) -> int:
    num_dense = f.integer("first_k_dense_replace", default, least=0)
    layers = f.integer("num_hidden_layers")
    if num_dense >= layers:
        raise f.wrong("first_k_dense_replace", f"less than num_hidden_layers {layers}")
    return num_dense


def dense_then_routed(model: Decoder) -> tuple[int, GLU, Block]:
    """The number of leading dense layers, their feed-forward (without any: an expert), and a later
    block."""
    first, last = model.stacks[0], part(model.stacks[-1], "block", Block)
    if len(model.stacks) == 1:
        return 0, routed(last)[1], last
    return first.n, part(first, "block.ffn", GLU), last


def routed(block: Block) -> tuple[Router, GLU]:
    ffn = part(block, "ffn", MoE)
    return part(ffn, "router", Router), part(ffn, "expert", GLU)
