"""Families of state-space models: Mamba and Mamba-2.

`residual_in_fp32` is not read: the residual stream has the type of `precision.compute`, which makes
no difference in float32.
"""

import math
from typing import Any

from bestiary.layers.mamba import Mamba
from bestiary.layers.mamba2 import Mamba2
from bestiary.layers.norms import RMSNorm
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.hf_config import Fields, or_default
from bestiary.zoo.hf_families import ACTIVATIONS, BOOLEAN, Family, activation_name, part
from bestiary.zoo.mamba import mixers_only

LAYER = "backbone.layers.{}."
MIXER = f"{LAYER}mixer."
CONVOLUTION = f"{MIXER}conv1d.weight"
MODEL_NAMES = {
    "embedding/table": "backbone.embeddings.weight",
    "blocks/mixer_norm/weight": f"{LAYER}norm.weight",
    "blocks/mixer/A_log": f"{MIXER}A_log",
    "blocks/mixer/D": f"{MIXER}D",
    "blocks/mixer/out": f"{MIXER}out_proj.weight",
    "blocks/mixer/out_bias": f"{MIXER}out_proj.bias",
    "norm/weight": "backbone.norm_f.weight",
    "head/weight": "lm_head.weight",
}
MAMBA_NAMES = MODEL_NAMES | {
    "blocks/mixer/x": f"{MIXER}in_proj.weight",
    "blocks/mixer/z": f"{MIXER}in_proj.weight",
    "blocks/mixer/x_bias": f"{MIXER}in_proj.bias",
    "blocks/mixer/z_bias": f"{MIXER}in_proj.bias",
    "blocks/mixer/conv/weight": CONVOLUTION,
    "blocks/mixer/conv/bias": f"{MIXER}conv1d.bias",
    "blocks/mixer/dt_down": f"{MIXER}x_proj.weight",
    "blocks/mixer/B": f"{MIXER}x_proj.weight",
    "blocks/mixer/C": f"{MIXER}x_proj.weight",
    "blocks/mixer/dt": f"{MIXER}dt_proj.weight",
    "blocks/mixer/dt_bias": f"{MIXER}dt_proj.bias",
}
MAMBA2_NAMES = MODEL_NAMES | {
    **{f"blocks/mixer/in_{name}": f"{MIXER}in_proj.weight" for name in ("z", "x", "B", "C", "dt")},
    **{f"blocks/mixer/in_{n}_bias": f"{MIXER}in_proj.bias" for n in ("z", "x", "B", "C", "dt")},
    **{f"blocks/mixer/conv_{name}/weight": CONVOLUTION for name in ("x", "B", "C")},
    **{f"blocks/mixer/conv_{name}/bias": f"{MIXER}conv1d.bias" for name in ("x", "B", "C")},
    "blocks/mixer/dt_bias": f"{MIXER}dt_bias",
    "blocks/mixer/norm": f"{MIXER}norm.weight",
}


def mamba_decoder(f: Fields) -> Decoder:
    dim = f.integer("hidden_size")
    rank = f.entries.get("time_step_rank")
    mixer = Mamba(
        inner=f.integer("expand", 2) * dim,
        dt_rank=math.ceil(dim / 16) if rank in (None, "auto") else f.integer("time_step_rank"),
        **common(f, 16),
    )
    return decoder(f, mixer, True)


def mamba2_decoder(f: Fields) -> Decoder:
    heads, groups = f.integer("num_heads", 128), f.integer("n_groups", 8)
    head_dim, inner = f.integer("head_dim", 64), f.integer("expand", 2) * f.integer("hidden_size")
    if heads * head_dim != inner:
        raise f.wrong("num_heads", f"{inner} / head_dim {head_dim}: expand times hidden_size")
    if heads % groups:
        raise f.wrong("n_groups", f"a divisor of num_heads {heads}")
    mixer = Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        groups=groups,
        dt_limit=limits(f),
        norm_eps=f.number("layer_norm_epsilon", 1e-5),
        **common(f, 128),
    )
    return decoder(f, mixer, False)


def common(f: Fields, states: int) -> dict[str, Any]:
    """What the mixers have in common; `states` is the family's default."""
    return {
        "dim": f.integer("hidden_size"),
        "state": f.integer("state_size", states),
        "kernel": f.integer("conv_kernel", 4),
        "bias": f.choice("use_bias", BOOLEAN, False),
        "conv_bias": f.choice("use_conv_bias", BOOLEAN, True),
        "activation": f.choice("hidden_act", ACTIVATIONS, "silu"),
    }


def decoder(f: Fields, mixer: Mamba | Mamba2, tied: bool) -> Decoder:
    return mixers_only(
        vocab_size=f.integer("vocab_size"),
        num_layers=f.integer("num_hidden_layers"),
        mixer=mixer,
        dim=mixer.dim,
        eps=f.number("layer_norm_epsilon", 1e-5),
        tied=f.choice("tie_word_embeddings", BOOLEAN, tied),
    )


def limits(f: Fields) -> tuple[float, float]:
    """`time_step_limit`; transformers writes the infinite one as {"__float__": "Infinity"}."""
    given = or_default(f.entries.get("time_step_limit"), [0.0, math.inf])
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise f.wrong("time_step_limit", "two numbers")
    infinite = (None, {"__float__": "Infinity"})
    low, high = (math.inf if value in infinite else value for value in given)
    if not all(type(x) in (int, float) for x in (low, high)) or not 0 <= low < high:
        raise f.wrong("time_step_limit", "0 <= lower < upper")
    return float(low), float(high)


def config(model: Decoder, mixer: Mamba | Mamba2) -> dict[str, Any]:
    inner = mixer.inner
    if inner % mixer.dim:
        raise ValueError(f"mixer.inner: {inner}, not a multiple of dim {mixer.dim}")
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": mixer.dim,
        "num_hidden_layers": model.stacks[0].n,
        "layer_norm_epsilon": part(model, "norm", RMSNorm).eps,
        "tie_word_embeddings": model.head is None,
        "state_size": mixer.state,
        "conv_kernel": mixer.kernel,
        "expand": inner // mixer.dim,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": activation_name(mixer),
    }


def mamba_config(model: Decoder) -> dict[str, Any]:
    mixer = part(part(model, "blocks.block", Block), "mixer", Mamba)
    entries = {"intermediate_size": mixer.inner, "time_step_rank": mixer.dt_rank}
    return config(model, mixer) | entries


def mamba2_config(model: Decoder) -> dict[str, Any]:
    mixer = part(part(model, "blocks.block", Block), "mixer", Mamba2)
    entries: dict[str, Any] = {
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "n_groups": mixer.groups,
    }
    if mixer.dt_limit != (0.0, math.inf):
        entries["time_step_limit"] = list(mixer.dt_limit)
    return config(model, mixer) | entries


MAMBA = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    names=lambda model: MAMBA_NAMES,
    depthwise=(CONVOLUTION,),
    decoder=mamba_decoder,
    config=mamba_config,
)
MAMBA2 = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    names=lambda model: MAMBA2_NAMES,
    depthwise=(CONVOLUTION,),
    decoder=mamba2_decoder,
    config=mamba2_config,
)
